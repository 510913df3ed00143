"""Engines that train as one: gradients changed in place between steps and update."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import needs
import numpy as np
import pytest
import tolerances
from cases import BIASES, BUSY, GQA, NORMS, SEPARATE, bits, make_model, message

from anepy.engine.engine import Engine
from anepy.errors import ClosedError, ConfigError, NativeError
from anepy.models.model import ModelConfig

UPDATE = {"lr": 1e-3, "weight_decay": 0.1}


def batch(config: ModelConfig, count: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw sequences with very different numbers of counted targets, none of some."""
    rng = np.random.default_rng((seed, count, length))
    tokens, targets = rng.integers(0, config.vocab_size, (2, count, length))
    share = np.resize([0.02, 1.0, 0.5, 0.0, 0.1], (count, 1))
    masked = rng.random((count, length)) >= share
    masked[:, -1] &= share[:, 0] == 0.0
    targets[masked] = -100
    return tokens, targets


@contextmanager
def ranks(n: int, config: ModelConfig, *args: str, **options: object) -> Iterator[list[Engine]]:
    """Open engines on equal models."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(Engine(make_model(config), *args, threads=1 + i % 2, **options))  # type: ignore[arg-type]
            for i in range(n)
        ]


def reduce_all(engines: list[Engine]) -> None:
    """Sum the gradients of all engines, as an MPI of one process would."""
    counted = sum(engine.counted for engine in engines)
    scale = min(engine.gradient_scale for engine in engines)
    lent: list[list[np.ndarray]] = []
    for engine in engines:
        lent.append([])
        engine.reduce(lent[-1].append, counted, scale)
    for buckets in zip(*lent, strict=True):
        total = np.sum(buckets, axis=0, dtype=np.float64)
        for bucket in buckets:
            bucket[...] = total
    assert {engine.counted for engine in engines} == {counted}
    assert np.allclose([engine.gradient_scale for engine in engines], scale, rtol=1e-12)


def weights(engine: Engine) -> dict[str, np.ndarray]:
    return {name: values.copy() for name, values in engine.model.weights.items()}


def off(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Return the largest difference of a tensor, as a share of its largest value."""
    return max(
        float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max())
        for name in wanted
    )


# ------------------------------------------------------------------------- N engines, or one


@pytest.mark.parametrize("grad_clip", [None, 0.05])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "config", [GQA, SEPARATE, BIASES, NORMS], ids=["gqa", "separate", "biases", "norms"]
)
def test_engines_with_a_part_each_are_one_engine_with_all(
    config: ModelConfig, precision: str, grad_clip: float | None
) -> None:
    needs.precision(precision)
    # In bf16 the gradients of the logits are rounded when they have their factor.
    bar = 2e-6 if precision == "fp32" else 0.03
    rows = [(0, 1), (1, 3), (3, 8)]  # of the sequences; the first rank counts two targets
    with (
        Engine(make_model(config), "max", "cpu", precision, threads=1) as one,
        ranks(3, config, "max", "cpu", precision) as engines,
    ):
        for update in range(3):
            tokens, targets = batch(config, 8, 40, update)
            for first, end in rows:
                wanted = one.step(tokens[first:end], targets[first:end])
                engine = engines[rows.index((first, end))]
                found = engine.step(tokens[first:end], targets[first:end])
                assert found.loss == pytest.approx(wanted.loss, rel=1e-12)
                assert found.tokens == wanted.tokens
            reduce_all(engines)
            scale = engines[0].gradient_scale
            gradients = {
                name: values * (scale / one.gradient_scale)
                for name, values in one.gradients.items()
            }
            for engine in engines:
                assert off(dict(engine.gradients), gradients) < bar
            norm = one.update(**UPDATE, grad_clip=grad_clip or 1e9).grad_norm
            for engine in engines:
                stats = engine.update(**UPDATE, grad_clip=grad_clip)
                assert stats.grad_norm == pytest.approx(norm, rel=bar) and not stats.skipped
                assert engine.updates == one.updates and engine.counted == 0
            assert grad_clip is None or norm > grad_clip
            for engine in engines[1:]:
                assert off(weights(engine), weights(engines[0])) == 0
            for name, values in one.model.weights.items():
                # Adam divides by the size of a gradient: rounding shows where that is tiny.
                distance = np.abs(values - engines[0].model.weights[name]).mean()
                assert distance < UPDATE["lr"] * 1e-3 or precision == "bf16", name
                for engine in engines:
                    engine.model.weights[name] = values
                    engine.adam_m[name], engine.adam_v[name] = one.adam_m[name], one.adam_v[name]


def test_ranks_that_add_bucket_by_bucket_are_one() -> None:
    """Each in a thread of its own, as ranks of MPI are in processes: all meet at every bucket."""
    tokens, targets = batch(NORMS, 9, 40, 1)
    targets[:, -1] = 1  # a step without any is refused
    shared: dict[int, np.ndarray] = {}
    meet = threading.Barrier(3, timeout=20)

    def allreduce(rank: int, value: np.ndarray) -> np.ndarray:
        shared[rank] = value
        meet.wait()
        total = shared[0] + shared[1] + shared[2]
        meet.wait()
        return total

    def run(rank: int, engine: Engine) -> None:
        for first in (0, 3, 6):
            at = slice(first + rank, first + rank + 1)
            engine.step(tokens[at], targets[at])
            counted = allreduce(rank, np.int64(engine.counted))
            scale = 1 / allreduce(rank, np.float64(1 / engine.gradient_scale))

            def add(bucket: np.ndarray) -> None:
                bucket[...] = allreduce(rank, bucket.copy())

            engine.reduce(add, counted, np.float32(scale))
            engine.update(lr=1e-3)

    with (
        Engine(make_model(NORMS), "max", "cpu", "fp32") as one,
        ranks(3, NORMS, "max", "cpu", "fp32") as engines,
    ):
        threads = [threading.Thread(target=run, args=each) for each in enumerate(engines)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for first in (0, 3, 6):
            tokens_of, targets_of = tokens[first : first + 3], targets[first : first + 3]
            one.step(tokens_of, targets_of)
            one.update(lr=1e-3)
        for engine in engines:
            assert engine.updates == 3
            assert bits(engine.model.weights) == bits(engines[0].model.weights)
        for name, values in one.model.weights.items():
            distance = np.abs(values - engines[0].model.weights[name]).mean()
            assert distance < 3e-3 * 0.01, name  # of three steps of Adam at most


@pytest.mark.parametrize(
    ("freeze", "buckets"),
    [
        ("tok_embeddings*", 3),
        (("tok_embeddings*", "layers.1.*"), 2),
        (("layers.0.*", "norm.weight", "output*", "*.w2.weight"), 2),
        (("layers.*", "tok_embeddings*"), 1),
    ],
)
def test_buckets_are_of_what_is_trained(freeze: str | tuple[str, ...], buckets: int) -> None:
    tokens, targets = batch(SEPARATE, 8, 40, 1)
    with (
        Engine(make_model(SEPARATE), "max", "cpu", "fp32", freeze=freeze) as one,
        ranks(2, SEPARATE, "max", "cpu", "fp32", freeze=freeze) as engines,
    ):
        for first, end, engine in ((0, 1, engines[0]), (1, 8, engines[1])):
            one.step(tokens[first:end], targets[first:end])
            engine.step(tokens[first:end], targets[first:end])
        lent: list[np.ndarray] = []
        one.reduce(lent.append)
        assert len(lent) == one.ready.buckets == buckets
        assert sum(map(len, lent)) == sum(g.size for g in one.gradients.values())
        reduce_all(engines)
        factor = engines[0].gradient_scale / one.gradient_scale
        wanted = {name: values * factor for name, values in one.gradients.items()}
        norm = one.update(lr=1e-3).grad_norm
        for engine in engines:
            assert off(dict(engine.gradients), wanted) < 2e-6
            assert engine.update(lr=1e-3).grad_norm == pytest.approx(norm, rel=2e-6)


@pytest.mark.parametrize("variant", ["opt", "max"])
def test_engines_on_the_simulator_are_one(variant: str) -> None:
    tokens, targets = batch(GQA, 6, 40, 1)
    with (
        Engine(make_model(GQA), variant, "sim", seq_len=64) as one,
        ranks(2, GQA, variant, "sim", seq_len=64) as engines,
    ):
        for first, end, engine in ((0, 1, engines[0]), (1, 6, engines[1])):
            one.step(tokens[first:end], targets[first:end])
            assert not engine.step(tokens[first:end], targets[first:end]).skipped
        reduce_all(engines)
        wanted = {
            n: g * (engines[0].gradient_scale / one.gradient_scale)
            for n, g in one.gradients.items()
        }
        norm = one.update(lr=1e-3).grad_norm
        for engine in engines:
            tolerances.assert_tensors_close(dict(engine.gradients), wanted, 2e-2)
            assert engine.update(lr=1e-3).grad_norm == pytest.approx(norm, rel=2e-3)


def test_engine_that_overflows_makes_all_skip_and_lower_their_scale() -> None:
    tokens, targets = batch(GQA, 4, 40, 1)
    with ranks(3, GQA, "opt", "sim", seq_len=64) as engines:
        before = weights(engines[0])
        engines[1].restore(0, 0, loss_scale=2.0**40)
        skipped = [engine.step(tokens, targets).skipped for engine in engines]
        assert skipped == [False, True, False] and engines[1].counted == 0
        reduce_all(engines)
        for engine in engines:
            assert engine.update(lr=1e-3).skipped and engine.updates == engine.counted == 0
            assert off(weights(engine), before) == 0
        # It follows the scale of the others, so the next update is one of all.
        assert engines[1].loss_scale == pytest.approx(engines[0].loss_scale)
        for engine in engines:
            assert not engine.step(tokens, targets).skipped
        reduce_all(engines)
        assert not any(engine.update(lr=1e-3).skipped for engine in engines)


def test_engine_with_a_lower_scale_lowers_that_of_all() -> None:
    """And all count from there to the next rise, so that they raise it after the same update."""
    tokens, targets = batch(GQA, 4, 40, 1)
    with ranks(2, GQA, "opt", "sim", seq_len=64) as engines:
        scales = []
        for round in range(3):
            for engine in engines:
                assert not engine.step(tokens, targets).skipped
            if round == 1:
                other = engines[1]
                other.restore(0, 1, other.loss_scale / 4, 1, unit=other.unit)
                other.step(tokens, targets)
            before = [engine.gradient_scale for engine in engines]
            reduce_all(engines)
            clean = [engine.clean_steps for engine in engines]
            assert clean == [[1, 1], [0, 0], [1, 1]][round]
            assert before[0] / before[1] == (4.0 if round == 1 else 1.0)
            assert not any(engine.update(lr=1e-3).skipped for engine in engines)
            assert engines[0].loss_scale == engines[1].loss_scale
            scales.append(engines[0].loss_scale)
        assert scales == [scales[0], scales[0] / 4, scales[0] / 4]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_make_all_skip_without_clipping(bad: float) -> None:
    tokens, targets = batch(GQA, 2, 40, 1)
    with ranks(2, GQA, "max", "cpu", "fp32") as engines:
        before = weights(engines[0])
        engines[1].model.weights["layers.1.attention.wv.weight"][0, 0] = bad
        for engine in engines:
            engine.step(tokens, targets)
        engines[1].model.weights["layers.1.attention.wv.weight"][...] = before[
            "layers.1.attention.wv.weight"
        ]
        reduce_all(engines)
        for engine in engines:
            assert engine.update(lr=1e-3).skipped
            assert off(weights(engine), before) == 0
            engine.step(tokens, targets)  # and goes on
            assert not engine.update(lr=1e-3).skipped


# ----------------------------------------------------------------------------- one engine alone


def test_buckets_are_all_gradients_from_the_last_layer_down() -> None:
    for config in (GQA, SEPARATE, NORMS):
        with Engine(make_model(config), "max", "cpu", "fp32") as engine:
            engine.step(*batch(config, 2, 40, 1))
            names = list(engine.gradients)
            buckets: list[np.ndarray] = []
            engine.reduce(buckets.append)
            assert len(buckets) == config.n_layers + 2 == engine.ready.buckets
            for bucket in buckets:
                assert bucket.flags.c_contiguous and bucket.flags.writeable and bucket.ndim == 1
            assert sum(map(len, buckets)) == sum(g.size for g in engine.gradients.values())
            embedding = engine.gradients[names[0]]
            assert np.shares_memory(buckets[-1], embedding) and len(buckets[-1]) == embedding.size
            for layer in range(config.n_layers):
                bucket = buckets[config.n_layers - layer]
                for name in names:
                    inside = np.shares_memory(bucket, engine.gradients[name])
                    assert inside == name.startswith(f"layers.{layer}.")
            for name in ("norm.weight", "output.weight"):
                assert name not in names or np.shares_memory(buckets[0], engine.gradients[name])


@pytest.mark.parametrize("keep", [False, True])
def test_update_clips_by_the_norm_of_what_the_function_left(keep: bool) -> None:
    """Also after updates that made steps note the squares of their gradients."""
    tokens, targets = batch(GQA, 2, 40, 1)
    kept = []
    with Engine(make_model(GQA), "max", "cpu", "fp32") as engine:

        def triple(bucket: np.ndarray) -> None:
            bucket *= 3.0
            kept.append(bucket if keep else None)

        for _ in range(3):
            engine.step(tokens, targets)
            engine.update(lr=0.0, grad_clip=1e-3)
        engine.step(tokens, targets)
        norm = np.sqrt(sum(float((g.astype(float) ** 2).sum()) for g in engine.gradients.values()))
        engine.reduce(triple)
        stats = engine.update(lr=0.0, grad_clip=1e-3)
        assert stats.grad_norm == pytest.approx(3 * norm, rel=1e-6)
        engine.step(tokens, targets)
        assert engine.update(lr=0.0, grad_clip=1e-3).grad_norm == pytest.approx(norm, rel=1e-6)


def test_function_that_raises_leaves_an_engine_without_gradients() -> None:
    tokens, targets = batch(GQA, 2, 40, 1)
    with (
        Engine(make_model(GQA), "max", "cpu", "fp32") as engine,
        Engine(make_model(GQA), "max", "cpu", "fp32") as fresh,
    ):
        engine.step(tokens, targets)

        def fail(bucket: np.ndarray) -> None:
            bucket[...] = np.nan
            raise KeyError("network")

        with pytest.raises(KeyError, match="network"):
            engine.reduce(fail)
        assert engine.accumulated == engine.counted == 0
        assert not any(values.any() for values in engine.gradients.values())
        assert "no step since" in message(lambda: engine.update(lr=1e-3), NativeError)
        for each in (engine, fresh):
            each.step(tokens, targets)
            each.update(lr=1e-3)
        assert off(weights(engine), weights(fresh)) == 0


def test_function_may_close_the_engine() -> None:
    engine = Engine(make_model(GQA), "max", "cpu", "fp32")
    engine.step(*batch(GQA, 2, 40, 1))

    def leave(_: np.ndarray) -> None:
        engine.close()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        engine.reduce(leave)
    message(lambda: engine.ready, ClosedError)


def test_reduce_refuses_what_makes_no_sense() -> None:
    tokens, targets = batch(GQA, 2, 40, 1)

    def refused(kind: type[NativeError] | type[ConfigError], **options: float) -> str:
        call: Callable[[], None] = lambda: engine.reduce(never, **options)  # type: ignore[arg-type]  # noqa: E731
        return message(call, kind)

    def never(_: np.ndarray) -> None:
        raise AssertionError

    with Engine(make_model(GQA), "max", "cpu", "fp32") as engine:
        assert "nothing to reduce" in refused(NativeError)
        assert engine.gradient_scale == 0.0
        engine.step(tokens, targets)
        counted = engine.counted
        assert engine.gradient_scale == 1 / counted
        assert f"it is {counted}" in refused(ConfigError, counted=counted - 1)
        assert "-1" in refused(ConfigError, counted=-1)
        for scale in (0.0, -1.0, float("nan"), float("inf"), 1e38):
            assert "scale" in refused(ConfigError, scale=scale)
        assert engine.counted == counted
        engine.update(lr=0.0)
        assert "nothing to reduce" in refused(NativeError)
        engine.step(tokens, targets)
        engine.discard()
        assert "nothing to reduce" in refused(NativeError)


def test_ready_tells_another_thread_how_far_a_step_is() -> None:
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, BUSY.vocab_size, (2, 8, 256))
    seen = set()
    with Engine(make_model(BUSY), "max", "cpu", "fp32", threads=1) as engine:
        assert engine.ready == (0, BUSY.n_layers + 2)
        running = threading.Thread(target=lambda: engine.step(tokens, targets))
        running.start()
        while running.is_alive():
            seen.add(tuple(engine.ready))
        assert engine.ready == (1, BUSY.n_layers + 2)
    assert (1, 0) in seen and len(seen) > 2
    assert {steps for steps, _ in seen} <= {0, 1}
