"""The norm that an update takes from the sums of squares its last step noted (train/squares.c)."""

from __future__ import annotations

import math

import needs
import numpy as np
import pytest
from cases import BIASES, GQA, NORMS, SEPARATE, bits, make_model, sequence

from anepy.engine import Engine
from anepy.models.model import ModelConfig

# More rows than a piece has, more of the vocabulary than a chunk, and panels that are not whole.
LARGE = ModelConfig(72, 450, 2, 4, 1, 2100, 70)
CONFIGS = pytest.mark.parametrize(
    "config",
    [GQA, SEPARATE, LARGE, BIASES, NORMS],
    ids=["gqa", "separate", "large", "biases", "norms"],
)
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
NAME = "layers.0.feed_forward.w2.weight"


def make(config: ModelConfig, precision: str, variant: str = "max", threads: int = 2) -> Engine:
    needs.precision(precision)
    # In IEEE arithmetic an overflow is always seen: these tests are about what follows.
    device = "sim:numerics=exact" if precision == "fp16" else "cpu"
    return Engine(make_model(config), variant, device, precision, threads=threads)


def divisor(engine: Engine) -> float:
    """Return what the gradients are to be divided by for the mean over counted targets."""
    steps = engine.counted / engine.unit if engine.unit else engine.accumulated  # of one size
    return steps * engine.loss_scale


def exact(engine: Engine) -> float:
    """Return the norm of the mean gradient in float64, without taking a view of the gradients."""
    squares = engine._grads.astype(np.float64) ** 2
    return math.sqrt(squares.sum()) / divisor(engine)


def steps(engine: Engine, count: int, seed: int = 0) -> float:
    """Make steps of one sequence or two, of several lengths; return the exact norm."""
    for i in range(count):
        tokens, targets = sequence(engine.model.config, 20 + 25 * (i % 3), seed + i)
        if (seed + i) % 2:
            tokens, targets = np.stack([tokens, targets]), np.stack([targets, tokens])
        assert not engine.step(tokens, targets).skipped
    return exact(engine)


def smuggle(engine: Engine) -> float:
    """Write to a gradient so that the engine cannot know; return the exact norm."""
    offset, _ = engine.model.table.places[NAME]
    engine._grads[offset + 3] += 100 * exact(engine) * divisor(engine)
    return exact(engine)


def update(engine: Engine) -> float:
    stats = engine.update(lr=1e-3, grad_clip=1e-2)
    assert not stats.skipped
    return stats.grad_norm


@CONFIGS
@PRECISIONS
@pytest.mark.parametrize("variant", ["baseline", "max"])
def test_norm_is_that_of_the_gradients(config: ModelConfig, precision: str, variant: str) -> None:
    with make(config, precision, variant) as engine:
        for number, count in enumerate((1, 1, 3, 2, 1)):
            norm = steps(engine, count, 10 * number)
            assert update(engine) == pytest.approx(norm, rel=1e-6), (number, count)


@CONFIGS
@PRECISIONS
def test_norm_is_noted_by_steps_once_it_is_wanted(config: ModelConfig, precision: str) -> None:
    with make(config, precision) as engine:
        if precision != "fp16":  # there every update wants it
            steps(engine, 1)
            assert math.isnan(engine.update(lr=1e-3).grad_norm)
        steps(engine, 1)
        norm = smuggle(engine)
        assert update(engine) == pytest.approx(norm, rel=1e-6)
        for count in (1, 3, 2):
            for as_long_as_the_last in (False, True):
                norm = steps(engine, count, count)
                if as_long_as_the_last:
                    assert smuggle(engine) > 50 * norm
                assert update(engine) == pytest.approx(norm, rel=1e-6), "gradients were read again"


def test_norm_is_no_longer_noted_when_no_longer_wanted() -> None:
    with make(GQA, "fp32") as engine:
        for _ in range(2):
            steps(engine, 1)
            update(engine)
        steps(engine, 1)
        engine.update(lr=1e-3)
        steps(engine, 1)
        norm = smuggle(engine)
        assert update(engine) == pytest.approx(norm, rel=1e-6)


@CONFIGS
@PRECISIONS
def test_norm_and_training_do_not_depend_on_threads(config: ModelConfig, precision: str) -> None:
    results = []
    for threads in (1, 2, 3, 2):
        with make(config, precision, threads=threads) as engine:
            norms = []
            for count in (1, 2, 1, 3):
                steps(engine, count)
                norms.append(update(engine))
            results.append((norms, bits(engine.model.weights)))
    assert all(result == results[0] for result in results)


@CONFIGS
@PRECISIONS
def test_norm_is_the_same_bit_for_bit_where_it_is_computed_anew(
    config: ModelConfig, precision: str
) -> None:
    """So training does not depend on who looks at gradients, or on where it was resumed."""
    with make(config, precision) as noting, make(config, precision) as reading:
        views = list(reading.gradients.values())
        for count in (1, 1, 3, 2):
            for engine in (noting, reading):
                steps(engine, count)
            assert update(noting) == update(reading)
        assert views and bits(noting.model.weights) == bits(reading.model.weights)


@PRECISIONS
@pytest.mark.parametrize("held", ["before the step", "since the step", "no longer"])
def test_norm_has_what_a_user_writes(precision: str, held: str) -> None:
    with make(GQA, precision) as engine:
        for _ in range(3):
            view = engine.gradients[NAME] if held == "before the step" else None
            norm = steps(engine, 2)
            if view is None:
                view = engine.gradients[NAME]
            view[3, 2] = 100 * norm * divisor(engine)
            if held == "no longer":
                del view
            changed = exact(engine)
            assert changed > 10 * norm
            assert update(engine) == pytest.approx(changed, rel=1e-6)
            view = None
        steps(engine, 1)
        update(engine)
        norm = steps(engine, 1)
        smuggle(engine)
        assert update(engine) == pytest.approx(norm, rel=1e-6), "views that are gone still count"


@PRECISIONS
def test_norm_after_restore_is_that_of_what_was_restored(precision: str) -> None:
    with make(SEPARATE, precision) as engine:
        for _ in range(2):
            steps(engine, 1)
            update(engine)
        steps(engine, 2)
        smuggle(engine)
        engine.restore(accumulated=4, updates=engine.updates)
        norm = exact(engine)
        assert update(engine) == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_norm_after_a_skipped_step_is_that_of_the_halved_gradients(where: str) -> None:
    tokens, targets = sequence(GQA, 64)
    quiet = np.full(64, 5)  # predicts itself: its gradients are small
    with make(GQA, "fp16", "opt") as engine:
        for _ in range(2):
            steps(engine, 1)
            update(engine)
        engine.restore(0, engine.updates, loss_scale=2.0**40)
        while where == "gradients" and engine.step(quiet, quiet).skipped:
            pass
        engine.restore(0, engine.updates, engine.loss_scale if where == "gradients" else 64.0)
        assert not engine.step(quiet, quiet).skipped
        scale, norm = engine.loss_scale, exact(engine)
        if where == "loss":
            engine.model.weights["norm.weight"][5] = math.nan
        skipped = engine.step(tokens, targets)
        assert skipped.skipped, "no scale separates the two"
        assert math.isfinite(skipped.loss) == (where == "gradients")
        engine.model.weights["norm.weight"][5] = 1.0
        assert engine.loss_scale == scale / 2 and engine.accumulated == 1
        assert exact(engine) == pytest.approx(norm, rel=1e-3)
        norm = smuggle(engine)
        assert update(engine) == pytest.approx(norm, rel=1e-6)


def test_norm_that_is_not_finite_is_noticed_in_what_was_noted() -> None:
    with make(GQA, "fp32") as engine:
        for _ in range(2):
            steps(engine, 1)
            update(engine)
        good = np.array(engine.model.weights["norm.weight"])
        engine.model.weights["norm.weight"][5] = math.inf
        engine.step(*sequence(GQA, 20))
        engine.model.weights["norm.weight"][...] = good
        stats = engine.update(lr=1e-3, grad_clip=1.0)
        assert stats.skipped and not math.isfinite(stats.grad_norm)
        norm = steps(engine, 1)
        assert update(engine) == pytest.approx(norm, rel=1e-6)
