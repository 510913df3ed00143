"""GGUF files: what llama.cpp and transformers make of them is what anepy does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import llama_cpp
import needs
import numpy as np
import pytest
from cases import message
from reference import llama64 as ref
from tolerances import relative_error

from anepy.errors import ModelError
from anepy.models import gguf, huggingface, rope
from anepy.models.model import Model, ModelConfig
from anepy.models.stored_tokenizer import StoredTokenizer
from anepy.text.tokenizer import Tokenizer
from anepy.text.tokenizer_pieces import PieceTokenizer, byte_tokenizer

# Enough for the special tokens, the bytes and a few words.
VOCABULARY = 300


def words() -> Tokenizer:
    """Return a tokenizer of `VOCABULARY` tokens: bytes, and pairs of letters that merge."""
    entries, scores = byte_tokenizer().pieces()
    entries = [*entries[:3], *(b"<0x%02X>" % n for n in range(256))]
    letters = [bytes([n]) for n in b"abcdefgh nopqrstw0123456789"]
    pairs = [b" " + letters[n] for n in range(8)] + [b"ab", b"cd", b"abcd", b" abcd", b"efgh"]
    entries += [*letters, *pairs, b"\xc3\xa9"]
    assert len(entries) == VOCABULARY
    scores = [0.0] * 259 + [-1.0 - n for n in range(len(entries) - 259)]
    return PieceTokenizer(entries, scores)


def load(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    stored = gguf.open_file(path)
    weights = {n: np.full(s, np.nan, "f4") for n, s in ref.tensor_shapes(stored.config).items()}
    stored.fill(weights)
    return stored.config, weights


def made(name: str, folder: Path) -> tuple[Any, ModelConfig, dict[str, Any]]:
    """Return a model of transformers, with its configuration and weights as anepy reads them."""
    theirs = families.save(name, folder, vocab_size=VOCABULARY)
    stored = huggingface.open_folder(folder)
    weights = {n: np.zeros(s, "f4") for n, s in ref.tensor_shapes(stored.config).items()}
    stored.fill(weights)
    return theirs, stored.config, weights


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.mark.parametrize("name", families.CASES)
def test_file_of_every_family_computes_the_same_in_llama_cpp(tmp_path: Path, name: str) -> None:
    theirs, config, weights = made(name, tmp_path)
    path = tmp_path / "model.gguf"
    assert gguf.save(path, config, weights, "f32", words()) == path.stat().st_size
    again, copies = load(path)
    assert again == config
    for tensor, values in weights.items():
        np.testing.assert_array_equal(copies[tensor], values, err_msg=tensor)
    ids = families.sequence(theirs, 40)
    expected = log_softmax(ref.forward(weights, config, ids)[-1])
    assert np.abs(llama_cpp.log_probabilities(path, ids) - expected).max() < 2e-5


# Others: transformers ignores the scaling of a GGUF file, and Qwen3's width of heads.
@pytest.mark.parametrize("name", ["llama2", "theta-tied", "wide-heads", "qwen2", "mistral"])
def test_file_loads_in_transformers(tmp_path: Path, name: str) -> None:
    transformers = needs.peer("transformers")
    needs.peer("accelerate")
    theirs, config, weights = made(name, tmp_path)
    gguf.save(tmp_path / "model.gguf", config, weights, "f32", words())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    ids = families.sequence(theirs)
    assert np.abs(families.logits_of(again, ids) - families.logits_of(theirs, ids)).max() < 1e-5


# ---------------------------------------------------------------------------- types


@pytest.mark.parametrize(
    ("dtype", "error"), [("f16", 2.0**-11), ("bf16", 2.0**-8), ("q8_0", 2.0**-7)]
)
def test_smaller_types_lose_no_more_than_their_rounding(
    tmp_path: Path, dtype: str, error: float
) -> None:
    needs.module("gguf")
    config, weights = small(dim=64, hidden_dim=96, qkv_bias=True)
    path = tmp_path / "model.gguf"
    gguf.save(path, config, weights, dtype, words())
    _, copies = load(path)
    for name, values in weights.items():
        if values.ndim == 1:
            np.testing.assert_array_equal(copies[name], values, err_msg=name)
        else:
            assert 0 < relative_error(copies[name], values) < error, name
    ids = np.arange(3, 30)
    found = llama_cpp.log_probabilities(path, ids)
    # llama.cpp rounds activations too: to 8 bits beside Q8_0, to 16 bits beside the others.
    allowed = {"f16": 2e-3, "bf16": 1e-2, "q8_0": 3e-2}[dtype]
    assert relative_error(found, log_softmax(ref.forward(copies, config, ids)[-1])) < allowed


def test_rows_that_are_no_blocks_stay_f32_in_q8_0(tmp_path: Path) -> None:
    needs.module("gguf")
    config, weights = small(dim=64, hidden_dim=40)
    gguf.save(tmp_path / "model.gguf", config, weights, "q8_0", words())
    _, copies = load(tmp_path / "model.gguf")
    w2 = "layers.0.feed_forward.w2.weight"
    np.testing.assert_array_equal(copies[w2], weights[w2])
    assert relative_error(copies["norm.weight"], weights["norm.weight"]) == 0
    assert relative_error(copies["tok_embeddings.weight"], weights["tok_embeddings.weight"]) > 0


@pytest.mark.parametrize(
    "kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
)
def test_quantized_file_computes_the_same_in_llama_cpp(tmp_path: Path, kind: str) -> None:
    """Random blocks, since the package makes no K types: their scales small, all else at random."""
    package = needs.module("gguf")
    config, _ = small(dim=256, hidden_dim=256, n_heads=4, n_kv_heads=4)
    random = np.random.default_rng(1)
    qtype = package.GGMLQuantizationType[kind]
    block, nbytes = package.GGML_QUANT_SIZES[qtype]
    # Where the binary16 scales of a block are.
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    at = scales.get(kind, (0, 2) if kind.endswith("1") else (0,))
    size = 1e-4 if kind == "Q6_K" else 1e-3  # its inner scales have the widest range

    def change(tensors: dict[str, Any]) -> None:
        for name, (values, _) in tensors.items():
            if values.ndim == 2:
                rows = random.integers(
                    0, 256, (len(values), values.shape[1] // block, nbytes), "u1"
                )
                for offset in at:
                    scale = random.uniform(-size, size, rows.shape[:2]).astype("<f2")
                    rows[..., offset : offset + 2] = scale[..., None].view("u1")
                tensors[name] = (rows.reshape(len(values), -1), qtype)

    path = write(tmp_path / "model.gguf", config, change=change)
    again, weights = load(path)
    assert again == config
    ids = np.arange(3, 40)
    expected = log_softmax(ref.forward(weights, config, ids)[-1])
    assert np.ptp(expected) > 0.5
    found = llama_cpp.log_probabilities(path, ids)
    assert relative_error(found, expected) < 3e-2


# ---------------------------------------------------------------------------- tokenizers


def test_tokenizer_of_llama2c_becomes_one_of_llama_cpp(tmp_path: Path) -> None:
    needs.module("gguf")
    config, weights = small()
    path = tmp_path / "model.gguf"
    gguf.save(path, config, weights, "f32", words())
    texts = ["abcd efgh", "hello", "a b  c", "café 日\n", "abcdabcd abcd", "w1 w40", "<s>ab", ""]
    found = llama_cpp.ask(path, *({"text": text} for text in texts))
    assert found == [words().encode(text) for text in texts]
    with pytest.raises(ModelError, match="its tokenizer has 300 tokens, the model 299"):
        gguf.save(path, small(vocab_size=299)[0], small(vocab_size=299)[1], "f32", words())


def test_real_tokenizer_gives_the_same_ids_in_llama_cpp(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(needs.data("tokenizer.bin"))
    needs.module("gguf")
    config, weights = small(vocab_size=tokenizer.vocab_size)
    path = tmp_path / "model.gguf"
    gguf.save(path, config, weights, "f32", tokenizer)
    texts = needs.data("tinystories_sample.txt").read_text("utf-8").split("<|endoftext|>")[:3]
    texts = [text.strip() for text in texts] + ["Grüße, 世界! 1,234.5"]
    found = llama_cpp.ask(path, *({"text": text} for text in texts))
    assert found == [tokenizer.encode(text) for text in texts]


def test_tokenizer_of_a_file_comes_along_as_it_is(tmp_path: Path) -> None:
    package = needs.module("gguf")
    config, weights = small()
    gguf.save(tmp_path / "a.gguf", config, weights, "f32", words())
    stored = gguf.open_file(tmp_path / "a.gguf")
    assert stored.tokenizer is not None
    fields = dict(stored.tokenizer.fields)
    fields["tokenizer.chat_template"] = ((8,), "{{ messages }}")
    gguf.save(tmp_path / "b.gguf", config, weights, "f16", StoredTokenizer("gguf", fields=fields))
    again = gguf.open_file(tmp_path / "b.gguf").tokenizer
    assert again is not None and dict(again.fields) == fields
    types = package.GGUFReader(tmp_path / "b.gguf").fields["tokenizer.ggml.scores"].types
    assert [kind.name for kind in types] == ["ARRAY", "FLOAT32"]


def test_model_without_tokenizer_says_so(tmp_path: Path) -> None:
    needs.module("gguf")
    config, weights = small()
    for tokenizer in (None, StoredTokenizer("huggingface", files={"tokenizer.json": b"{}"})):
        with pytest.warns(UserWarning, match=r"model\.gguf gets no tokenizer"):
            gguf.save(tmp_path / "model.gguf", config, weights, "f32", tokenizer)
    assert load(tmp_path / "model.gguf")[0] == config


# ---------------------------------------------------------------------------- RoPE


def test_scaling_is_found_again_from_its_factors() -> None:
    random = np.random.default_rng(4)
    for case in range(300):
        width = int(random.choice([4, 16, 64, 128]))
        theta = float(random.choice([50.0, 1e4, 5e5]))
        low = float(random.uniform(0.2, 4))
        scaling = {
            "factor": float(random.uniform(1.5, 64)),
            "low_freq_factor": low,
            "high_freq_factor": low + float(random.uniform(0.1, 8)),
            "original_max_position_embeddings": int(random.choice([24, 512, 8192])),
        }
        divisors = rope.divisors(theta, width, scaling).astype("f4").astype("f8")
        length = scaling["original_max_position_embeddings"] if case % 2 else None
        found = rope.scaling_of(divisors, theta, length)
        if found is None:
            assert (divisors == 1).all()
        elif found["rope_type"] == "linear":
            np.testing.assert_allclose(divisors, found["factor"], rtol=1e-6)
        else:
            again = rope.divisors(theta, width, found)
            np.testing.assert_allclose(again, divisors, rtol=1e-5)


def test_llama_3_2_is_found_with_its_own_numbers() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    divisors = rope.divisors(5e5, 64, scaling).astype("f4").astype("f8")
    assert rope.scaling_of(divisors, 5e5) == scaling


@pytest.mark.parametrize(
    "divisors", [[1, 2, 1, 3], [4, 2, 1, 1], [1, 0, 1, 1], [1, np.nan, 2, 2], [0.5, 0.7, 1, 1]]
)
def test_factors_of_no_scaling_are_refused(divisors: list[float]) -> None:
    with pytest.raises(ValueError):
        rope.scaling_of(np.array(divisors, "f8"), 10000.0)


# ---------------------------------------------------------------------------- refusals


def small(**changes: Any) -> tuple[ModelConfig, dict[str, Any]]:
    sizes = dict(dim=32, hidden_dim=32, n_layers=1, n_heads=2, n_kv_heads=1, seq_len=64)
    config = ModelConfig(**sizes | {"vocab_size": VOCABULARY} | changes)
    return config, ref.random_weights(config, 1, 0.2)


_NAMES = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def write(
    path: Path,
    config: ModelConfig,
    arch: str = "llama",
    change: Callable[[dict[str, Any]], None] = lambda tensors: None,
    **settings: Any,
) -> Path:
    """Write a file with llama.cpp's package alone, some settings or tensors changed.

    A setting that is `...` is left out; `_` stands for a full stop where there are two of them.
    """
    package = needs.module("gguf")
    writer = package.GGUFWriter(path, arch)
    given = {
        "context_length": config.seq_len,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    } | {key.replace("__", "."): value for key, value in settings.items()}
    for key, value in given.items():
        if value is ...:
            continue
        first = value[0] if isinstance(value, list) else value
        kind = package.GGUFValueType.get_type(first)
        kind = package.GGUFValueType.UINT32 if isinstance(first, int) else kind
        kinds = (package.GGUFValueType.ARRAY, kind) if isinstance(value, list) else (kind,)
        writer.add_key_value(f"{arch}.{key}", value, *kinds)
    gguf._write_tokenizer(writer, package, path, config, words())
    tensors: dict[str, Any] = {}
    for name, values in ref.random_weights(config, 1, 0.2).items():
        stored = name.replace("layers.", "blk.").replace("tok_embeddings", "token_embd")
        stored = "output_norm.weight" if name == "norm.weight" else stored
        for ours, theirs in _NAMES.items():
            stored = stored.replace(ours, theirs)
        tensors[stored] = (values, None)
    change(tensors)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def failure(path: Path) -> str:
    text = message(lambda: Model.load(path), ModelError)
    assert str(path) in text
    return text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"arch": "gemma3"}, "general.architecture 'gemma3' is not supported"),
        ({"expert_count": 8}, "llama.expert_count is 8"),
        ({"logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ({"attention__scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"attention__sliding_window": 8}, "llama.attention.sliding_window is 8"),
        ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"rope__scaling__attn_factor": 1.5}, "llama.rope.scaling.attn_factor"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"attention__value_length": 8}, "llama.attention.value_length is 8"),
        ({"attention__key_length": 5, "attention__value_length": 5}, "an even number"),
        ({"attention__head_count": [2, 4], "block_count": 2}, "layers of one shape"),
        ({"attention__head_count_kv": 3}, "must divide the 2 heads"),
        ({"attention__head_count": 4}, "blk.0.attn_k.weight has shape [16, 32]"),
        ({"block_count": 2}, "holds no tensor blk.1.attn_norm.weight"),
        ({"block_count": 10**9}, "cannot be computed: n_layers is 1000000000"),
        ({"block_count": ...}, "llama.block_count is missing"),
        ({"embedding_length": 64}, "token_embd.weight has shape [300, 32]"),
        ({"attention__layer_norm_rms_epsilon": ...}, "epsilon is missing"),
        ({"vocab_size": 12}, "llama.vocab_size is 12; token_embd.weight has 300 rows"),
        ({"context_length": 0}, "llama.context_length is 0"),
    ],
)
def test_setting_is_refused_by_its_name(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    assert expected in failure(write(tmp_path / "m.gguf", small()[0], **settings))


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({}, {}),
        ({"rope__scaling__factor": 0.0, "expert_count": 0, "logit_scale": 0.0}, {}),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, {}),
        ({"attention__head_count": [2], "attention__sliding_window": 64}, {}),
        ({"rope__freq_base": 500000.0}, {"rope_theta": 500000.0}),
        ({"rope__scaling__factor": 4.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ({"rope__scale_linear": 4.0}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
        ({"attention__layer_norm_rms_epsilon": 1e-6}, {"norm_eps": 1e-6}),
    ],
)
def test_setting_is_read(tmp_path: Path, settings: dict[str, Any], changed: dict[str, Any]) -> None:
    config, _ = load(write(tmp_path / "m.gguf", small()[0], **settings))
    assert config == small(**changed)[0]


def test_damaged_file_is_named_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", small()[0])
    whole = path.read_bytes()
    load(path)
    cut = tmp_path / "cut.gguf"
    for length in [4, 7, 8, 20, 24, 30, *range(100, len(whole), len(whole) // 40), len(whole) - 32]:
        cut.write_bytes(whole[:length])
        assert "no whole GGUF file" in failure(cut)
    path.write_bytes(whole[:4] + b"\x09\0\0\0" + whole[8:])
    assert "a GGUF file of version 9, the package gguf reads 2 and 3" in failure(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("output_norm.weight"), "holds no tensor output_norm.weight"),
        (lambda t: t.pop("token_embd.weight"), "holds no tensor token_embd.weight"),
        (lambda t: t.update({"blk.0.ffn_up.bias": (np.ones(32, "f4"), None)}), "blk.0.ffn_up.bias"),
        (
            lambda t: t.update({"blk.0.attn_q.bias": (np.ones(32, "f4"), None)}),
            "holds no tensor blk.0.attn_k.bias",
        ),
        (
            lambda t: t.update({"output_norm.weight": (np.full(32, np.inf, "f4"), None)}),
            "output_norm.weight has NaN or infinite",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": (np.array([1, 9, 2], "f4"), None)}),
            "rope_freqs.weight are not supported: there are 3 for heads of 16",
        ),
        (
            lambda t: t.update({"rope_freqs.weight": (np.array([1, 9, 2] + [1] * 5, "f4"), None)}),
            "rope_freqs.weight are not supported: no linear scaling",
        ),
    ],
)
def test_tensor_is_refused_by_its_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    assert expected in failure(write(tmp_path / "m.gguf", small()[0], change=change))


def test_scaling_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config, weights = small(qkv_bias=True, rope_scaling=scaling)
    needs.module("gguf")
    with pytest.raises(ModelError, match="qwen2 has no rope_scaling llama3"):
        gguf.save(tmp_path / "m.gguf", config, weights, "f32", words())
    assert not list(tmp_path.iterdir())


def test_save_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    needs.module("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(b"older")
    config, weights = small()
    weights["layers.0.feed_forward.w1.weight"][0, 0] = 1e6
    with warnings.catch_warnings(), pytest.raises(ModelError, match="too large for f16"):
        gguf.save(path, config, weights, "f16", words())
    assert path.read_bytes() == b"older" and len(list(tmp_path.iterdir())) == 1
