"""Documents packed into sequences: each is computed as if it were a sequence of its own."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import families
import needs
import numpy as np
import pytest
import tolerances
from cases import BIASES, GQA, NORMS, SEPARATE, WIDE_HEADS, bits, make_engine, make_model, message
from reference import llama64 as ref
from tolerances import assert_tensors_close, relative_error

from anepy.engine.engine import Engine
from anepy.errors import ConfigError
from anepy.models.model import Model

# Of one sequence of 200 tokens, and of others: at and beside multiples of 64, of one token, long.
BORDERS = ([64, 128, 129], [1, 2, 63, 65, 191, 199], [100], [], [7, 63, 64, 65, 66, 150])
COUNT, LENGTH = len(BORDERS), 200
CONFIGS = {"gqa": GQA, "wide": WIDE_HEADS, "norms": NORMS, "biases": BIASES}
PACKED = 1e-5  # per-tensor relative error against documents alone: both are float32

Arrays = dict[str, np.ndarray]


def drawn(vocab: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, targets and starts (COUNT, LENGTH); some targets are not counted."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (COUNT, LENGTH))
    targets = rng.integers(0, vocab, (COUNT, LENGTH))
    starts = np.zeros((COUNT, LENGTH), bool)
    targets[rng.random((COUNT, LENGTH)) < 0.3] = -100
    for row, borders in enumerate(BORDERS):
        starts[row, borders] = True
        targets[row, [border - 1 for border in borders]] = -100
    return tokens, targets, starts


def documents(starts: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Yield sequence and tokens of each document."""
    for row in range(len(starts)):
        edges = [0, *(at for at in np.flatnonzero(starts[row]) if at), starts.shape[1]]
        for first, last in itertools.pairwise(edges):
            yield row, slice(first, last)


def alone(
    engine: Engine, tokens: np.ndarray, targets: np.ndarray, starts: np.ndarray
) -> tuple[Arrays, np.ndarray, np.ndarray]:
    """Compute each document by itself: mean gradients, losses, logits."""
    losses = np.zeros(tokens.shape)
    logits = np.zeros((*tokens.shape, engine.model.config.vocab_size), np.float32)
    for row, part in documents(starts):
        logits[row, part] = engine.logits(tokens[row, part])
        if (targets[row, part] >= 0).any():
            losses[row, part] = engine.losses(tokens[row, part], targets[row, part])
            engine.step(tokens[row, part], targets[row, part])
    factor = engine.unit / engine.counted
    return {name: g * factor for name, g in engine.gradients.items()}, losses, logits


def long_family(name: str, folder: Path) -> Model:
    families.save(name, folder, max_position_embeddings=LENGTH)
    return Model.load(folder)


@pytest.mark.parametrize("name", families.CASES)
def test_packed_documents_train_as_each_alone(tmp_path: Path, name: str) -> None:
    model = long_family(name, tmp_path)
    tokens, targets, starts = drawn(model.config.vocab_size)
    with Engine(model, device="cpu", precision="fp32", threads=2) as engine:
        gradients, losses, logits = alone(engine, tokens, targets, starts)
        engine.discard()
        stats = engine.step(tokens, targets, starts)
        assert stats.tokens == engine.counted == np.count_nonzero(targets >= 0)
        assert_tensors_close(dict(engine.gradients), gradients, PACKED)
        assert stats.loss == pytest.approx(losses.sum() / stats.tokens, rel=1e-6)
        assert relative_error(engine.logits(tokens, starts), logits) < tolerances.FP32_LOGITS
        found = engine.losses(tokens, targets, starts)
        assert np.abs(found - losses).max() < 1e-5
        assert engine.evaluate(tokens, targets, starts) == pytest.approx(stats.loss, rel=1e-6)


@functools.cache
def expected(name: str) -> tuple[float, Arrays]:
    """Return the mean loss and its gradients in float64, each document alone."""
    config = CONFIGS[name]
    tokens, targets, starts = (values[:, : config.seq_len] for values in drawn(config.vocab_size))
    weights, total, sums = make_model(config).weights, 0.0, dict[str, np.ndarray]()
    for row, part in documents(starts):
        count = np.count_nonzero(targets[row, part] >= 0)
        if count:
            loss, gradients = ref.loss_and_gradients(
                weights, config, tokens[row, part], targets[row, part]
            )
            total += loss * count
            sums = {k: g * count + sums.get(k, 0.0) for k, g in gradients.items()}
    counted = np.count_nonzero(targets >= 0)
    return total / counted, {k: g / counted for k, g in sums.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["baseline", "opt", "ane", "max"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_step_matches_float64(name: str, variant: str, precision: str) -> None:
    needs.precision(precision)
    config, bf16 = CONFIGS[name], precision == "bf16"
    tokens, targets, starts = (values[:, : config.seq_len] for values in drawn(config.vocab_size))
    loss, gradients = expected(name)
    with Engine(make_model(config), variant, "cpu", precision, threads=2) as engine:
        for _ in range(2):  # the second sees what the first has left in the buffers
            stats = engine.step(tokens, targets, starts)
            assert stats.loss == pytest.approx(loss, rel=tolerances.BF16_LOSS if bf16 else 5e-6)
            for key in gradients:
                bar, cosine = tolerances.FP32_GRADIENT, None
                if bf16:
                    bar, cosine = tolerances.BF16_GRADIENT, tolerances.BF16_COSINE
                if bf16 and key.endswith("wk.bias"):
                    bar, cosine = tolerances.BF16_KEY_BIAS, None
                assert_tensors_close(
                    {key: engine.gradients[key]}, {key: gradients[key]}, bar, min_cosine=cosine
                )
            engine.discard()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sequence_that_is_one_document_has_the_bits_of_one_without_starts(precision: str) -> None:
    needs.precision(precision)
    tokens, targets, _ = (values[:, :129] for values in drawn(GQA.vocab_size))
    first = np.zeros(tokens.shape, int)
    first[:, 0] = 1
    with Engine(make_model(), "max", "cpu", precision, threads=2) as engine:
        found = []
        for starts in (None, first, np.zeros(tokens.shape, bool), None):
            stats = engine.step(tokens, targets, starts)
            logits = engine.logits(tokens, starts).tobytes()
            found.append((stats.loss, bits(engine.gradients), logits))
            engine.discard()
            engine.step(tokens, targets, np.ones(tokens.shape, bool))
            engine.discard()
        assert all(other == found[0] for other in found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_step_has_the_same_bits_on_any_number_of_threads(precision: str) -> None:
    needs.precision(precision)
    tokens, targets, starts = (values[:, :129] for values in drawn(GQA.vocab_size))
    found = []
    for threads in (1, 2, 3):
        with Engine(make_model(), "max", "cpu", precision, threads=threads) as engine:
            loss = engine.step(tokens, targets, starts).loss
            found.append((loss, bits(engine.gradients)))
    assert found[0] == found[1] == found[2]


def test_what_stands_in_one_document_changes_nothing_in_another() -> None:
    tokens, _, starts = (values[:1, :129] for values in drawn(GQA.vocab_size))
    other = tokens.copy()
    other[0, 64:128] = (other[0, 64:128] + 1) % GQA.vocab_size
    with make_engine(threads=2) as engine:
        logits, changed = engine.logits(tokens, starts), engine.logits(other, starts)
        assert np.array_equal(logits[0, :64], changed[0, :64])
        assert np.array_equal(logits[0, 128:], changed[0, 128:])
        assert not np.array_equal(logits[0, 64:128], changed[0, 64:128])


def test_one_sequence_takes_starts_of_its_own_shape() -> None:
    tokens, targets, starts = (values[0, :70] for values in drawn(SEPARATE.vocab_size))
    with make_engine(SEPARATE) as engine:
        loss = engine.step(tokens, targets, list(starts)).loss
        assert loss == engine.step(tokens[None], targets[None], starts[None]).loss


def test_wrong_starts_are_refused_in_one_line() -> None:
    tokens, targets, starts = (values[:, :70] for values in drawn(SEPARATE.vocab_size))
    with make_engine(SEPARATE) as engine:
        for wrong in (starts[0], starts[:, 1:], starts.astype(float), [[True], [True, False]], "a"):
            text = message(lambda wrong=wrong: engine.step(tokens, targets, wrong), ConfigError)
            assert "starts" in text
        assert engine.accumulated == 0


def test_the_simulator_says_that_packing_needs_the_cpu() -> None:
    tokens, targets, starts = (values[:2, :50] for values in drawn(SEPARATE.vocab_size))
    with Engine(make_model(SEPARATE), device="sim", seq_len=64) as engine:
        engine.step(tokens, targets)
        before = bits(engine.gradients)
        for call in (engine.step, engine.losses, engine.evaluate):
            text = message(lambda call=call: call(tokens, targets, starts), ConfigError)
            assert "device sim" in text and "device cpu" in text
        assert "device cpu" in message(lambda: engine.logits(tokens, starts), ConfigError)
        assert bits(engine.gradients) == before and engine.accumulated == 1
