"""Text generation: sampling, streaming, and agreement with llama2.c's run.c."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest

from anepy.engine import Decoder
from anepy.errors import ClosedError, ConfigError, ModelError, TokenizerError
from anepy.models.model import Model, ModelConfig
from anepy.text.generation import Sampling, generate, stream, until
from anepy.text.tokenizer import Tokenizer
from anepy.text.tokenizer_pieces import PieceTokenizer
from anepy.text.tokenizer_stored import resolve_tokenizer

MODULE = importlib.import_module("anepy.text.generation")
SMALL = ModelConfig(
    dim=16, hidden_dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=259, seq_len=32
)
# The beginning of what run.c prints for stories260K.bin at temperature 0 without a prompt.
GREEDY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. "
)


def scripted(ids: Sequence[int]) -> type:
    """Return a decoder whose likeliest token at position i is `ids[i]`."""

    class Scripted:
        def __init__(self, model: Model, max_len: int | None = None, threads: Any = None) -> None:
            self.max_len = max_len

        def __enter__(self) -> Scripted:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def forward(self, token: int, position: int) -> np.ndarray:
            assert self.max_len is not None and position < self.max_len
            logits = np.zeros(259, np.float32)
            logits[ids[position]] = 9.0
            return logits

        def prefill(self, tokens: Sequence[int]) -> np.ndarray:
            return self.forward(tokens[-1], len(tokens) - 1)

    return Scripted


def byte_ids(text: bytes) -> list[int]:
    return [value + 3 for value in text]


# Sampling


def test_sampling_at_temperature_zero_takes_the_first_of_the_likeliest() -> None:
    sampling = Sampling(0.0, 0.9, seed=0)
    assert sampling.pick(np.array([0, 3, 3, 1], np.float32)) == 1


def test_sampling_frequencies_follow_the_distribution() -> None:
    chances = np.array([0.5, 0.3, 0.15, 0.05])
    sampling = Sampling(1.0, 1.0, seed=1)
    logits = np.log(chances).astype(np.float32)
    counts = np.bincount([sampling.pick(logits) for _ in range(8000)], minlength=4)
    # Five standard deviations of a binomial count.
    assert np.all(np.abs(counts / 8000 - chances) < 5 * np.sqrt(chances * (1 - chances) / 8000))


def test_sampling_temperature_sharpens() -> None:
    logits = np.log(np.array([0.6, 0.4])).astype(np.float32)
    cold = Sampling(0.25, 1.0, seed=1)
    share = np.mean([cold.pick(logits) == 0 for _ in range(4000)])
    expected = 0.6**4 / (0.6**4 + 0.4**4)
    assert abs(share - expected) < 0.04


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(0.4, {2}), (0.5, {2, 0}), (0.81, {2, 0, 3}), (0.0, {0, 1, 2, 3})]
)
def test_sampling_top_p_keeps_the_smallest_set_that_exceeds_it(
    top_p: float, allowed: set[int]
) -> None:
    # 0.5 is not exceeded by the first token alone: run.c then adds the second.
    logits = np.log(np.array([0.25, 0.0625, 0.5, 0.1875])).astype(np.float32)
    sampling = Sampling(1.0, top_p, seed=0)
    assert {sampling.pick(logits) for _ in range(500)} == allowed


def test_sampling_same_seed_gives_same_tokens() -> None:
    logits = np.zeros(50, np.float32)
    draws = [[Sampling(1.0, 0.9, seed).pick(logits) for _ in range(9)] for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_sampling_extreme_logits_do_not_overflow() -> None:
    assert Sampling(1e-3, 0.9, 0).pick(np.array([-3e38, 3e38, 0], np.float32)) == 1


# Streaming


def test_stream_never_yields_half_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "aä€😀z".encode()
    monkeypatch.setattr(MODULE, "Decoder", scripted([*byte_ids(text), 1]))
    pieces = list(stream(Model.init(SMALL), "", Tokenizer.bytes(), temperature=0.0))
    assert pieces == ["a", "ä", "€", "😀", "z"]


def test_stream_broken_characters_become_replacements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "Decoder", scripted([*byte_ids(b"a\xe2\x82b\xe2"), 1]))
    assert generate(Model.init(SMALL), "", Tokenizer.bytes(), temperature=0.0) == "a\ufffdb\ufffd"


def test_stream_drops_control_characters_but_keeps_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "Decoder", scripted([*byte_ids(b"a\x07\x1b\n\tb\x00\x7f"), 1]))
    assert generate(Model.init(SMALL), "", Tokenizer.bytes(), temperature=0.0) == "a\n\tb"


def test_generate_stops_at_bos_and_at_max_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "Decoder", scripted([*byte_ids(b"abcdef"), 1, 90]))
    model, words = Model.init(SMALL), Tokenizer.bytes()
    assert generate(model, "", words, temperature=0.0) == "abcdef"
    assert generate(model, "", words, temperature=0.0, max_tokens=2) == "ab"
    assert generate(model, "", words, temperature=0.0, max_tokens=0) == ""
    # BOS, the space the tokenizer puts first, and the prompt take three positions.
    assert generate(model, "xy", words, temperature=0.0, max_tokens=2) == "xyde"


def test_generate_fills_the_context_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "Decoder", scripted(byte_ids(b"k" * SMALL.seq_len)))
    text = generate(Model.init(SMALL), "", Tokenizer.bytes(), temperature=0.0, max_tokens=1000)
    assert text == "k" * SMALL.seq_len


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 1.5), ("max_tokens", -1)],
)
def test_stream_bad_setting_is_refused_before_the_first_piece(setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        stream(Model.init(SMALL), "", Tokenizer.bytes(), **{setting: value})  # type: ignore[arg-type]


def test_stream_too_long_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="context is 32"):
        stream(Model.init(SMALL), "x" * 32, Tokenizer.bytes())


def test_generate_with_a_decoder_is_that_with_its_model() -> None:
    """Text after text in the same memory; the decoder stays open."""
    model, words = Model.init(SMALL, seed=4), Tokenizer.bytes()
    with Decoder(model, max_len=20) as decoder:
        for seed in (1, 2):
            text = generate(decoder, "ab", words, max_tokens=9, seed=seed)
            assert text == generate(model, "ab", words, max_tokens=9, seed=seed)
        cut = generate(decoder, "ab", words, max_tokens=100, seed=1)
        assert generate(model, "ab", words, max_tokens=100, seed=1).startswith(cut)
        with pytest.raises(ConfigError, match="leave threads out"):
            stream(decoder, "", words, threads=1)
        with pytest.raises(ConfigError, match="context is 20"):
            stream(decoder, "x" * 20, words)
    with pytest.raises(ClosedError):
        generate(decoder, "", words)


def test_generate_has_the_arguments_of_stream() -> None:
    assert inspect.signature(generate) == inspect.signature(stream)
    assert generate.__name__ == "generate" and "stream" in (generate.__doc__ or "")


# Finding the tokenizer


def test_resolve_prefers_the_tokenizer_named_after_the_vocabulary(tmp_path: Path) -> None:
    words = Tokenizer.bytes()
    words.save(tmp_path / "tok259.bin")
    bigger = PieceTokenizer([*words._entries, b"zz"], [*words._scores, 0.0])
    bigger.save(tmp_path / "tokenizer.bin")
    assert resolve_tokenizer(None, of_size(259, tmp_path)).name == "tok259.bin"
    assert resolve_tokenizer(None, of_size(260, tmp_path)).name == "tokenizer.bin"
    with pytest.raises(TokenizerError, match="--tokenizer"):
        resolve_tokenizer(None, of_size(300, tmp_path))
    with pytest.raises(TokenizerError, match="260"):
        resolve_tokenizer(tmp_path / "tokenizer.bin", of_size(259))
    # A model may have rows without a token where the tokenizer is named.
    assert resolve_tokenizer(tmp_path / "tokenizer.bin", of_size(300)).vocab_size == 260


def of_size(vocab_size: int, folder: Path | None = None) -> Model:
    model = Model.init(ModelConfig(16, 32, 1, 2, 2, vocab_size, 32))
    model.path = folder / "m.bin" if folder is not None else None
    return model


def test_resolve_byte_vocabulary_needs_no_file() -> None:
    assert resolve_tokenizer(None, of_size(259)).vocab_size == 259
    with pytest.raises(TokenizerError, match="--tokenizer"):
        resolve_tokenizer(None, of_size(512))


def test_stream_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(TokenizerError, match="259 tokens, but the model's vocabulary has 200"):
        stream(of_size(200), "", Tokenizer.bytes())


def test_generate_draws_only_tokens_that_the_tokenizer_has() -> None:
    model = of_size(300)
    model.weights["tok_embeddings.weight"][259:] *= 1000.0
    text = generate(model, "a", Tokenizer.bytes(), temperature=1.5, max_tokens=30)
    assert text.startswith("a")


def test_generate_stops_at_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "Decoder", scripted([*byte_ids(b"abc"), 2, *byte_ids(b"def")]))
    assert generate(Model.init(SMALL), "", Tokenizer.bytes(), temperature=0.0) == "abc"


def test_generate_stops_before_a_string(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "Decoder", scripted([*byte_ids(b"one. two"), 1]))
    model, words = Model.init(SMALL), Tokenizer.bytes()
    assert generate(model, "", words, temperature=0.0, stop=". t") == "one"
    assert generate(model, "", words, temperature=0.0, stop=["tw", "e. x"]) == "one. "
    with pytest.raises(ConfigError, match="stop string is empty"):
        generate(model, "", words, stop="")


def test_until_holds_back_what_may_be_the_begin_of_an_end() -> None:
    pieces = ["a", "<", "|", "x", "<|", "e", "nd|>", "never"]
    assert list(until(iter(pieces), ["<|end|>", "zz"])) == ["a", "<|x"]
    assert list(until(iter(["a", "<|e"]), ["<|end|>"])) == ["a", "<|e"]
    assert list(until(iter(["a", "b"]), [])) == ["a", "b"]


def test_generate_missing_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing\.bin") as caught:
        generate(tmp_path / "missing.bin", "x")
    assert "\n" not in str(caught.value)


# A real model


def test_generate_greedy_prints_what_run_c_prints() -> None:
    model, words = needs.data("stories260K.bin"), needs.data("tok512.bin")
    assert generate(model, "", words, temperature=0.0, max_tokens=200).startswith(GREEDY)
    prompted = generate(model, "Once upon a time", words, temperature=0.0, max_tokens=200)
    assert prompted.startswith(GREEDY)


def test_generate_sampled_text_depends_on_the_seed_alone() -> None:
    model, words = Model.load(needs.data("stories260K.bin")), needs.data("tok512.bin")
    texts = [
        generate(model, "One day", words, max_tokens=40, seed=seed, threads=1) for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("One day") and len(texts[0]) > 40


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 5e-324])
def test_sampling_near_zero_takes_the_likeliest(temperature: float) -> None:
    logits = np.array([1e30, 3e38, -3e38, 0.0], np.float32)
    assert Sampling(temperature, 0.9, 0).pick(logits) == 1
    assert Sampling(temperature, 1.0, 0).pick(logits) == 1
