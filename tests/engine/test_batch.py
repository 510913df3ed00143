"""Several sequences in one step: the mean over all their tokens, on every device.

On the CPU they lie beside each other, padded to 64 columns, in groups of up to 512 columns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import children
import needs
import numpy as np
import pytest
import tolerances
from cases import BIASES, GQA, NORMS, SEPARATE, bits, make_engine, make_model, message, sequence
from reference import llama64 as ref
from tolerances import assert_tensors_close, relative_error
from typer.testing import CliRunner

from anepy.cli.main import app
from anepy.engine import Engine
from anepy.engine.flops import flops_per_step
from anepy.errors import ConfigError
from anepy.models.model import PRESETS, Model, ModelConfig
from anepy.text.data import TokenData
from anepy.training.config import TrainConfig
from anepy.training.trainer import Trainer

CONFIGS = {"gqa": GQA, "separate": SEPARATE, "biases": BIASES, "norms": NORMS}
# Several panels with a rest, one token, exactly a panel; more columns than run at once.
SIZES = [(2, 64), (3, 33), (5, 1), (4, 65), (17, 66)]


def sequences(config: ModelConfig, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = [sequence(config, length, seed) for seed in range(count)]
    return np.stack([d[0] for d in drawn]), np.stack([d[1] for d in drawn])


def mean_gradients(
    config: ModelConfig, tokens: np.ndarray, targets: np.ndarray
) -> tuple[float, dict[str, np.ndarray]]:
    weights = make_model(config).weights
    found = [
        ref.loss_and_gradients(weights, config, *each) for each in zip(tokens, targets, strict=True)
    ]
    mean = {name: np.mean([gradients[name] for _, gradients in found], 0) for name in weights}
    return float(np.mean([loss for loss, _ in found])), mean


@pytest.mark.parametrize(
    "variant", ["baseline", "opt", "opt-prealloc", "opt-vector_embed", "ane", "max"]
)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("count", "length"), SIZES)
def test_batch_is_the_mean_of_its_sequences(
    name: str, variant: str, count: int, length: int
) -> None:
    config = CONFIGS[name]
    tokens, targets = sequences(config, count, length)
    loss, gradients = mean_gradients(config, tokens, targets)
    with Engine(make_model(config), variant, "cpu", "fp32") as engine:
        for total in (1, 2):
            stats = engine.step(tokens, targets)
            assert stats.loss == pytest.approx(loss, rel=1e-6)
            expected = {tensor: total * gradient for tensor, gradient in gradients.items()}
            assert_tensors_close(dict(engine.gradients), expected, tolerances.FP32_GRADIENT)
            assert engine.accumulated == total
        flops = flops_per_step(config, length)["total"]
        assert stats.flops == flops_per_step(config, length, count)["total"] == count * flops


@pytest.mark.parametrize("variant", ["baseline", "opt", "opt-prealloc", "ane"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("count", "length"), SIZES[1:])
def test_batch_in_bf16_is_the_mean_too(name: str, variant: str, count: int, length: int) -> None:
    """Gradients of the logits are made in another place there."""
    needs.precision("bf16")
    config = CONFIGS[name]
    tokens, targets = sequences(config, count, length)
    loss, gradients = mean_gradients(config, tokens, targets)
    with Engine(make_model(config), variant, "cpu", "bf16") as engine:
        for total in (1, 2):
            assert engine.step(tokens, targets).loss == pytest.approx(
                loss, rel=tolerances.BF16_LOSS
            )
            found = dict(engine.gradients)
            expected = {tensor: total * gradient for tensor, gradient in gradients.items()}
            for tensor in [n for n in expected if n.endswith("wk.bias")]:
                error = relative_error(found.pop(tensor), expected.pop(tensor))
                assert error < tolerances.BF16_KEY_BIAS, tensor
            assert_tensors_close(
                found, expected, tolerances.BF16_GRADIENT, min_cosine=tolerances.BF16_COSINE
            )


def test_batch_on_the_simulator_is_the_mean_too() -> None:
    tokens, targets = sequences(GQA, 3, 64)
    loss, gradients = mean_gradients(GQA, tokens, targets)
    with Engine(make_model(), device="sim", seq_len=64) as engine:
        for total in (1, 2):
            stats = engine.step(tokens, targets)
            assert not stats.skipped and stats.loss == pytest.approx(loss, rel=2e-3)
            found = {n: g / (total * stats.loss_scale) for n, g in engine.gradients.items()}
            for name, gradient in gradients.items():
                assert (
                    tolerances.relative_error(found[name], gradient) < tolerances.FP16_GRADIENT
                ), name


def test_batch_beyond_the_attention_scores_that_are_kept_is_the_mean_too() -> None:
    config = ModelConfig(32, 44, 2, 4, 2, 97, 1024)
    tokens, targets = sequences(config, 3, 150)
    loss, gradients = mean_gradients(config, tokens, targets)
    with make_engine(config) as engine:
        assert engine.step(tokens, targets).loss == pytest.approx(loss, rel=1e-6)
        assert_tensors_close(dict(engine.gradients), gradients, tolerances.FP32_GRADIENT)


def test_batch_takes_memory_for_what_runs_at_once_and_no_other_allocation() -> None:
    with make_engine() as engine:

        def memory_after(count: int, length: int) -> int:
            assert engine.step(*sequences(GQA, count, length)).allocations == 0
            return engine.memory

        small = engine.memory  # for 129 tokens: 192 columns
        assert memory_after(3, 50) == memory_after(1, 129) == small
        four = memory_after(4, 50)
        most = memory_after(8, 64)
        assert small < four < most < 3 * small, "memory grows with the columns of the group"
        assert memory_after(40, 64) == memory_after(2, 3) == memory_after(9, 129) == most
    with Engine(make_model(), device="sim", seq_len=64) as engine:
        small = engine.memory
        engine.step(*sequences(GQA, 4, 50))
        assert engine.memory == small, "one sequence after another"


def test_evaluation_takes_no_more_memory_than_steps_or_reserve_made() -> None:
    with make_engine(GQA, "max") as engine, make_engine(GQA, "max") as wide:
        tokens, targets = sequences(GQA, 9, 40)
        small = engine.memory
        wide.reserve(9, 40)
        large = wide.memory
        assert large > 1.5 * small
        losses = [each.losses(tokens, targets) for each in (engine, wide)]
        assert losses[0].tobytes() == losses[1].tobytes()
        logits = [each.logits(tokens) for each in (engine, wide)]
        assert logits[0].tobytes() == logits[1].tobytes()
        assert engine.evaluate(tokens, targets) == pytest.approx(np.mean(losses[0]), rel=1e-12)
        assert (engine.memory, wide.memory) == (small, large)
        wide.step(tokens, targets)
        assert wide.memory == large, "what a step needs, and no more"
        wide.reserve(100)
        wide.reserve(1, 3)
        assert wide.memory > large
        for bad in (0, -1, 2**31):
            message(lambda bad=bad: engine.reserve(bad))
        assert "takes 1 to 129" in message(lambda: engine.reserve(1, 130))
        assert engine.memory == small
    with Engine(make_model(), device="sim", seq_len=64) as engine:
        small = engine.memory
        engine.reserve(8)
        assert engine.memory == small, "one sequence after another"


def test_batch_that_finds_no_memory_says_so_and_loses_nothing() -> None:
    code = """
import resource
import numpy as np
from anepy.engine import Engine
from anepy.errors import NativeError
from anepy.models.model import Model, ModelConfig

tokens = np.arange(16 * 64).reshape(16, 64)
engine = Engine(Model.init(ModelConfig(64, 64, 1, 2, 2, 30000, 64)), "opt", "cpu", threads=1)

def single():
    engine.restore(0, 0)
    loss = engine.step(tokens[0], tokens[1]).loss
    return loss, engine.accumulated, engine.memory, hash(engine.gradients["norm.weight"].tobytes())

before = single()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
old = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), old[1]))
for _ in range(2):
    try:
        engine.step(tokens, tokens)
    except NativeError as error:
        print(error.name, str(error).startswith("8 sequences of 64 tokens at once: no memory"))
print(engine.accumulated, single() == before)
resource.setrlimit(resource.RLIMIT_AS, old)
print(engine.step(tokens, tokens).loss > 1, engine.memory > 4 * before[2])
"""
    needs.proc()
    result = children.run("-c", code)
    refused = "memory True\n"
    assert (result.stdout, result.stderr) == (f"{refused * 2}1 True\nTrue True\n", "")


def test_batch_of_one_is_the_same_bit_for_bit() -> None:
    tokens, targets = sequence(GQA, 50)
    with make_engine() as one, make_engine() as other:
        for _ in range(2):
            a, b = one.step(tokens, targets), other.step(tokens[None], targets[None])
            assert (a.loss, a.flops) == (b.loss, b.flops)
            assert bits(one.gradients) == bits(other.gradients)


def test_single_sequences_after_a_batch_are_the_same_bit_for_bit() -> None:
    """The engine has room for more columns then."""
    tokens, targets = sequence(GQA, 70)
    with make_engine() as fresh, make_engine() as used:
        used.step(*sequences(GQA, 7, 129))
        used.restore(0, 0)
        assert fresh.step(tokens, targets).loss == used.step(tokens, targets).loss
        assert bits(fresh.gradients) == bits(used.gradients)
        assert fresh.evaluate(tokens, targets) == used.evaluate(tokens, targets)
        assert fresh.logits(tokens).tobytes() == used.logits(tokens).tobytes()


@pytest.mark.parametrize(
    ("device", "precision"), [("cpu", "fp32"), ("cpu", "bf16"), ("sim", "fp16")]
)
def test_batch_runs_are_bit_identical_whatever_the_threads(device: str, precision: str) -> None:
    needs.precision(precision)
    results = []
    for threads in (1, 2, 2, 3):
        with Engine(make_model(), "max", device, precision, threads=threads) as engine:
            for count in (2, 3, 4, 18 if device == "cpu" else 2):
                loss = engine.step(*sequences(GQA, count, 40)).loss
                engine.update(lr=1e-2, grad_clip=1.0)
            results.append((loss, bits(engine.model.weights)))
    assert results[1:] == results[:1] * 3


def test_norm_noted_by_a_batch_is_that_of_its_gradients() -> None:
    """From the second update on it is added up while products write (squares.c)."""
    _, one = mean_gradients(GQA, *sequences(GQA, 1, 50))
    for count in (5, 18):
        _, many = mean_gradients(GQA, *sequences(GQA, count, 50))
        mean = {name: (one[name] + count * many[name]) / (1 + count) for name in one}
        norm = np.sqrt(sum(np.sum(gradient**2) for gradient in mean.values()))
        with make_engine() as engine:
            for _ in range(3):
                engine.step(*sequence(GQA, 50, 0))
                engine.step(*sequences(GQA, count, 50))
                stats = engine.update(lr=0.0, grad_clip=1e9)
                assert stats.grad_norm == pytest.approx(norm, rel=1e-5)


def test_batch_weighs_as_much_as_its_sequences() -> None:
    """The update's mean is over tokens, not over steps."""
    tokens, targets = sequences(GQA, 4, 30)
    norms = []
    with make_engine() as engine:
        for parts in ((slice(0, 3), slice(3, 4)), (slice(0, 1), slice(1, 4)), (slice(0, 4),)):
            for rows in parts:
                engine.step(tokens[rows], targets[rows])
            mean = {n: g * engine.unit / engine.counted for n, g in engine.gradients.items()}
            assert_tensors_close(
                mean, mean_gradients(GQA, tokens, targets)[1], tolerances.FP32_GRADIENT
            )
            norms.append(engine.update(lr=0.0, grad_clip=1e9).grad_norm)
    assert norms == pytest.approx([norms[-1]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "targets", "says"),
    [
        (np.ones((2, 3), int), np.ones((3, 2), int), "shape (2, 3) but targets have shape (3, 2)"),
        (np.ones((2, 3), int), np.ones(6, int), "they go in pairs"),
        (np.ones((1, 2, 3), int), np.ones((1, 2, 3), int), "shape (1, 2, 3)"),
        (np.ones((0, 3), int), np.ones((0, 3), int), "shape (0, 3)"),
        (np.ones((3, 0), int), np.ones((3, 0), int), "shape (3, 0)"),
        (np.ones((2, 130), int), np.ones((2, 130), int), "a sequence of 130 tokens"),
        ([[1, 2], [3, 523]], [[1, 2], [3, 4]], "tokens[3] is 523"),
        ([[1, 2], [3, -4]], [[1, 2], [3, 4]], "tokens[3] is -4"),
        ([[1, 2], [3, 4]], [[1, 2], [523, 4]], "targets[2] is 523"),
        ([[1, 2], [3, 4]], [[-100, -1], [-(2**31), -7]], "no target is counted: all 4 are below 0"),
        ([[1, 2], [3]], [[1, 2], [3]], "nested unevenly"),
    ],
)
def test_bad_batches_are_refused_and_change_nothing(tokens: Any, targets: Any, says: str) -> None:
    with make_engine() as engine:
        engine.step([1, 2, 3], [2, 3, 4])
        before = bits(engine.gradients)
        assert says in message(lambda: engine.step(tokens, targets))
        assert engine.accumulated == 1 and bits(engine.gradients) == before
        assert says in message(lambda: engine.evaluate(tokens, targets))
        assert engine.accumulated == 1 and bits(engine.gradients) == before


@pytest.mark.parametrize("accumulated", [0, 1])
def test_batch_whose_second_sequence_overflows_is_still_the_mean(accumulated: int) -> None:
    """Half precision: the scale falls for all that was added, and the sequence comes again.

    In IEEE arithmetic, where an overflow is always seen: as the hardware was measured, the next
    operation may read an infinite sum as a number.
    """
    model = make_model()
    tokens, targets = sequences(GQA, 2, 64)
    quiet = np.full(64, 5)  # predicts itself: its gradients are small
    mixed = np.stack([quiet, tokens[1]]), np.stack([quiet, targets[1]])
    calm = np.stack([quiet, quiet]), np.stack([quiet, quiet])
    _, wanted = mean_gradients(GQA, *mixed)
    with Engine(model, device="sim:numerics=exact", seq_len=64) as engine:
        most = 2.0**40
        while most > 1.0:  # the largest scale at which the quiet sequence alone passes
            engine.restore(0, 0, loss_scale=most)
            if not engine.step(quiet, quiet).skipped:
                break
            most /= 2
        engine.restore(0, 0, loss_scale=most)
        assert engine.step(tokens[1], targets[1]).skipped, "no scale separates the two"
        most *= 2  # half of it for each of two sequences
        engine.restore(0, 0, loss_scale=most)
        if accumulated:
            assert not engine.step(*calm).skipped
            for name, gradient in mean_gradients(GQA, *calm)[1].items():
                wanted[name] += gradient
        stats = engine.step(*mixed)
        assert not stats.skipped and stats.loss_scale < most
        assert engine.accumulated == 1 + accumulated and engine.loss_scale == stats.loss_scale
        for name, gradient in engine.gradients.items():
            error = tolerances.relative_error(gradient / engine.loss_scale, wanted[name])
            assert error < tolerances.FP16_GRADIENT, (name, error)


def test_batch_with_a_sequence_that_is_no_number_adds_nothing() -> None:
    tokens, targets = sequences(SEPARATE, 2, 30)
    tokens[0], targets[0] = 7, 7
    with Engine(make_model(SEPARATE), device="sim") as engine:
        row = engine.model.weights["tok_embeddings.weight"][int(tokens[1][0])]
        saved = row.copy()
        row[...] = np.nan
        assert engine.step(tokens, targets).skipped and engine.accumulated == 0
        engine.step(tokens[0], targets[0])
        assert engine.step(tokens, targets).skipped and engine.accumulated == 1
        assert engine.update(lr=1e-2).skipped, "half a batch reached the weights"
        row[...] = saved
        assert not engine.step(tokens, targets).skipped
        assert not engine.update(lr=1e-2).skipped


# ---------------------------------------------------------------------------- trainer and command

SMALL = ModelConfig(32, 64, 2, 4, 2, 50, 24)


def walk(n: int = 2000) -> TokenData:
    steps = np.random.default_rng(0).integers(-1, 2, n)
    return TokenData.from_array((np.cumsum(steps) % SMALL.vocab_size).astype(np.uint16))


def trained(
    settings: TrainConfig, path: Path, stop: int | None = None, resume: Path | None = None
) -> tuple[dict[str, bytes], list[float]]:
    model = Model.init(SMALL, seed=3)
    losses = []
    with Trainer(model, walk(), settings, resume) as trainer:
        for report in trainer:
            losses.append(report.loss)
            assert report.tokens_per_s * report.ms_per_step / 1e3 == pytest.approx(
                settings.batch * 16
            )
            if report.step == stop:
                break
        trainer.save_checkpoint(path)
        assert trainer.summary().tokens == len(losses) * settings.batch * 16
    return bits(model.weights), losses


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_batch_resumed_in_and_between_accumulations_is_bit_identical(
    tmp_path: Path, stop: int
) -> None:
    settings = TrainConfig(steps=7, batch=3, accum=3, lr=1e-2, seq=16, grad_clip=1.0)
    whole, losses = trained(settings, tmp_path / "whole.npz")
    _, first = trained(settings, tmp_path / "half.npz", stop)
    resumed, second = trained(settings, tmp_path / "b.npz", resume=tmp_path / "half.npz")
    assert resumed == whole and first + second == losses


def test_batch_sees_the_sequences_that_as_many_single_steps_see(tmp_path: Path) -> None:
    """The update of 2 steps of 3 sequences is that of 6 steps of 1, up to rounding."""
    batched, losses = trained(
        TrainConfig(steps=2, batch=3, accum=2, lr=1e-2, seq=16, precision="fp32"),
        tmp_path / "a.npz",
    )
    single, each = trained(
        TrainConfig(steps=6, accum=6, lr=1e-2, seq=16, precision="fp32"), tmp_path / "b.npz"
    )
    np.testing.assert_allclose(losses, np.reshape(each, (2, 3)).mean(1), rtol=1e-5)
    for name, weights in batched.items():
        np.testing.assert_allclose(
            np.frombuffer(weights, np.float32), np.frombuffer(single[name], np.float32), atol=2e-4
        )


@pytest.mark.parametrize("batch", [0, -1])
def test_batch_below_one_is_refused(batch: int) -> None:
    with pytest.raises(ConfigError, match=f"batch is {batch}, it must be at least 1"):
        TrainConfig(batch=batch).validate()


def test_resume_with_another_batch_says_so(tmp_path: Path) -> None:
    trained(TrainConfig(steps=4, batch=2, accum=2, seq=16), tmp_path / "a.npz", stop=2)
    changed = TrainConfig(steps=4, batch=3, accum=2, seq=16)
    with Trainer(Model.init(SMALL), walk(), changed, tmp_path / "a.npz") as trainer:
        assert "batch is 3, the checkpoint had 2" in trainer.notes


def test_train_command_takes_a_batch(tmp_path: Path) -> None:
    Model.init(PRESETS["stories260K"], seed=0).save(tmp_path / "m.bin")
    np.random.default_rng(0).integers(0, 512, 5000).astype("<u2").tofile(tmp_path / "d.bin")
    common = ["train", str(tmp_path / "m.bin"), "--data", str(tmp_path / "d.bin"), "--seq", "32"]
    common += ["--no-checkpoint", "--steps", "2", "--accum", "2"]
    plain = CliRunner().invoke(app, [*common, "--batch", "4"])
    assert plain.exit_code == 0 and "of 4 sequences" in plain.output, plain.output
    found = CliRunner().invoke(app, [*common, "--batch", "4", "--json"])
    result = json.loads(found.stdout)
    assert result["settings"]["batch"] == 4 and result["summary"]["tokens"] == 2 * 4 * 32
    bad = CliRunner().invoke(app, [*common, "--batch", "0"])
    assert bad.exit_code != 0 and "batch is 0" in bad.output
