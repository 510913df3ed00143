"""The optimizer against the float64 one, what it refuses, and what a checkpoint needs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import tolerances
from cases import BIASES, GQA, NORMS, SEPARATE, bits, make_engine, make_model, message, sequence
from reference import adamw64
from reference import llama64 as ref
from tolerances import assert_tensors_close

from anepy.engine import Engine
from anepy.errors import NativeError
from anepy.models.model import Model, ModelConfig
from anepy.native.info import library_info


class Reference:
    """A float64 copy of an engine's state that is updated by the reference optimizer."""

    def __init__(self, engine: Engine) -> None:
        self.weights = {n: np.array(w, np.float64) for n, w in engine.model.weights.items()}
        self.m = {n: np.zeros_like(w) for n, w in self.weights.items()}
        self.v = {n: np.zeros_like(w) for n, w in self.weights.items()}
        self.updates = 0

    def update(
        self,
        gradients: dict[str, np.ndarray],
        accumulated: int = 1,
        grad_clip: float | None = None,
        **options: float,
    ) -> float:
        mean = {n: np.asarray(g, np.float64) / accumulated for n, g in gradients.items()}
        norm = adamw64.clip_gradients(mean, math.inf if grad_clip is None else grad_clip)
        self.updates += 1
        adamw64.adamw(self.weights, mean, self.m, self.v, self.updates, **options)
        return norm


def put_gradients(engine: Engine, seed: int, accumulated: int = 1) -> dict[str, np.ndarray]:
    """Write gradients of all magnitudes into the engine as if steps had made them."""
    rng = np.random.default_rng(seed)
    gradients = {}
    for name, view in engine.gradients.items():
        view[...] = rng.normal(size=view.shape) * 10.0 ** rng.uniform(-9, 1, view.shape)
        gradients[name] = np.array(view)
    engine.restore(accumulated=accumulated, updates=engine.updates)
    return gradients


@pytest.mark.parametrize("variant", ["baseline", "opt"])
@pytest.mark.parametrize(
    ("accumulated", "options"),
    [
        (1, {"lr": 1e-3}),
        (3, {"lr": 1e-2, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}),
        (2, {"lr": 1e-2, "weight_decay": 0.1}),
        (4, {"lr": 1e-3, "weight_decay": 0.1, "grad_clip": 0.5}),
        (1, {"lr": 1e-3, "grad_clip": 1e9}),
    ],
    ids=["plain", "betas", "decay", "clip", "no-clip-needed"],
)
def test_update_several_times_equals_the_reference(
    variant: str, accumulated: int, options: dict[str, float]
) -> None:
    with make_engine(SEPARATE, variant, threads=2) as engine:
        expected = Reference(engine)
        for number in range(1, 5):
            gradients = put_gradients(engine, number, accumulated)
            norm = expected.update(gradients, accumulated, **options)
            stats = engine.update(**options)
            assert not stats.skipped and stats.update_ms > 0
            if "grad_clip" in options:
                assert stats.grad_norm == pytest.approx(norm, rel=1e-6)
            else:
                assert math.isnan(stats.grad_norm)
            assert (engine.accumulated, engine.updates) == (0, number)
            for got, wanted in (
                (engine.adam_m, expected.m),
                (engine.adam_v, expected.v),
                (engine.model.weights, expected.weights),
            ):
                assert_tensors_close(dict(got), wanted, tolerances.FP32_UPDATE)


@pytest.mark.parametrize("variant", ["baseline", "opt"])
def test_first_update_every_element_moves_as_defined(variant: str) -> None:
    """From zero: -lr g / (|g| + eps), for gradients around eps, far below, and very large."""
    lr, eps = 1e-2, 1e-8
    with Engine(Model(SEPARATE), variant, "cpu", "fp32") as engine:
        gradients = put_gradients(engine, 0)
        odd = np.array([0.0, -0.0, 1e-8, -1e-8, 1e-20, -3e-30, 1e-38, 1e-45, 1e12, -1e15])
        for name, view in engine.gradients.items():
            view.ravel()[:10] = odd
            gradients[name] = np.array(view, np.float64)
        engine.update(lr=lr, eps=eps)
        for name, weight in engine.model.weights.items():
            g = gradients[name]
            expected = -lr * g / (np.abs(g) + eps)
            # A tenth of the gradient, its first mean, may count as zero where it is subnormal.
            unseen = lr * 1.2e-37 / eps
            np.testing.assert_allclose(
                weight, expected, rtol=4 * tolerances.FP32_UPDATE, atol=unseen, err_msg=name
            )


@pytest.mark.parametrize("variant", ["baseline", "opt"])
def test_update_with_zero_betas_forgets_everything(variant: str) -> None:
    with Engine(Model(SEPARATE), variant, "cpu", "fp32") as engine:
        for number in (1, 2):
            gradients = put_gradients(engine, number)
            for weight in engine.model.weights.values():
                weight[...] = 0.0
            engine.update(lr=1e-2, beta1=0.0, beta2=0.0)
        for name, weight in engine.model.weights.items():
            g = gradients[name].astype(np.float64)
            expected = -1e-2 * g / (np.abs(g) + 1e-8)
            np.testing.assert_allclose(weight, expected, rtol=4 * tolerances.FP32_UPDATE)


def test_update_tells_of_no_compiling_where_weights_are_read_in_place() -> None:
    with make_engine(GQA) as engine:
        engine.step([1, 2], [2, 3])
        stats = engine.update(lr=1e-3)
        assert stats.compile_ms == 0 and stats.update_ms > 0 and engine.compiles == 0


@pytest.mark.parametrize("config", [SEPARATE, BIASES, NORMS], ids=["separate", "biases", "norms"])
def test_update_decays_matrices_only(config: ModelConfig) -> None:
    with make_engine(config) as engine:
        for gradient in engine.gradients.values():
            gradient[...] = 0.0
        before = {n: np.array(w) for n, w in engine.model.weights.items()}
        engine.restore(accumulated=1, updates=0)
        engine.update(lr=0.1, weight_decay=0.5)
        for name, weight in engine.model.weights.items():
            if weight.ndim == 1:
                assert weight.tobytes() == before[name].tobytes(), name
            else:
                np.testing.assert_array_equal(weight, before[name] * np.float32(0.95), name)


def test_update_training_follows_the_float64_reference() -> None:
    """Real steps, unequal accumulations, clipping and decay, all together."""
    options = {"lr": 3e-3, "weight_decay": 0.1, "grad_clip": 1.0}
    with make_engine(GQA) as engine:
        expected = Reference(engine)
        for accumulated in (1, 3, 2, 1, 4, 1):
            total: dict[str, np.ndarray] = {}
            for step in range(accumulated):
                tokens, targets = sequence(GQA, 30 + 7 * step)
                loss, gradients = ref.loss_and_gradients(expected.weights, GQA, tokens, targets)
                for name, gradient in gradients.items():
                    total[name] = total.get(name, 0.0) + gradient * len(tokens)
                stats = engine.step(tokens, targets)
                assert stats.loss == pytest.approx(loss, abs=tolerances.TORCH_LOSS_20_STEPS)
                assert engine.accumulated == step + 1
            norm = expected.update(total, engine.counted, **options)
            assert engine.update(**options).grad_norm == pytest.approx(norm, rel=1e-3)
        assert engine.updates == 6
        assert loss < 0.8 * math.log(GQA.vocab_size), "nothing was learned"


@pytest.mark.parametrize("grad_clip", [None, 1.0])
def test_update_clears_gradients_in_every_view(grad_clip: float | None) -> None:
    with make_engine() as engine:
        old = engine.gradients["layers.1.feed_forward.w1.weight"]
        engine.step(*sequence(GQA, 20))
        assert old.any()
        engine.update(lr=1e-3, grad_clip=grad_clip)
        assert not old.any()
        assert not any(gradient.any() for gradient in engine.gradients.values())
        assert engine.accumulated == 0


@pytest.mark.parametrize("variant", ["baseline", "opt"])
def test_update_leaves_unused_embeddings_exactly_alone(variant: str) -> None:
    """A reciprocal square root of zero gave NaN in research code; here nothing may move at all."""
    with make_engine(SEPARATE, variant) as engine:
        before = np.array(engine.model.weights["tok_embeddings.weight"])
        used = np.array([3, 5, 599])
        for _ in range(3):
            engine.step(used, used)
            engine.update(lr=1e-2)
        after = engine.model.weights["tok_embeddings.weight"]
        moved = (after != before).any(axis=1)
        assert sorted(np.flatnonzero(moved)) == sorted(used)
        unused = np.setdiff1d(np.arange(SEPARATE.vocab_size), used)
        assert not engine.adam_v["tok_embeddings.weight"][unused].any()


def test_update_zero_learning_rate_leaves_the_weights() -> None:
    with make_engine() as engine:
        before = bits(engine.model.weights)
        engine.step(*sequence(GQA, 20))
        engine.update(lr=0.0, weight_decay=0.1)
        assert bits(engine.model.weights) == before and engine.updates == 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_update_of_a_gradient_that_is_not_finite_is_skipped(value: float) -> None:
    with make_engine() as engine:
        engine.step(*sequence(GQA, 20))
        engine.gradients["layers.1.attention.wv.weight"][3, 2] = value
        before = [bits(a) for a in (engine.model.weights, engine.adam_m, engine.adam_v)]
        stats = engine.update(lr=1e-2, grad_clip=1.0)
        assert stats.skipped and not math.isfinite(stats.grad_norm)
        assert [bits(a) for a in (engine.model.weights, engine.adam_m, engine.adam_v)] == before
        assert engine.updates == 0


def test_update_after_a_step_that_is_not_finite_is_skipped() -> None:
    """Without clipping no norm is computed; the step itself has to notice."""
    with make_engine() as engine:
        good = np.array(engine.model.weights["norm.weight"])
        engine.model.weights["norm.weight"][5] = math.inf
        engine.step(*sequence(GQA, 20))
        engine.model.weights["norm.weight"][...] = good
        before = bits(engine.model.weights)
        engine.step(*sequence(GQA, 20))
        assert engine.update(lr=1e-2).skipped
        assert bits(engine.model.weights) == before
        assert (engine.accumulated, engine.updates) == (0, 0)
        engine.step(*sequence(GQA, 20))
        assert not engine.update(lr=1e-2).skipped
        assert all(np.isfinite(w).all() for w in engine.model.weights.values())


def test_restore_after_a_step_that_is_not_finite_forgets_it() -> None:
    with make_engine() as engine:
        engine.model.weights["norm.weight"][5] = math.nan
        engine.step(*sequence(GQA, 20))
        engine.model.weights["norm.weight"][5] = 1.0
        for gradient in engine.gradients.values():
            gradient[...] = 0.0
        engine.restore(accumulated=0, updates=0)
        engine.step(*sequence(GQA, 20))
        assert not engine.update(lr=1e-2).skipped


def test_update_skipped_forgets_the_bad_gradients() -> None:
    """They stayed, so that every later update of the run was skipped as well."""
    with make_engine() as engine, make_engine() as fresh:
        engine.step(*sequence(GQA, 20))
        engine.gradients["norm.weight"][3] = math.nan
        assert engine.update(lr=1e-2, grad_clip=1.0).skipped
        assert engine.accumulated == 0
        for trained in (engine, fresh):
            trained.step(*sequence(GQA, 30))
            assert not trained.update(lr=1e-2, grad_clip=1.0).skipped
        assert bits(engine.model.weights) == bits(fresh.model.weights)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1e-3}, "lr is -0.001"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"lr": 1e-3, "beta1": 1.0}, "beta1 1"),
        ({"lr": 1e-3, "beta2": -0.1}, "beta2 -0.1"),
        ({"lr": 1e-3, "beta1": math.nan}, "beta1 nan"),
        ({"lr": 1e-3, "eps": 0.0}, "eps 0"),
        ({"lr": 1e-3, "eps": math.inf}, "eps inf"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay -0.1"),
        ({"lr": 1e-3, "weight_decay": math.inf}, "weight_decay inf"),
        ({"lr": 1e-3, "grad_clip": -1.0}, "grad_clip -1"),
        ({"lr": 1e-3, "grad_clip": math.nan}, "grad_clip nan"),
    ],
)
def test_update_with_bad_options_changes_nothing(options: dict[str, float], says: str) -> None:
    """An infinite weight decay was accepted and made every weight NaN."""
    with make_engine() as engine:
        engine.step(*sequence(GQA, 20))
        before = bits(engine.model.weights), bits(engine.gradients)
        assert says in message(lambda: engine.update(**options))
        assert (bits(engine.model.weights), bits(engine.gradients)) == before
        assert (engine.accumulated, engine.updates) == (1, 0)


def test_update_without_a_step_is_refused() -> None:
    with make_engine() as engine:
        assert "no step since the last update" in message(lambda: engine.update(1e-3), NativeError)
        engine.step([1], [2])
        engine.update(1e-3)
        message(lambda: engine.update(1e-3), NativeError)


def test_restore_continues_bit_identically() -> None:
    """Copying the four arenas and four numbers is all a checkpoint needs."""

    def go_on(engine: Engine) -> tuple[Any, ...]:
        for seed in (5, 6):
            engine.step(*sequence(GQA, 40, seed))
        engine.update(lr=1e-2, grad_clip=1.0)
        return bits(engine.model.weights), bits(engine.adam_m), bits(engine.adam_v)

    with make_engine() as engine, Engine(make_model(seed=9), precision="fp32") as other:
        for seed in (1, 2):
            engine.step(*sequence(GQA, 50, seed))
            engine.update(lr=1e-2)
        engine.step(*sequence(GQA, 60))
        for ours, theirs in (
            (engine.model.weights, other.model.weights),
            (engine.gradients, other.gradients),
            (engine.adam_m, other.adam_m),
            (engine.adam_v, other.adam_v),
        ):
            for name, values in ours.items():
                theirs[name][...] = values
        other.restore(
            accumulated=engine.accumulated,
            updates=engine.updates,
            counted=engine.counted,
            unit=engine.unit,
        )
        assert go_on(engine) == go_on(other)


@pytest.mark.parametrize("state", [(-1, 0), (0, -1), (2**64 + 1, 0), (0, 2**63)])
def test_restore_impossible_state_is_refused(state: tuple[int, int]) -> None:
    """2^64 + 1 steps were taken for one."""
    with make_engine() as engine:
        message(lambda: engine.restore(*state))
        assert (engine.accumulated, engine.updates) == (0, 0)


def test_simd_adam_is_as_exact_as_the_scalar_one() -> None:
    results = []
    for variant in ("baseline", "baseline+simd_adam"):
        with make_engine(SEPARATE, variant) as engine:
            for number in range(3):
                put_gradients(engine, number)
                engine.update(lr=1e-2, weight_decay=0.1)
            results.append({n: np.array(w) for n, w in engine.model.weights.items()})
    assert_tensors_close(results[0], results[1], tolerances.FP32_UPDATE)
    # Otherwise the switch would switch nothing.
    if library_info()["isa"] != "scalar":
        assert any(results[0][n].tobytes() != results[1][n].tobytes() for n in results[0])


# ------------------------------------------------------------------ what gradients show, and when


def train(engine: Engine, updates: int = 3, **options: float) -> None:
    for update in range(updates):
        for step in range(update + 1):
            engine.step(*sequence(engine.model.config, 20 + 9 * step, update))
        engine.update(lr=1e-2, **options)


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
@pytest.mark.parametrize("variant", ["baseline", "opt"])
def test_gradients_that_nobody_sees_are_replaced_whatever_they_hold(
    config: ModelConfig, variant: str, device: str
) -> None:
    """An update leaves them; the next step must overwrite every single one."""
    weights = []
    for seen in (True, False):
        with Engine(make_model(config), variant, device) as engine:
            if seen:
                assert not any(g.any() for g in engine.gradients.values())
            for _ in range(3):
                train(engine, 1, grad_clip=1.0)
                if seen:
                    assert not any(g.any() for g in engine.gradients.values())
                else:
                    assert engine._grads.any()
                    engine._grads.fill(math.nan)
            weights.append(bits(engine.model.weights))
    assert weights[0] == weights[1]


def test_gradients_first_seen_after_an_update_are_zero_and_stay_honest() -> None:
    with make_engine() as engine, make_engine() as other:
        train(engine)
        assert list(engine.gradients) == list(engine.model.weights)
        assert len(engine.gradients) == len(engine.model.weights)
        view = engine.gradients["norm.weight"]
        rest = dict(engine.gradients)
        assert not any(gradient.any() for gradient in rest.values())
        engine.step(*sequence(GQA, 30))
        assert view.any() and np.shares_memory(view, engine.gradients["norm.weight"])
        train(other)
        other.step(*sequence(GQA, 30))
        assert bits(other.gradients) == bits(rest)  # seen in the middle of an accumulation
        for each in (engine, other):
            each.update(lr=1e-2)
            assert not each.gradients["norm.weight"].any() and not each._grads.any()
        assert bits(engine.model.weights) == bits(other.model.weights)


def test_update_clears_only_while_somebody_holds_a_view() -> None:
    with make_engine() as engine:
        train(engine)
        assert engine._grads.any()
        views: list[Any] = [engine.gradients["norm.weight"][4:][::2].reshape(-1, 2)]
        views.append(memoryview(engine.gradients["norm.weight"]))
        for _ in range(2):
            train(engine)
            assert not engine._grads.any() and not np.asarray(views[0]).any()
            np.asarray(views.pop(0))[...] = 2.0
            assert (engine.gradients["norm.weight"] == 2.0).any(), "a write through a view is lost"
        train(engine)
        assert engine._grads.any()
        assert not any(gradient.any() for gradient in engine.gradients.values())


def test_gradients_after_a_refused_update_are_those_of_the_steps() -> None:
    with make_engine() as engine, make_engine() as other:
        for each in (engine, other):
            train(each, 1)
            each.step(*sequence(GQA, 30))
        message(lambda: engine.update(lr=-1.0))
        message(lambda: engine.step([-1], [0]))
        assert bits(engine.gradients) == bits(other.gradients)
        other.update(lr=1e-2)
        message(lambda: other.update(lr=1e-2), NativeError)


def test_gradients_seen_after_a_skipped_step_are_zero() -> None:
    """A scale that overflows everything: the step writes nothing, the update's rest is there."""
    with Engine(make_model(), "opt", "sim", loss_scale=16.0) as engine:
        train(engine, 1)
        engine.restore(0, engine.updates, loss_scale=2.0**40)
        assert engine.step(*sequence(GQA, 30)).skipped
        assert not any(gradient.any() for gradient in engine.gradients.values())


def test_gradients_after_close_are_zero_too() -> None:
    engine = make_engine()
    train(engine)
    engine.close()
    assert not any(gradient.any() for gradient in engine.gradients.values())


def test_restore_counts_gradients_that_nobody_wrote_as_zero() -> None:
    with make_engine() as engine, make_engine() as other:
        for each, number in ((engine, 1), (other, 0)):
            train(each)
            each.restore(accumulated=number, updates=each.updates)
            each.step(*sequence(GQA, 30))
        assert (engine.accumulated, other.accumulated) == (2, 1)
        assert bits(engine.gradients) == bits(other.gradients)
