"""Targets below 0: not counted in loss, gradients, updates, evaluation and figures, on any device.

An update is the mean over all targets counted since the last one, however they were spread.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
import tolerances
from cases import GQA, SEPARATE, bits, make_model, message
from reference import adamw64
from reference import llama64 as ref
from tolerances import assert_tensors_close

from anepy.engine.engine import Engine
from anepy.engine.evaluation import mean_loss, sequence_losses
from anepy.errors import NativeError
from anepy.models.model import Model, ModelConfig
from anepy.text.data import Sampler, TokenData
from anepy.training import checkpoint
from anepy.training.config import TrainConfig
from anepy.training.trainer import Trainer

CONFIGS = {"gqa": GQA, "separate": SEPARATE}
SHAPES = [(1, 1), (1, 65), (3, 33), (4, 65), (17, 66)]  # more columns than run at once, and fewer
NOT_COUNTED = np.array([-100, -1, -(2**31)])
ON_CPU = ["baseline", "opt", "opt-prealloc", "opt+offload_softmax", "ane", "max"]

Arrays = dict[str, np.ndarray]


def batch(config: ModelConfig, count: int, length: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw sequences of which about half of the targets are counted: some all of, some none."""
    rng = np.random.default_rng((seed, count, length))
    tokens = rng.integers(0, config.vocab_size, (count, length))
    targets = rng.integers(0, config.vocab_size, (count, length))
    share = np.resize([0.5, 0.0, 1.0, 0.1, 0.9], (count, 1))
    masked = rng.random((count, length)) >= share
    masked[0, -1] = False
    targets[masked] = NOT_COUNTED[rng.integers(0, 3, int(masked.sum()))]
    return tokens, targets


def expected(config: ModelConfig, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
    return ref.loss_and_gradients(make_model(config).weights, config, tokens, targets)


@functools.cache
def expected_of(name: str, count: int, length: int, seed: int) -> tuple[float, Arrays]:
    return expected(CONFIGS[name], *batch(CONFIGS[name], count, length, seed))


def counted(targets: np.ndarray) -> int:
    return int(np.count_nonzero(targets >= 0))


def assert_gradients(engine: Engine, wanted: Arrays, factor: float = 1.0) -> None:
    """Compare with the gradients of a mean loss, within the bars of the precision."""
    divisor = factor * engine.loss_scale
    found = {name: gradient / divisor for name, gradient in engine.gradients.items()}
    bars = {
        "fp32": (tolerances.FP32_GRADIENT, None),
        "bf16": (tolerances.BF16_GRADIENT, tolerances.BF16_COSINE),
        "fp16": (tolerances.FP16_GRADIENT, tolerances.FP16_COSINE),
    }
    bar, cosine = bars[engine.precision]
    # Of one position, rounding is all there is of the gradients of queries and keys.
    null = [name for name, gradient in wanted.items() if np.abs(gradient).max() < 1e-12]
    for name in null:
        assert np.abs(found.pop(name)).max() < (1e-6 if engine.precision == "fp32" else 1e-2)
    assert_tensors_close(
        found, {n: g for n, g in wanted.items() if n not in null}, bar, min_cosine=cosine
    )


LOSS = {"fp32": tolerances.FP32_LOGITS, "bf16": tolerances.BF16_LOSS, "fp16": 2e-3}


# ------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ON_CPU)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("count", "length"), SHAPES)
def test_step_counts_what_is_not_masked(
    name: str, variant: str, count: int, length: int, precision: str
) -> None:
    needs.precision(precision)
    config = CONFIGS[name]
    tokens, targets = batch(config, count, length, 1)
    loss, gradients = expected_of(name, count, length, 1)
    with Engine(make_model(config), variant, "cpu", precision, threads=2) as engine:
        for _ in range(2):  # the second sees what the first has left in the buffers
            stats = engine.step(tokens, targets)
            assert stats.loss == pytest.approx(loss, rel=LOSS[precision])
            assert stats.tokens == engine.counted == engine.unit == counted(targets)
            assert_gradients(engine, gradients)
            assert engine.evaluate(tokens, targets) == pytest.approx(stats.loss, rel=1e-6)
            engine.restore(0, 0)


@pytest.mark.parametrize(
    "variant",
    ["baseline", "opt", "ane", "dynamic", "max"]
    + [f"opt+offload_{part}" for part in ("rmsnorm", "classifier", "softmax")],
)
def test_step_on_the_simulator_counts_what_is_not_masked(variant: str) -> None:
    for name, config in CONFIGS.items():
        tokens, targets = batch(config, 4, 50, 2)
        loss, gradients = expected_of(name, 4, 50, 2)
        with Engine(make_model(config), variant, "sim", seq_len=64) as engine:
            stats = engine.step(tokens, targets)
            assert not stats.skipped and stats.tokens == counted(targets)
            assert stats.loss == pytest.approx(loss, rel=LOSS["fp16"])
            assert stats.loss_scale == engine.loss_scale
            assert_gradients(engine, gradients)
            assert engine.evaluate(tokens, targets) == pytest.approx(loss, rel=LOSS["fp16"])


@pytest.mark.parametrize("seed", range(12))
def test_step_with_random_masks_matches_the_reference(seed: int) -> None:
    """Any share of counted targets, one of them at least, in any shape, after any other step."""
    rng = np.random.default_rng(seed)
    config = (GQA, SEPARATE)[seed % 2]
    variant = ON_CPU[seed % len(ON_CPU)]
    with Engine(make_model(config), variant, "cpu", "fp32", threads=1 + seed % 3) as engine:
        for _ in range(4):
            shape = int(rng.integers(1, 12)), int(rng.integers(1, 70))
            tokens = rng.integers(0, config.vocab_size, shape)
            targets = rng.integers(0, config.vocab_size, shape)
            targets[rng.random(shape) < rng.random()] = -100
            targets[rng.integers(0, shape[0]), rng.integers(0, shape[1])] = 0
            loss, gradients = expected(config, tokens, targets)
            engine.restore(0, 0)
            assert engine.step(tokens, targets).loss == pytest.approx(loss, rel=LOSS["fp32"])
            assert_gradients(engine, gradients)


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_step_does_not_care_which_number_says_not_counted(device: str) -> None:
    tokens, targets = batch(GQA, 3, 40, 3)
    results = []
    for number in NOT_COUNTED:
        with Engine(make_model(), device=device, seq_len=64) as engine:
            stats = engine.step(tokens, np.where(targets < 0, number, targets))
            results.append((stats.loss, bits(engine.gradients)))
    assert results[1:] == results[:1] * 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_behind_the_last_counted_target_do_not_matter(precision: str) -> None:
    """Attention is causal, so they change nothing and get nothing."""
    needs.precision(precision)
    tokens, targets = batch(SEPARATE, 1, 60, 4)
    tokens, targets = tokens[0], targets[0]
    tokens[:31], tokens[31:], targets[31:] = 7, 9, -100
    targets[:31] = 5
    results = []
    for other in (9, 11):
        tokens[31:] = other
        with Engine(make_model(SEPARATE), "max", "cpu", precision) as engine:
            loss = engine.step(tokens, targets).loss
            assert not engine.gradients["tok_embeddings.weight"][other].any()
            results.append((loss, bits(engine.gradients)))
    assert results[0] == results[1]


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_step_without_a_counted_target_is_refused_and_changes_nothing(device: str) -> None:
    nothing = np.full((2, 5), -100)
    with Engine(make_model(), device=device, seq_len=64) as engine:
        before = bits(engine.gradients), engine.accumulated, engine.counted, engine.loss_scale
        for call in (engine.step, engine.evaluate, engine.losses):
            for rows in (slice(None), 0):

                def refused(call: Callable[..., Any] = call, rows: Any = rows) -> None:
                    call(np.ones_like(nothing)[rows], nothing[rows])

                assert message(refused).startswith("no target is counted: all ")
        assert (bits(engine.gradients), 0, 0, engine.loss_scale) == before
        assert "no step since" in message(lambda: engine.update(1e-3), NativeError)
        engine.step([1, 2], [2, -1])
        before = bits(engine.gradients), engine.accumulated, engine.counted, engine.loss_scale
        message(lambda: engine.step([1, 2], [-1, -1]))
        assert (bits(engine.gradients), 1, 1, engine.loss_scale) == before


# ---------------------------------------------------------------------- the mean over all of them

SPREADS = {
    "steps of unequal length": [(1, 100), (1, 10), (1, 1), (1, 64)],
    "batches and single sequences": [(5, 20), (1, 60), (17, 66), (2, 3)],
    "few targets first": [(1, 1), (8, 64), (3, 33)],
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spread", SPREADS)
def test_update_is_the_mean_over_counted_targets(spread: str, precision: str) -> None:
    """Averaged by steps, sequences of 100 and of 10 tokens were 67 % off it."""
    needs.precision(precision)
    options = {"lr": 1e-2, "weight_decay": 0.1, "grad_clip": 0.5}
    with Engine(make_model(), "max", "cpu", precision) as engine:
        for update in (1, 2):
            weights, m, v = (
                {n: np.array(x, np.float64) for n, x in arrays.items()}
                for arrays in (engine.model.weights, engine.adam_m, engine.adam_v)
            )
            total, number = {n: np.zeros_like(w) for n, w in weights.items()}, 0
            for i, shape in enumerate(SPREADS[spread]):
                tokens, targets = batch(GQA, *shape, 10 * update + i)
                _, gradients = ref.loss_and_gradients(weights, GQA, tokens, targets)
                for name, gradient in gradients.items():
                    total[name] += gradient * counted(targets)
                number += counted(targets)
                assert engine.step(tokens, targets).tokens == counted(targets)
                assert engine.counted == number and engine.accumulated == i + 1
            mean = {name: gradient / number for name, gradient in total.items()}
            assert_gradients(engine, mean, engine.counted / engine.unit)
            norm = adamw64.clip_gradients(mean, options["grad_clip"])
            stats = engine.update(**options)
            bar = 1e-5 if precision == "fp32" else tolerances.BF16_GRADIENT
            assert stats.grad_norm == pytest.approx(norm, rel=bar) and norm > options["grad_clip"]
            adam = {name: options[name] for name in ("lr", "weight_decay")}
            adamw64.adamw(weights, mean, m, v, update, **adam)
            bar = tolerances.FP32_GRADIENT if precision == "fp32" else tolerances.BF16_GRADIENT
            assert_tensors_close({n: np.array(x) for n, x in engine.adam_m.items()}, m, bar)
            assert engine.counted == engine.accumulated == 0


def test_update_does_not_depend_on_how_targets_are_spread() -> None:
    """All in one step, row by row, and target by target: the same weights up to rounding."""
    tokens, targets = batch(GQA, 4, 12, 5)
    single = []
    for row, column in np.argwhere(targets >= 0):
        alone = np.full(12, -100)
        alone[column] = targets[row, column]
        single.append((tokens[row], alone))
    rows = [pair for pair in zip(tokens, targets, strict=True) if counted(pair[1])]
    results = []
    for parts in ([(tokens, targets)], rows, rows[::-1], single):
        with Engine(make_model(), "max", "cpu", "fp32") as engine:
            for part in parts:
                engine.step(*part)
            assert engine.accumulated == len(parts) and engine.counted == counted(targets)
            norm = engine.update(lr=0.0, grad_clip=1e9).grad_norm
            results.append((norm, {n: np.array(m) for n, m in engine.adam_m.items()}))
    for norm, moments in results[1:]:
        assert norm == pytest.approx(results[0][0], rel=1e-5)
        assert_tensors_close(moments, results[0][1], tolerances.FP32_GRADIENT)


@pytest.mark.parametrize("first", [1, 2, 60])
def test_half_precision_gives_each_target_the_same_scale(first: int) -> None:
    """A step with few counted targets does not lift them to where half precision ends."""
    rng = np.random.default_rng(first)
    tokens, targets = rng.integers(0, 523, (6, 60)), rng.integers(0, 523, (6, 60))
    targets[0, first:] = -100
    with Engine(make_model(), "opt", "sim", seq_len=64) as engine:
        scale = 4096.0 / 60
        for _ in range(2):
            total: Arrays = {}
            for row in range(6):
                assert not engine.step(tokens[row], targets[row]).skipped
                assert engine.loss_scale / engine.unit == pytest.approx(scale, rel=1e-12)
            _, total = expected(GQA, tokens, targets)
            assert engine.unit == first and engine.counted == first + 5 * 60
            assert_gradients(engine, total, engine.counted / engine.unit)
            engine.update(lr=0.0)
        assert engine.step(tokens[1], targets[1]).loss_scale == pytest.approx(4096.0)


def test_half_precision_that_overflows_keeps_the_mean() -> None:
    """The scale falls while targets that are not equally many have been accumulated."""
    few, many = batch(GQA, 1, 20, 6), batch(GQA, 3, 60, 7)
    total = {name: g * counted(few[1]) for name, g in expected(GQA, *few)[1].items()}
    for name, gradient in expected(GQA, *many)[1].items():
        total[name] += gradient * counted(many[1])
    model = make_model()
    with Engine(model, "opt", "sim", seq_len=64) as engine:
        engine.step(*few)
        model.weights["norm.weight"][0] *= 1e7  # on the host: the loss overflows on its way
        assert engine.step(*many).skipped and engine.counted == counted(few[1])
        model.weights["norm.weight"][0] /= 1e7
        assert not engine.step(*many).skipped
        assert engine.loss_scale / engine.unit == 4096.0 / 2 / 20
        mean = {name: gradient / engine.counted for name, gradient in total.items()}
        assert_gradients(engine, mean, engine.counted / engine.unit)


# ------------------------------------------------------------------- evaluation of several at once


@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "fp32"), ("cpu", "bf16"), ("sim", "fp16")]
)
@pytest.mark.parametrize("variant", ["opt", "ane"])
@pytest.mark.parametrize(("count", "length"), [(1, 40), (5, 33), (9, 64)])
def test_logits_and_losses_of_a_batch_are_those_of_each_sequence(
    device: str, precision: str, variant: str, count: int, length: int
) -> None:
    needs.precision(precision)
    tokens, targets = batch(GQA, count, length, 8)
    with Engine(make_model(), variant, device, precision, seq_len=64) as engine:
        alone = np.stack([engine.logits(row) for row in tokens])
        together = engine.logits(tokens)
        assert together.shape == (count, length, GQA.vocab_size)
        assert together.tobytes() == alone.tobytes()
        losses = engine.losses(tokens, targets)
        assert losses.shape == targets.shape and not losses[targets < 0].any()
        shifted = alone.astype(np.float64)
        shifted -= shifted.max(-1, keepdims=True)
        wanted = np.log(np.exp(shifted).sum(-1))
        wanted -= np.take_along_axis(shifted, np.maximum(targets, 0)[..., None], -1)[..., 0]
        bar = 1e-5 if precision != "fp16" or variant == "opt" else 2e-3
        np.testing.assert_allclose(losses, np.where(targets < 0, 0, wanted), rtol=bar, atol=bar)
        assert engine.evaluate(tokens, targets) == pytest.approx(
            losses.sum() / counted(targets), rel=1e-12
        )
        assert engine.losses(tokens[0], targets[0]).tobytes() == losses[0].tobytes()
        assert engine.accumulated == 0


def test_sequence_losses_are_those_of_each_alone_whatever_their_lengths() -> None:
    rng = np.random.default_rng(9)
    sequences = []
    for n in (5, 129, 64, 63, 1, 65, 128, 100, 64, 2, 70):
        ids = rng.integers(0, GQA.vocab_size, n + 1).astype(np.int32)
        targets = ids[1:].copy()
        targets[rng.random(n) < 0.3] = -100
        sequences.append((ids[:-1], targets))
    sequences[3][1][...] = -100  # none of this one is counted
    with Engine(make_model(), "max", "cpu", "fp32") as engine:
        found = sequence_losses(engine, sequences)
        assert [n for n, _ in found] == [counted(targets) for _, targets in sequences]
        assert found[3] == (0, 0.0)
        for (n, loss), each in zip(found, sequences, strict=True):
            if n:
                assert loss == pytest.approx(engine.evaluate(*each), rel=1e-6)
        total = sum(n * loss for n, loss in found)
        assert mean_loss(found) == pytest.approx(total / sum(n for n, _ in found))
        assert sequence_losses(engine, sequences[3:4]) == [(0, 0.0)]


# ------------------------------------------------------------------------- trainer and checkpoints

SMALL = ModelConfig(32, 64, 2, 4, 2, 50, 24)
DATA = TokenData.from_array(np.random.default_rng(0).integers(0, 50, 2000).astype(np.uint16))


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sampler's targets be counted where the token before is below 20: not equally many."""
    draw = Sampler.next

    def next_masked(self: Sampler) -> tuple[np.ndarray, np.ndarray]:
        tokens, targets = draw(self)
        targets[tokens >= 20] = -100
        targets[0] = max(targets[0], 0)
        return tokens, targets

    monkeypatch.setattr(Sampler, "next", next_masked)


def train(
    path: Path, settings: TrainConfig, stop: int | None = None, resume: Path | None = None
) -> tuple[dict[str, bytes], list[float], int]:
    losses, tokens = [], 0
    with Trainer(Model.init(SMALL, seed=3), DATA, settings, resume) as trainer:
        for report in trainer:
            losses.append(report.loss)
            tokens += report.stats.tokens
            speed = report.stats.tokens / report.ms_per_step * 1e3
            assert report.tokens_per_s == pytest.approx(speed)
            if report.step == stop:
                break
        trainer.save_checkpoint(path)
        assert trainer.summary().tokens == tokens < 0.7 * len(losses) * settings.batch * 16
        return bits(trainer.model.weights), losses, tokens


@pytest.mark.usefixtures("masked")
@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_masked_run_resumed_anywhere_is_bit_identical(
    tmp_path: Path, stop: int, device: str
) -> None:
    settings = TrainConfig(steps=7, batch=2, accum=3, lr=1e-2, seq=16, grad_clip=1.0, device=device)
    whole, losses, _ = train(tmp_path / "whole.npz", settings)
    _, first, tokens = train(tmp_path / "half.npz", settings, stop)
    meta = checkpoint.read_meta(tmp_path / "half.npz")
    assert (meta.format, meta.accumulated) == (2, stop % 3)
    assert (meta.counted > 0) == (stop % 3 > 0) and meta.counted <= tokens
    resumed, second, _ = train(tmp_path / "b.npz", settings, resume=tmp_path / "half.npz")
    assert resumed == whole and first + second == losses


def test_checkpoint_of_format_1_goes_on_as_the_version_that_wrote_it(tmp_path: Path) -> None:
    """It counted steps; its steps had equally many targets, so nothing is lost."""
    settings = TrainConfig(steps=6, batch=2, accum=3, lr=1e-2, seq=16, grad_clip=1.0)

    def run(resume: Path | None, stop: int | None = None) -> dict[str, bytes]:
        with Trainer(Model.init(SMALL, seed=3), DATA, settings, resume) as trainer:
            for report in trainer:
                if report.step == stop:
                    break
            trainer.save_checkpoint(tmp_path / "new.npz")
            return bits(trainer.model.weights)

    whole = run(None)
    run(None, 5)
    meta = checkpoint.read_meta(tmp_path / "new.npz")
    assert (meta.accumulated, meta.counted, meta.scaling["unit"]) == (2, 2 * 32, 32)
    with np.load(tmp_path / "new.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "meta"}
    scaling = {name: meta.scaling[name] for name in ("loss_scale", "clean_steps")}
    checkpoint.save(
        tmp_path / "old.npz", arrays, replace(meta, format=1, counted=0, scaling=scaling)
    )
    assert checkpoint.read_meta(tmp_path / "old.npz").format == 1
    assert run(tmp_path / "old.npz") == whole


@pytest.mark.usefixtures("masked")
def test_loss_of_a_run_is_a_number_where_some_sequences_have_no_target(tmp_path: Path) -> None:
    settings = TrainConfig(steps=4, batch=3, accum=2, seq=16, held_out=0.2, eval_windows=5)
    with Trainer(Model.init(SMALL, seed=3), DATA, settings) as trainer:
        reports = list(trainer)
        assert all(math.isfinite(report.loss) for report in reports)
        before = trainer.summary().held_out_before
        assert before is not None and before == pytest.approx(math.log(50), abs=0.5)
