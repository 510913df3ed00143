"""The decoder: the engine's logits, one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import tolerances
from cases import (
    BIASES,
    GQA,
    NARROW_HEADS,
    NORMS,
    SEPARATE,
    WIDE_HEADS,
    make_engine,
    make_model,
    message,
    sequence,
)
from tolerances import relative_error

from anepy.engine import Decoder
from anepy.errors import AnepyError, ClosedError
from anepy.models.model import ModelConfig


@pytest.mark.parametrize(
    "config",
    [GQA, SEPARATE, WIDE_HEADS, NARROW_HEADS, BIASES, NORMS],
    ids=["gqa", "separate", "wide-heads", "narrow-heads", "biases", "norms"],
)
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
            message(lambda p=position: decoder.forward(1, p), AnepyError)
        for token in (523, -1, 2**32 + 1):
            said = message(lambda t=token: decoder.forward(t, 0))
            assert str(token) in said
        expected = [decoder.forward(t, p).copy() for p, t in enumerate((5, 9, 2))]
        for position in (1, 2, 4, 5, -1, 2**32, 2**32 + 3):
            message(lambda p=position: decoder.forward(1, p), AnepyError)
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
