"""The engine's behaviour: update, evaluation, variants, inputs, life cycle; and the decoder.

Gradients have their own module, `test_gradients.py`.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import pickle
import resource
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tolerances
from reference import llama64 as ref
from tolerances import assert_tensors_close, relative_error

from anepy import engine as engine_module
from anepy.engine import Decoder, Engine, StepStats, devices, library_info, variants
from anepy.errors import AnepyError, ClosedError, ConfigError, NativeError
from anepy.model import PRESETS, Model, ModelConfig
from anepy.tokenizer import Tokenizer

GQA = ModelConfig(40, 70, 3, 10, 2, 523, 129)
SEPARATE = ModelConfig(52, 44, 2, 2, 1, 600, 70, tied=False)
MEMORY_SWITCHES = ("prealloc", "fp16_cache", "skip_dead_reads", "concurrent_dw", "vector_embed")


def make_model(config: ModelConfig = GQA, seed: int = 0) -> Model:
    model = Model(config)
    for name, values in ref.random_weights(config, seed, 1.2 / math.sqrt(config.dim)).items():
        model.weights[name][...] = values
    return model


def make_engine(config: ModelConfig = GQA, variant: str = "opt", **options: Any) -> Engine:
    return Engine(make_model(config), variant, "cpu", "fp32", **options)


def sequence(config: ModelConfig, length: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng((seed, length)).integers(0, config.vocab_size, length + 1)
    return ids[:-1], ids[1:]


def message(call: Callable[[], object], kind: type[AnepyError] = ConfigError) -> str:
    """Return what a call that must fail says, in one line."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert text and "\n" not in text and "\0" not in text and len(text) < 600
    return text


def bits(arrays: Any) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


# ---------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
def test_logits_equal_the_reference(config: ModelConfig) -> None:
    with make_engine(config) as engine:
        for length in (70, 1, 64, 33, 65):
            tokens, _ = sequence(config, length)
            logits = engine.logits(tokens)
            assert logits.shape == (length, config.vocab_size) and logits.dtype == np.float32
            expected = ref.forward(engine.model.weights, config, tokens)
            assert relative_error(logits, expected) < tolerances.FP32_LOGITS


def test_logits_see_no_later_token() -> None:
    tokens, _ = sequence(GQA, 70)
    changed = tokens.copy()
    changed[66] = (changed[66] + 1) % GQA.vocab_size
    with make_engine() as engine:
        before, after = engine.logits(tokens), engine.logits(changed)
    assert before[:66].tobytes() == after[:66].tobytes()
    assert (before[66:] != after[66:]).any(axis=1).all()


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
def test_evaluate_is_the_loss_of_a_step_and_changes_nothing(config: ModelConfig) -> None:
    with make_engine(config) as engine:
        tokens, targets = sequence(config, 50)
        engine.step(*sequence(config, 70))
        before = bits(engine.gradients), bits(engine.model.weights)
        loss = engine.evaluate(tokens, targets)
        engine.logits(tokens)
        assert (bits(engine.gradients), bits(engine.model.weights)) == before
        assert (engine.accumulated, engine.updates) == (1, 0)
        assert engine.step(tokens, targets).loss == loss


def test_evaluate_of_zero_weights_is_the_log_of_the_vocabulary() -> None:
    with Engine(Model(GQA)) as engine:
        assert engine.evaluate([1, 2, 3], [2, 3, 4]) == pytest.approx(math.log(523), rel=1e-6)


def test_real_model_has_the_published_losses(shared: Callable[[str], Path]) -> None:
    """Measured with llama2.c's own model.py in PyTorch."""
    model = Model.load(shared("stories260K.bin"))
    tokenizer = Tokenizer.load(shared("tok512.bin"), model.config.vocab_size)
    text = shared("tinystories_sample.txt").read_text("utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    published = (1.3160, 1.2386, 0.9522, 1.4934, 1.1879)
    for variant in ("baseline", "max"):
        with Engine(model, variant, "cpu", "fp32") as engine:
            losses = []
            for story in stories:
                ids = tokenizer.encode(story)[:513]
                losses.append(engine.evaluate(ids[:-1], ids[1:]))
        assert losses == pytest.approx(published, abs=tolerances.LOSS_VALUE)


# -------------------------------------------------------------------------------------- update


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
        norm = ref.clip_gradients(mean, math.inf if grad_clip is None else grad_clip)
        self.updates += 1
        ref.adamw(self.weights, mean, self.m, self.v, self.updates, **options)
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
            # Subnormal gradients, and steps that would be subnormal, count as zero.
            np.testing.assert_allclose(
                weight, expected, rtol=4 * tolerances.FP32_UPDATE, atol=1.2e-38, err_msg=name
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


def test_update_decays_matrices_only() -> None:
    with make_engine(SEPARATE) as engine:
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
        for number, accumulated in enumerate((1, 3, 2, 1, 4, 1)):
            total: dict[str, np.ndarray] = {}
            for step in range(accumulated):
                tokens, targets = sequence(GQA, 30 + 7 * step, seed=number)
                loss, gradients = ref.loss_and_gradients(expected.weights, GQA, tokens, targets)
                for name, gradient in gradients.items():
                    total[name] = total.get(name, 0.0) + gradient
                stats = engine.step(tokens, targets)
                assert stats.loss == pytest.approx(loss, abs=tolerances.TORCH_LOSS_20_STEPS)
                assert engine.accumulated == step + 1
            norm = expected.update(total, accumulated, **options)
            assert engine.update(**options).grad_norm == pytest.approx(norm, rel=1e-3)
        assert engine.updates == 6
        assert loss < math.log(GQA.vocab_size), "nothing was learned"


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
    """Copying the four arenas and both counters is all a checkpoint needs."""

    def go_on(engine: Engine) -> tuple[Any, ...]:
        for seed in (5, 6):
            engine.step(*sequence(GQA, 40, seed))
        engine.update(lr=1e-2, grad_clip=1.0)
        return bits(engine.model.weights), bits(engine.adam_m), bits(engine.adam_v)

    with make_engine() as engine, Engine(make_model(seed=9)) as other:
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
        other.restore(accumulated=engine.accumulated, updates=engine.updates)
        assert go_on(engine) == go_on(other)


@pytest.mark.parametrize("state", [(-1, 0), (0, -1), (2**64 + 1, 0), (0, 2**63)])
def test_restore_impossible_state_is_refused(state: tuple[int, int]) -> None:
    """2^64 + 1 steps were taken for one."""
    with make_engine() as engine:
        message(lambda: engine.restore(*state))
        assert (engine.accumulated, engine.updates) == (0, 0)


# ------------------------------------------------------------------- the same numbers, every time


def train(variant: str, threads: int | None = None, config: ModelConfig = GQA) -> list[Any]:
    """Return every bit of a short training: losses, gradients, weights and moments."""
    results: list[Any] = []
    with make_engine(config, variant, threads=threads) as engine:
        for number, length in enumerate((70, 33, 65, 1, 64, 70)):
            results.append(engine.step(*sequence(config, length, number)).loss)
            if number % 2:
                results.append(bits(engine.gradients))
                results.append(engine.update(lr=1e-2, grad_clip=1.0, weight_decay=0.1).grad_norm)
        results += [bits(engine.model.weights), bits(engine.adam_m), bits(engine.adam_v)]
        results.append(engine.logits(sequence(config, 50)[0]).tobytes())
    return results


@pytest.mark.parametrize("variant", ["baseline", "opt"])
def test_training_twice_is_bit_identical(variant: str) -> None:
    assert train(variant) == train(variant)


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
@pytest.mark.parametrize("variant", ["baseline", "opt"])
def test_training_does_not_depend_on_the_threads(variant: str, config: ModelConfig) -> None:
    one = train(variant, 1, config)
    for threads in (2, 3, 5):
        assert train(variant, threads, config) == one, f"{threads} threads"


@pytest.mark.parametrize("switch", MEMORY_SWITCHES)
def test_switch_that_only_moves_memory_changes_no_bit(switch: str) -> None:
    assert train(f"baseline+{switch}") == train("baseline")
    assert train(f"opt-{switch}") == train("opt")


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


# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("variant", "allocates"),
    [("baseline", True), ("baseline+prealloc", False), ("opt", False), ("max", False)],
)
def test_step_heap_operations(variant: str, allocates: bool) -> None:
    with make_engine(GQA, variant) as engine:
        counts = [engine.step(*sequence(GQA, length)).allocations for length in (129, 5, 129)]
    assert len(set(counts)) == 1, counts
    assert (counts[0] > 0) is allocates


def test_step_heap_operations_fall_with_each_saving_switch() -> None:
    counts = []
    for variant in ("baseline", "baseline+fp16_cache", "baseline+prealloc"):
        with make_engine(GQA, variant) as engine:
            counts.append(engine.step(*sequence(GQA, 60)).allocations)
    assert counts[0] > counts[1] >= counts[2] == 0
    # Four products a layer; each reads one factor or both back from surfaces.
    assert 4 * GQA.n_layers <= counts[0] <= 8 * GQA.n_layers


@pytest.mark.parametrize("variant", ["baseline", "opt"])
@pytest.mark.parametrize("threads", [1, 2])
def test_step_phases_are_parts_of_the_step(variant: str, threads: int) -> None:
    phases = (
        "device_ms",
        "io_ms",
        "classifier_ms",
        "softmax_ms",
        "norm_ms",
        "elementwise_ms",
        "dw_wait_ms",
    )
    with make_engine(GQA, variant, threads=threads) as engine:
        for length in (129, 1, 64):
            stats = engine.step(*sequence(GQA, length))
            times = {name: getattr(stats, name) for name in phases}
            assert all(ms >= 0 for ms in times.values()), times
            assert all(times[n] > 0 for n in ("device_ms", "classifier_ms", "softmax_ms")), times
            assert sum(times.values()) <= stats.step_ms * 1.05 + 1, times
            # Busy time is summed over the threads.
            assert 0 < stats.dw_ms <= threads * stats.step_ms * 1.05 + 1
            assert stats.tflops == pytest.approx(stats.flops / stats.step_ms / 1e9)


def flops(c: ModelConfig, n: int) -> float:
    """Count as the research programs do (ane-facts.md 7.1), K/V heads as they are."""
    d, h, kv = c.dim, c.hidden_dim, c.head_dim * c.n_kv_heads
    forward = c.n_layers * n * (2 * 2 * d * d + 2 * 2 * d * kv + 3 * 2 * d * h)
    attention = c.n_layers * 2 * c.n_heads * 5 * n * n * c.head_dim
    return 3 * forward + attention + 3 * 2 * c.vocab_size * d * n


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
def test_step_flops_follow_the_formula(config: ModelConfig) -> None:
    assert round(flops(PRESETS["stories110M"], 256) / 1e6) == 174_248
    with make_engine(config) as engine:
        for length in (1, 33, 70):
            assert engine.step(*sequence(config, length)).flops == flops(config, length)


def test_step_of_fp32_is_never_scaled_or_skipped() -> None:
    with make_engine() as engine:
        stats = engine.step(*sequence(GQA, 10))
    assert isinstance(stats, StepStats)
    assert (stats.loss_scale, stats.skipped) == (1.0, False)


def test_step_of_nan_weights_has_a_nan_loss() -> None:
    with make_engine() as engine:
        engine.model.weights["layers.0.attention.wq.weight"][0, 0] = math.nan
        assert math.isnan(engine.step(*sequence(GQA, 40)).loss)
        assert math.isnan(engine.evaluate(*sequence(GQA, 40)))


# ------------------------------------------------------------------------- variants and devices


OPT = ("simd_adam", "fp16_cache", "prealloc", "concurrent_dw", "skip_dead_reads", "vector_embed")


@pytest.mark.parametrize(
    ("variant", "switches"),
    [
        ("baseline", ()),
        ("opt", OPT),
        ("max", OPT),
        ("baseline+simd_adam", ("simd_adam",)),
        ("baseline+vector_embed+prealloc", ("prealloc", "vector_embed")),
        ("opt-fp16_cache", tuple(s for s in OPT if s != "fp16_cache")),
        ("opt-fp16_cache+fp16_cache", OPT),
        ("opt+fp16_cache-fp16_cache", tuple(s for s in OPT if s != "fp16_cache")),
        ("opt+simd_adam", OPT),
        ("baseline-simd_adam", ()),
        ("max-offload_softmax", OPT),
        ("double-buffer-background_compile", ()),
    ],
)
def test_variant_stands_for_its_switches(variant: str, switches: tuple[str, ...]) -> None:
    with make_engine(GQA, variant) as engine:
        assert set(engine.switches) == set(switches) and engine.variant == variant
        assert engine.step([1, 2], [2, 3]).loss > 0


@pytest.mark.parametrize("text", ["", "Opt", " opt", "opt ", "optimal", "opt,ane", "x" * 5000])
def test_variant_unknown_name_lists_the_known(text: str) -> None:
    said = message(lambda: make_engine(GQA, text))
    assert "unknown variant" in said and "baseline, opt, ane, dynamic, double-buffer, max" in said


@pytest.mark.parametrize(
    "text", ["opt+", "opt-", "opt++prealloc", "opt+Prealloc", "opt+opt", "opt+no", "baseline-max"]
)
def test_variant_unknown_switch_lists_the_known(text: str) -> None:
    said = message(lambda: make_engine(GQA, text))
    assert "unknown switch" in said and all(switch in said for switch in OPT)


@pytest.mark.parametrize(
    ("text", "switch"),
    [
        ("ane", "offload_rmsnorm"),
        ("dynamic", "dynamic_weights"),
        ("double-buffer", "background_compile"),
        ("opt+metal_dw", "metal_dw"),
        ("max+offload_softmax", "offload_softmax"),
    ],
)
def test_variant_without_meaning_on_the_cpu_is_refused(text: str, switch: str) -> None:
    said = message(lambda: make_engine(GQA, text))
    assert f"'{text}'" in said and f"switch {switch} means nothing on device cpu" in said


@pytest.mark.parametrize("option", ["variant", "device", "precision"])
@pytest.mark.parametrize("text", ["a\nb", "opt\0x", "cpu\0", "fp32\0", "\udcff", "é" * 300])
def test_names_with_odd_characters_are_refused_in_one_line(option: str, text: str) -> None:
    r"""`opt\0x` was taken for `opt`; an undecodable argument was a UnicodeEncodeError."""
    assert f"unknown {option}" in message(lambda: Engine(Model(GQA), **{option: text}))


def test_variants_lists_what_works_here() -> None:
    found = variants("cpu")
    assert found["baseline"] == () and set(found["opt"]) == set(OPT)
    assert "ane" not in found and "dynamic" not in found
    for name in found:
        make_engine(GQA, name).close()


def test_device_ane_says_why_not() -> None:
    usable = {device.name: device.usable for device in devices()}
    if usable["ane"]:
        pytest.skip("this machine has an Apple Neural Engine")
    said = message(lambda: Engine(Model(GQA), device="ane"))
    assert "device ane" in said and "--device cpu" in said
    assert said == {device.name: device.reason for device in devices()}["ane"]


def test_device_unknown_lists_the_known() -> None:
    for name in ("tpu", "", "CPU", "cpu "):
        said = message(lambda name=name: Engine(Model(GQA), device=name))  # type: ignore[misc]
        assert f"unknown device '{name}'" in said and "auto" in said and "cpu" in said


def test_device_cpu_is_usable_and_described() -> None:
    cpu = {device.name: device for device in devices()}["cpu"]
    assert cpu.usable and cpu.reason
    with Engine(Model(GQA), device="cpu", precision="fp32") as engine:
        assert (engine.device, engine.precision) == ("cpu", "fp32")
        assert engine.isa == library_info()["isa"] in library_info()["isa_available"]


def test_device_auto_is_one_that_works() -> None:
    with Engine(Model(GQA)) as engine:
        assert {device.name: device.usable for device in devices()}[engine.device]
        assert engine.precision in ("fp32", "bf16", "fp16")
        assert engine.step([1, 2], [2, 3]).loss > 0


def test_precision_unknown_or_not_of_the_device() -> None:
    said = message(lambda: Engine(Model(GQA), device="cpu", precision="int8"))
    assert "unknown precision 'int8'" in said and "auto, fp32, bf16, fp16" in said
    said = message(lambda: Engine(Model(GQA), device="cpu", precision="fp16"))
    assert "fp16 is not available on device cpu" in said


# ------------------------------------------------------------------------------------- settings


def test_seq_len_defaults_to_the_model_and_limits_sequences() -> None:
    with make_engine() as engine:
        assert engine.seq_len == GQA.seq_len
    with make_engine(seq_len=9) as engine:
        assert engine.seq_len == 9
        assert engine.step(*sequence(GQA, 9)).loss > 0
        for call in (engine.step, engine.evaluate):
            said = message(lambda call=call: call(*sequence(GQA, 10)))  # type: ignore[misc]
            assert "a sequence of 10 tokens, this engine takes 1 to 9" in said
        message(lambda: engine.logits(sequence(GQA, 10)[0]))
    for bad in (0, -1, GQA.seq_len + 1, 2**31, 2**32 + 5):
        assert str(bad) in message(lambda bad=bad: make_engine(seq_len=bad))  # type: ignore[misc]


def test_threads_default_is_the_library_s_and_limits_hold() -> None:
    with make_engine() as engine:
        assert engine.threads == library_info()["threads"] >= 1
    with make_engine(threads=3) as engine:
        assert engine.threads == 3
    for bad in (0, -2, 257, 2**31, 2**32 + 1):
        assert str(bad) in message(lambda bad=bad: make_engine(threads=bad))  # type: ignore[misc]


def test_more_threads_than_work_is_fine() -> None:
    config = ModelConfig(2, 1, 1, 1, 1, 1, 1)
    with Engine(Model.init(config), "baseline", "cpu", threads=64) as engine:
        assert engine.step([0], [0]).loss == 0.0
        engine.update(lr=0.1, grad_clip=1.0)
        assert engine.evaluate([0], [0]) == 0.0


# --------------------------------------------------------------------------------------- tokens


BAD_TOKENS: dict[str, tuple[Any, str]] = {
    "beyond": ([1, 523, 2], "[1] is 523, the vocabulary has 0 to 522"),
    "negative": ([1, 2, -1], "[2] is -1"),
    "far": ([1, 2**31, 2], "2147483648"),
    "far-negative": ([1, 5, -(2**31) - 1], "-2147483649"),
    "huge": (np.array([1, 2, 2**64 - 1], np.uint64), "18446744073709551615"),
    "too-huge": ([1, 2, 2**70], "expected integers"),
    "floats": ([1.0, 2.0, 3.0], "float64, expected integers"),
    "booleans": ([True, False, True], "bool, expected integers"),
    "strings": (["1", "2", "3"], "expected integers"),
    "text": ("Once", "expected integers"),
    "none": (None, "expected integers"),
    "one-number": (5, "shape ()"),
    "empty": ([], "shape (0,)"),
    "empty-integers": (np.zeros(0, np.int32), "shape (0,)"),
    "rows": ([[1, 2, 3]], "shape (1, 3)"),
    "columns": (np.ones((3, 1), np.int32), "shape (3, 1)"),
    "ragged": ([[1], [1, 2]], "expected integers"),
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
def test_bad_tokens_are_refused_and_change_nothing(kind: str) -> None:
    """Ragged lists were a ValueError; the message on 2^31 named the wrong end."""
    bad, says = BAD_TOKENS[kind]
    good = np.array([1, 2, 3])
    with make_engine() as engine:
        for call in (
            lambda: engine.step(bad, good),
            lambda: engine.step(good, bad),
            lambda: engine.evaluate(bad, good),
            lambda: engine.evaluate(good, bad),
            lambda: engine.logits(bad),
        ):
            assert says in message(call)
        assert engine.accumulated == 0
        assert not any(gradient.any() for gradient in engine.gradients.values())


def test_tokens_and_targets_of_different_length() -> None:
    with make_engine() as engine:
        assert "3 tokens but 2 targets" in message(lambda: engine.step([1, 2, 3], [1, 2]))
        assert "1 tokens but 2 targets" in message(lambda: engine.evaluate([1], [1, 2]))


def test_tokens_of_every_integer_kind_are_the_same() -> None:
    ids = [1, 200, 3, 4]
    wide = np.repeat(np.array(ids, np.uint16), 2)
    kinds: list[Any] = [ids, tuple(ids), np.array(ids, np.int64), np.array(ids, np.uint16)]
    kinds += [np.array(ids, np.uint32), np.array(ids, np.uint8), np.array(ids, ">i4")]
    kinds += [np.array(ids, np.uint64), wide[::2], np.array(ids[::-1])[::-1]]
    kinds += [np.array(ids, np.int16).astype("<i2"), range(1, 5)]
    with make_engine() as engine:
        expected = engine.logits(np.array(ids, np.int32))
        for kind in kinds[:-1]:
            assert engine.logits(kind).tobytes() == expected.tobytes(), repr(kind)
        assert engine.logits(kinds[-1]).tobytes() == engine.logits([1, 2, 3, 4]).tobytes()


def test_tokens_may_be_read_only_and_are_not_changed() -> None:
    ids = np.arange(5, dtype=np.int32)
    ids.flags.writeable = False
    with make_engine() as engine:
        engine.step(ids, ids)
    assert ids.tolist() == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------------ life cycle


def test_close_twice_then_every_use_is_refused() -> None:
    engine = make_engine()
    gradients = engine.gradients
    engine.step([1, 2], [2, 3])
    engine.close()
    engine.close()
    for call in (
        lambda: engine.step([1], [1]),
        lambda: engine.update(1e-3),
        lambda: engine.logits([1]),
        lambda: engine.evaluate([1], [1]),
        lambda: engine.restore(0, 0),
        lambda: engine.accumulated,
        lambda: engine.updates,
    ):
        assert "this Engine was closed" in message(call, ClosedError)
    assert gradients is engine.gradients and gradients["norm.weight"].any()
    assert engine.seq_len == GQA.seq_len


def test_context_manager_closes_even_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="mine"), make_engine() as engine:
        raise RuntimeError("mine")
    message(lambda: engine.step([1], [1]), ClosedError)
    assert engine.__enter__() is engine


def mapped() -> int:
    """Return the bytes of address space in use."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc to know the memory in use")
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


LARGE = ModelConfig(64, 172, 1, 8, 4, 1 << 18, 16)  # 16 M parameters: 64 MiB an arena
ARENA = 64 << 20


def test_views_outlive_engine_and_model() -> None:
    before = mapped()
    engine = Engine(Model(LARGE), device="cpu")
    engine.step([1, 2], [2, 3])
    view = engine.gradients["norm.weight"]
    expected = np.array(view)
    assert mapped() - before > 4 * ARENA
    engine.close()
    forgotten = weakref.ref(engine)
    del engine
    gc.collect()
    assert forgotten() is None
    others = [Engine(Model(GQA)) for _ in range(5)]  # would reuse freed memory
    np.testing.assert_array_equal(view, expected)
    view += 1.0
    del others
    gc.collect()
    assert ARENA * 0.9 < mapped() - before < 2 * ARENA, "one arena of four is still in use"
    del view
    gc.collect()
    assert mapped() - before < ARENA * 0.5


def test_forgotten_engine_is_freed_with_its_threads() -> None:
    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before_memory, before_threads = mapped(), threads()
    for _ in range(10):
        engine = Engine(Model(LARGE), device="cpu", threads=4)
        engine.step([1], [1])
        assert threads() == before_threads + 3
        del engine
        gc.collect()
        assert threads() == before_threads
    assert mapped() - before_memory < ARENA * 0.5


def test_engine_that_cannot_be_made_keeps_nothing() -> None:
    before = mapped()
    for _ in range(5):
        message(lambda: Engine(Model(LARGE), "nonsense"))
        message(lambda: Engine(Model(LARGE), device="cpu", threads=1000))
    gc.collect()
    assert mapped() - before < ARENA * 0.5


def test_two_engines_share_the_model_and_nothing_else() -> None:
    model = make_model()
    with Engine(model, "opt", "cpu", "fp32") as a, Engine(model, "baseline", "cpu", "fp32") as b:
        a.step(*sequence(GQA, 30))
        assert b.accumulated == 0 and not b.gradients["norm.weight"].any()
        loss = b.evaluate(*sequence(GQA, 30))
        a.update(lr=1e-2)
        assert b.evaluate(*sequence(GQA, 30)) < loss, "b does not see the new weights"
        a.close()
        assert b.step(*sequence(GQA, 30)).loss < loss


def test_weights_written_between_steps_are_used() -> None:
    with make_engine() as engine:
        tokens, targets = sequence(GQA, 20)
        before = engine.evaluate(tokens, targets)
        engine.model.weights["norm.weight"][...] *= 1.5
        expected, _ = ref.cross_entropy(
            ref.forward(engine.model.weights, GQA, tokens), targets
        )
        assert engine.evaluate(tokens, targets) == pytest.approx(expected, rel=1e-6) != before


def test_gradients_and_moments_are_writable_named_views() -> None:
    with make_engine() as engine:
        for arrays in (engine.gradients, engine.adam_m, engine.adam_v):
            assert {n: a.shape for n, a in arrays.items()} == ref.tensor_shapes(GQA)
            assert all(a.dtype == np.float32 and a.flags.writeable for a in arrays.values())
            assert not any(a.any() for a in arrays.values())
            with pytest.raises(TypeError):
                arrays["x"] = np.zeros(1)  # type: ignore[index]


@pytest.mark.parametrize("kind", [Engine, Decoder])
def test_handles_are_neither_copied_nor_pickled(kind: type[Engine | Decoder]) -> None:
    """A copy shared the handle: closing one made the other a wild pointer."""
    with kind(make_model()) as owner:
        for call in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=kind.__name__):
                call(owner)


# --------------------------------------------------------------------------------------- threads


BUSY = ModelConfig(256, 1024, 3, 4, 4, 4000, 256)


def run_until(engine: Engine, stop: threading.Event, failures: list[BaseException]) -> None:
    tokens, targets = sequence(BUSY, 256)
    try:
        while not stop.is_set():
            engine.step(tokens, targets)
    except BaseException as error:
        failures.append(error)


def test_second_thread_is_told_that_the_engine_is_busy() -> None:
    stop, failures = threading.Event(), []
    with Engine(Model.init(BUSY), device="cpu") as engine:
        thread = threading.Thread(target=run_until, args=(engine, stop, failures))
        thread.start()
        try:
            for call in (
                lambda: engine.evaluate([1], [1]),
                lambda: engine.logits([1]),
                lambda: engine.step([1], [1]),
                lambda: engine.update(1e-3),
            ):
                for _ in range(10_000):
                    try:
                        call()
                    except NativeError as error:
                        if error.name == "busy":
                            break
                        assert error.name == "state"  # an update right after another
                else:
                    pytest.fail("never busy")
                assert error.code == -30 and "another thread" in str(error)
            assert engine.seq_len == 256 and engine.accumulated >= 0
        finally:
            stop.set()
            thread.join()
        # The stepping thread may have met one of the short calls above.
        assert all(isinstance(e, NativeError) and e.name == "busy" for e in failures)
        assert engine.step([1], [1]).loss > 0


def test_close_during_a_step_waits_for_it() -> None:
    """It freed the memory the step was working in and brought the process down."""
    for _ in range(5):
        failures: list[BaseException] = []
        engine = Engine(Model.init(BUSY), device="cpu")
        thread = threading.Thread(target=run_until, args=(engine, threading.Event(), failures))
        thread.start()
        while engine.accumulated == 0:
            pass
        engine.close()
        thread.join()
        assert [type(error) for error in failures] == [ClosedError]


def test_decoder_in_two_threads_is_busy_or_right() -> None:
    """Two callers mixed their activations."""
    model = Model.init(BUSY)
    wrong: list[object] = []
    with Decoder(model) as decoder:
        expected = decoder.forward(7, 0).copy()

        def work() -> None:
            for _ in range(200):
                try:
                    logits = decoder.forward(7, 0)
                except NativeError as error:
                    if error.name != "busy":
                        wrong.append(error)
                else:
                    if logits.tobytes() != expected.tobytes():
                        wrong.append("logits")

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert decoder.forward(7, 0).tobytes() == expected.tobytes()


# --------------------------------------------------------------------------------------- decoder


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
@pytest.mark.parametrize("threads", [1, 3])
def test_decoder_logits_are_those_of_the_engine(config: ModelConfig, threads: int) -> None:
    tokens, _ = sequence(config, 70)
    with make_engine(config) as engine, Decoder(engine.model, threads=threads) as decoder:
        expected = engine.logits(tokens)
        for position, token in enumerate(tokens):
            logits = decoder.forward(int(token), position)
            assert logits.shape == (config.vocab_size,) and logits.dtype == np.float32
            assert relative_error(logits, expected[position]) < tolerances.FP32_LOGITS, position


def test_decoder_does_not_depend_on_the_threads() -> None:
    results = []
    for threads in (1, 2, 5):
        with Decoder(make_model(), threads=threads) as decoder:
            results.append([decoder.forward(t, p).tobytes() for p, t in enumerate((5, 9, 2, 7))])
    assert results[0] == results[1] == results[2]


def test_decoder_position_zero_starts_anew() -> None:
    with Decoder(make_model()) as decoder:
        first = [decoder.forward(t, p).copy() for p, t in enumerate((5, 9, 2))]
        other = [decoder.forward(t, p).copy() for p, t in enumerate((1, 9, 2))]
        again = [decoder.forward(t, p).copy() for p, t in enumerate((5, 9, 2))]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert (first[2] != other[2]).any()


def test_decoder_wrong_positions_are_refused_and_harmless() -> None:
    with Decoder(make_model(), max_len=4) as decoder:
        for position in (1, -1, 3, 2**32, 2**40):
            message(lambda p=position: decoder.forward(1, p), AnepyError)  # type: ignore[misc]
        for token in (523, -1, 2**32 + 1):
            said = message(lambda t=token: decoder.forward(t, 0))  # type: ignore[misc]
            assert str(token) in said
        expected = [decoder.forward(t, p).copy() for p, t in enumerate((5, 9, 2))]
        for position in (1, 2, 4, 5, -1, 2**32, 2**32 + 3):
            message(lambda p=position: decoder.forward(1, p), AnepyError)  # type: ignore[misc]
        decoder.forward(7, 3)
        assert "room for 4" in message(lambda: decoder.forward(7, 4))
        again = [decoder.forward(t, p).copy() for p, t in enumerate((5, 9, 2))]
    assert all((a == b).all() for a, b in zip(expected, again, strict=True))


def test_decoder_sees_weights_that_change() -> None:
    model = make_model()
    with Decoder(model) as decoder:
        before = decoder.forward(3, 0).copy()
        model.weights["norm.weight"][...] *= 2.0
        np.testing.assert_allclose(decoder.forward(3, 0), before * 2.0, rtol=1e-6)


@pytest.mark.parametrize("bad", [-1, GQA.seq_len + 1, 2**31, 2**32 + 5])
def test_decoder_impossible_length_is_refused(bad: int) -> None:
    """2^32 + 5 positions were taken for 5."""
    assert str(bad) in message(lambda: Decoder(make_model(), max_len=bad))


@pytest.mark.parametrize("bad", [-1, 257, 2**32 + 1])
def test_decoder_impossible_threads_are_refused(bad: int) -> None:
    assert str(bad) in message(lambda: Decoder(make_model(), threads=bad))


def test_decoder_closed_is_refused() -> None:
    decoder = Decoder(make_model())
    decoder.close()
    decoder.close()
    assert "this Decoder was closed" in message(lambda: decoder.forward(1, 0), ClosedError)


# ------------------------------------------------------------------------------------ the library


def test_library_info_is_consistent() -> None:
    info = library_info()
    assert info["isa"] in info["isa_available"] and info["isa_available"][-1] == "scalar"
    assert info["gemm"].endswith(info["isa"]) and info["compiler"].split()[0] in ("gcc", "clang")
    assert 1 <= info["cores"] and 1 <= info["threads"] <= 256
    assert engine_module._abi.ABI_VERSION == info["abi"]
