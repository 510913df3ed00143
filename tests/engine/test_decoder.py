"""The decoder: the engine's logits, of a prompt at once and one token at a time."""

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
from reference import llama64 as ref
from tolerances import relative_error

from anepy.engine import Decoder
from anepy.errors import AnepyError, ClosedError
from anepy.models.model import ModelConfig

FAMILIES = pytest.mark.parametrize(
    "config",
    [GQA, SEPARATE, WIDE_HEADS, NARROW_HEADS, BIASES, NORMS],
    ids=["gqa", "separate", "wide-heads", "narrow-heads", "biases", "norms"],
)


@FAMILIES
@pytest.mark.parametrize("threads", [1, 3])
def test_decoder_logits_are_those_of_the_engine(config: ModelConfig, threads: int) -> None:
    tokens, _ = sequence(config, 70)
    with make_engine(config) as engine, Decoder(engine.model, threads=threads) as decoder:
        expected = engine.logits(tokens)
        for position, token in enumerate(tokens):
            logits = decoder.forward(int(token), position)
            assert logits.shape == (config.vocab_size,) and logits.dtype == np.float32
            assert relative_error(logits, expected[position]) < tolerances.FP32_LOGITS, position


@FAMILIES
@pytest.mark.parametrize("first", [0, 1, 5, 66])
def test_prompt_in_one_pass_has_the_logits_of_float64(config: ModelConfig, first: int) -> None:
    """After what was read before: nothing, a token, a few, more than a block of them."""
    tokens, _ = sequence(config, 70)
    with Decoder(make_model(config), threads=2) as decoder:
        if first:
            decoder.prefill(tokens[:first])
        logits = decoder.prefill(tokens[first:], first)
        assert logits.shape == (config.vocab_size,) and logits.dtype == np.float32
        exact = ref.forward(decoder.model.weights, config, tokens)
        assert relative_error(logits, exact[-1]) < tolerances.FP32_LOGITS


def test_prompt_of_several_passes_is_that_of_single_tokens() -> None:
    config = ModelConfig(24, 40, 2, 4, 2, 97, 1300)
    tokens, _ = sequence(config, 1291)
    with Decoder(make_model(config), threads=2) as one, Decoder(one.model, threads=1) as other:
        for position, token in enumerate(tokens):
            expected = one.forward(int(token), position)
        logits = other.prefill(tokens)
        assert relative_error(logits, expected) < tolerances.FP32_LOGITS
        following = int(np.argmax(expected))
        expected = one.forward(following, len(tokens)).copy()
        assert (
            relative_error(other.forward(following, len(tokens)), expected) < tolerances.FP32_LOGITS
        )


def test_prompt_in_one_pass_does_not_depend_on_the_threads() -> None:
    tokens, _ = sequence(GQA, 129)
    results = []
    for threads in (1, 2, 5):
        with Decoder(make_model(), threads=threads) as decoder:
            results.append(decoder.prefill(tokens).tobytes())
    assert results[0] == results[1] == results[2]


def test_prompt_that_is_refused_changes_nothing() -> None:
    with Decoder(make_model(), max_len=20) as decoder:
        expected = decoder.prefill([5, 9, 2, 7, 1]).copy()
        for tokens, position, what in (
            ([], 0, "tokens"),
            ([[1, 2], [3, 4]], 5, "one sequence"),
            ([0.5, 2.0], 5, "float64"),
            ([1, 523], 5, "523"),
            ([-1, 3], 5, "-1"),
            ([1, 2**32], 5, "4294967296"),
            (range(21), 0, "room for 20"),
            (range(16), 5, "room for 20"),
            ([1, 2], -1, "-1"),
        ):
            assert what in message(lambda t=tokens, p=position: decoder.prefill(t, p))
        message(lambda: decoder.prefill([1, 2], 4), AnepyError)
        after = decoder.forward(3, 5).copy()
        assert (decoder.prefill([5, 9, 2, 7, 1]) == expected).all()
        assert (decoder.forward(3, 5) == after).all()
        decoder.prefill(range(14), 6)


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
    assert "this Decoder was closed" in message(lambda: decoder.prefill([1]), ClosedError)
