"""Models whose matrices are stored as bf16 or q8: the same numbers wherever they are read."""

from __future__ import annotations

import copy
import math
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import needs
import numpy as np
import numpy.typing as npt
import pytest
from cases import (
    BIASES,
    GQA,
    NORMS,
    SEPARATE,
    WIDE_HEADS,
    bits,
    make_model,
    message,
    sequence,
)
from tolerances import relative_error

from anepy.engine import Decoder, Engine
from anepy.errors import ConfigError, ModelError
from anepy.models.lora import Lora
from anepy.models.model import Model, ModelConfig
from anepy.models.storage import Q8_BYTES, StoredTensors
from anepy.text.generation import stream
from anepy.text.tokenizer import Tokenizer
from anepy.training.trainer import Trainer

# Rows of 64, 96 and 192: whole blocks of 32; the others of `cases` have none and are bf16.
WHOLE = ModelConfig(64, 192, 2, 4, 2, 211, 129, head_dim=24)
SMALLER = pytest.mark.parametrize("storage", ["bf16", "q8"])
CONFIGS = pytest.mark.parametrize(
    "config",
    [WHOLE, GQA, SEPARATE, WIDE_HEADS, BIASES, NORMS],
    ids=["whole", "gqa", "separate", "wide-heads", "biases", "norms"],
)


def pair(storage: str, config: ModelConfig = WHOLE) -> tuple[Model, Model]:
    """Return a model stored so, and one with its very numbers in float32."""
    stored = make_model(config).stored(storage)
    return stored, stored.stored("f32")


def q8_of(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Round to blocks of 32 with a binary16 scale, as llama.cpp's reference does, in numpy."""
    blocks = values.reshape(-1, 32).astype(np.float32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    steps = blocks * inverse
    whole = np.sign(steps) * np.floor(np.abs(steps.astype(np.float64)) + 0.5)
    return (whole.astype(np.float32) * scale.astype(np.float16).astype(np.float32)).reshape(
        values.shape
    )


# What is stored


def test_matrices_are_rounded_and_vectors_are_not() -> None:
    model = make_model(WHOLE)
    for name, weight in model.weights.items():
        half = weight.view(np.uint32) + 0x7FFF + ((weight.view(np.uint32) >> 16) & 1)
        expected = {
            "bf16": (half >> 16 << 16).astype(np.uint32).view(np.float32),
            "q8": q8_of(weight) if weight.ndim == 2 else weight,
        }
        for storage, values in expected.items():
            found = model.stored(storage).weights[name]
            np.testing.assert_array_equal(found, values if weight.ndim == 2 else weight)


def test_rows_that_are_no_whole_blocks_are_bf16() -> None:
    config = ModelConfig(64, 72, 1, 2, 2, 40, 16)
    rows = make_model(config).stored("q8").table.rows
    assert rows["layers.0.feed_forward.w2.weight"].storage == "bf16"
    assert rows["layers.0.feed_forward.w1.weight"].storage == "q8"
    assert rows["norm.weight"].storage == "f32"


@SMALLER
def test_weights_of_a_smaller_model_are_copies_and_assigning_converts(storage: str) -> None:
    model = make_model(WHOLE).stored(storage)
    name = "layers.1.attention.wk.weight"
    assert isinstance(model.weights, StoredTensors) and model.storage == storage
    assert model.arena.dtype == np.uint8 and len(model.arena) < 0.55 * 4 * model.n_parameters
    with pytest.raises(ValueError, match="read-only"):
        model.weights[name][0] = 1.0
    others = {n: w for n, w in bits(dict(model.weights)).items() if n != name}
    model.weights[name] = np.full((48, 64), 127 / 64)
    assert (model.weights[name] == 127 / 64).all()
    assert {n: w for n, w in bits(dict(model.weights)).items() if n != name} == others
    for values, what in (
        (np.zeros((64, 48)), "has shape"),
        (np.zeros((48, 64), complex), "real numbers"),
        ([["a"] * 64] * 48, "real numbers"),
        (np.full((48, 64), np.nan), "finite"),
        (np.full((48, 64), 3.4e38), storage),
    ):
        assert what in message(lambda v=values: model.weights.__setitem__(name, v))
    assert "did you mean" in message(lambda: model.weights.__setitem__("norm.weigh", [1.0]))
    assert list(model.weights) == list(make_model(WHOLE).weights)


@SMALLER
def test_copies_and_pickles_keep_the_bytes(storage: str) -> None:
    model = make_model(WHOLE).stored(storage)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.stored(storage)):
        assert again.storage == storage and again.arena.tobytes() == model.arena.tobytes()
        assert again.arena.ctypes.data != model.arena.ctypes.data


def test_no_such_storage_is_refused() -> None:
    for call in (
        lambda: Model(GQA, "q4"),
        lambda: make_model().stored("f16"),
        lambda: Model.init(GQA, storage="auto"),
        lambda: Model.load("missing.bin", storage="int8"),
        lambda: stream(make_model(), weights="fp8"),
    ):
        assert "f32, bf16, q8" in message(call)


@SMALLER
def test_init_draws_what_float32_draws_a_tensor_at_a_time(storage: str) -> None:
    config = ModelConfig(64, 192, 24, 4, 2, 211, 16)
    expected = Model.init(config, seed=5).stored(storage)
    tracemalloc.start()
    model = Model.init(config, seed=5, storage=storage)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert model.arena.tobytes() == expected.arena.tobytes()
    assert peak < model.n_parameters, "a quarter of float32"


# Files


@SMALLER
def test_file_is_read_into_a_smaller_storage_a_tensor_at_a_time(
    tmp_path: Path, storage: str
) -> None:
    config = ModelConfig(64, 192, 24, 4, 2, 211, 16)
    model = make_model(config)
    model.save(tmp_path / "a.bin")
    tracemalloc.start()
    loaded = Model.load(tmp_path / "a.bin", storage=storage)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loaded.arena.tobytes() == model.stored(storage).arena.tobytes()
    assert peak < model.n_parameters, "a quarter of float32"
    loaded.save(tmp_path / "b.bin")
    assert bits(dict(Model.load(tmp_path / "b.bin").weights)) == bits(dict(loaded.weights))
    assert Model.load(tmp_path / "a.bin", storage="auto").storage == "f32"


def test_blocks_of_a_gguf_file_are_kept(tmp_path: Path) -> None:
    """They were made by another program, so that no rounding of anepy's would give them."""
    gguf = needs.peer("gguf")
    for config in (WHOLE, ModelConfig(64, 96, 2, 4, 2, 61, 64, qkv_bias=True)):
        path = tmp_path / "a.gguf"
        with pytest.warns(UserWarning, match="no tokenizer"):
            make_model(config).save(path, "q8_0")
        reader = gguf.GGUFReader(path, "r+")
        random = np.random.default_rng(3)
        for tensor in reader.tensors:
            if tensor.tensor_type.name == "Q8_0":
                blocks = tensor.data.reshape(-1, Q8_BYTES)
                blocks[:, 2:] = random.integers(0, 100, blocks[:, 2:].shape)
        reader.data.flush()
        del reader
        plain = Model.load(path)
        loaded = Model.load(path, storage="auto")
        assert loaded.storage == "q8"
        assert bits(dict(loaded.weights)) == bits(dict(plain.weights))
        assert plain.stored("q8").arena.tobytes() != loaded.arena.tobytes(), "a second rounding"


def test_damaged_blocks_of_a_gguf_file_are_refused(tmp_path: Path) -> None:
    gguf = needs.peer("gguf")
    path = tmp_path / "a.gguf"
    with pytest.warns(UserWarning, match="no tokenizer"):
        make_model(WHOLE).save(path, "q8_0")
    reader = gguf.GGUFReader(path, "r+")
    next(t for t in reader.tensors if t.tensor_type.name == "Q8_0").data[0, :2] = (0, 0x7C)
    reader.data.flush()
    del reader
    assert "NaN or infinite" in message(lambda: Model.load(path, storage="q8"), ModelError)


def test_bf16_folder_is_read_as_it_is(tmp_path: Path) -> None:
    needs.peer("safetensors")
    make_model(WHOLE).save(tmp_path / "m", "bf16")
    loaded = Model.load(tmp_path / "m", storage="auto")
    assert loaded.storage == "bf16"
    assert bits(dict(loaded.weights)) == bits(dict(Model.load(tmp_path / "m").weights))


# What is computed


@SMALLER
@CONFIGS
def test_decoder_computes_with_the_stored_numbers(config: ModelConfig, storage: str) -> None:
    stored, plain = pair(storage, config)
    tokens, _ = sequence(config, 70)
    with Decoder(stored, threads=2) as one, Decoder(plain, threads=2) as other:
        assert relative_error(one.prefill(tokens[:66]), other.prefill(tokens[:66])) < 5e-6
        for at in range(66, 70):
            found = one.forward(int(tokens[at]), at).copy()
            assert relative_error(found, other.forward(int(tokens[at]), at)) < 5e-6
    with Decoder(stored, threads=1) as again:
        again.prefill(tokens[:66])
        for at in range(66, 70):
            last = again.forward(int(tokens[at]), at)
        assert last.tobytes() == found.tobytes(), "it depends on the threads"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@SMALLER
@CONFIGS
def test_engine_has_the_bits_of_the_widened_model(
    config: ModelConfig, storage: str, precision: str
) -> None:
    """Logits, losses, and gradients of an adapter: forward products and those of dX."""
    needs.precision(precision)
    tokens, targets = sequence(config, 70)
    results = []
    for model in pair(storage, config):
        lora = Lora(4, 8.0, ("wq", "wv", "wo", "w1", "w2", "w3"), seed=2)
        with Engine(model, device="cpu", precision=precision, lora=lora) as engine:
            for name, weight in lora.weights.items():
                if name.endswith("lora_b"):
                    weight[...] = np.random.default_rng(len(name)).normal(size=weight.shape) / 9
            logits = engine.logits(tokens).tobytes()
            loss = engine.step(tokens, targets).loss
            results.append((logits, loss, bits(dict(engine.gradients))))
    assert results[0] == results[1] and math.isfinite(results[0][1])


@SMALLER
def test_simulator_bakes_the_stored_numbers(storage: str) -> None:
    tokens, targets = sequence(WHOLE, 60)
    losses, gradients = [], []
    for model in pair(storage):
        with Engine(model, "ane", "sim", freeze=("tok_embeddings*", "layers.*.w?.*")) as engine:
            losses.append(engine.evaluate(tokens, targets))
            assert not engine.stale
        lora = Lora(2, 4.0, ("wq", "w2"), seed=1)
        with Engine(model, "ane", "sim", lora=lora) as engine:
            engine.step(tokens, targets)
            gradients.append(bits(dict(engine.gradients)))
    assert losses[0] == losses[1] and gradients[0] == gradients[1]


@SMALLER
def test_smaller_matrices_are_not_trained(storage: str) -> None:
    model = make_model(WHOLE).stored(storage)
    tokens, targets = sequence(WHOLE, 20)
    with Engine(model, device="cpu") as engine:
        before = model.arena.tobytes()
        said = message(lambda: engine.step(tokens, targets), ConfigError)
        assert "tok_embeddings.weight is stored as " + storage in said and "lora" in said
        assert model.arena.tobytes() == before
        assert math.isfinite(engine.evaluate(tokens, targets))
    patterns = ("tok_embeddings*", "*.w?.weight")
    with Engine(model, device="cpu", precision="fp32", freeze=patterns) as engine:
        engine.step(tokens, targets)
        engine.update(lr=1e-2)
        assert set(engine.gradients) == {n for n in model.weights if "norm" in n}


def test_trainer_refuses_a_smaller_model_before_anything_is_read() -> None:
    model = make_model(WHOLE).stored("q8")
    assert "stored as q8" in message(lambda: Trainer(model, "missing.bin"))


@pytest.mark.parametrize("variant", ["baseline", "opt"])
def test_rows_of_the_embedding_are_read_with_and_without_vectors(variant: str) -> None:
    tokens, _ = sequence(WHOLE, 70)
    found = []
    for model in pair("q8"):
        with Engine(model, variant, "cpu", "fp32") as engine:
            found.append(engine.logits(tokens).tobytes())
    assert found[0] == found[1]


def test_loss_on_held_out_text_is_within_half_a_percent() -> None:
    """docs/performance.md has the figures."""
    model = Model.load(needs.data("stories260K.bin"))
    words = Tokenizer.load(needs.data("tok512.bin"), 512)
    text = needs.data("tinystories_sample.txt").read_text("utf-8")[:12000]
    ids = np.array(words.encode(text, bos=True))
    windows = ids[: len(ids) // 513 * 513].reshape(-1, 513)
    losses = {}
    for storage in ("f32", "bf16", "q8"):
        with Engine(model.stored(storage), device="cpu", precision="fp32") as engine:
            losses[storage] = np.mean([engine.evaluate(w[:-1], w[1:]) for w in windows])
    for storage in ("bf16", "q8"):
        assert abs(losses[storage] / losses["f32"] - 1) < 5e-3, losses


# Text


def test_text_from_smaller_weights() -> None:
    model, words = needs.data("stories260K.bin"), needs.data("tok512.bin")
    texts = {
        weights: "".join(
            stream(model, "Once", words, temperature=0.0, max_tokens=20, weights=weights)
        )
        for weights in ("auto", "f32", "bf16", "q8")
    }
    assert texts["auto"] == texts["f32"]
    assert all(text.startswith("Once upon a time") for text in texts.values())
    loaded = Model.load(model)
    again = stream(loaded, "Once", words, temperature=0.0, max_tokens=20, weights="q8")
    assert "".join(again) == texts["q8"]
    with Decoder(loaded) as decoder:
        assert "leave weights out" in message(lambda: stream(decoder, weights="q8"))
