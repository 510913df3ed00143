"""A model file is read by its content and written by its ending."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import io
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import families
import needs
import numpy as np
import pytest
from cases import message
from reference import llama2c
from reference import llama64 as ref

from anepy.errors import ConfigError, ModelError
from anepy.models import formats, rope
from anepy.models.model import Model, ModelConfig, TensorTable
from anepy.models.stored_tokenizer import StoredTokenizer
from anepy.models.tensors import from_half_split, tensors, to_half_split
from anepy.text.tokenizer_pieces import PieceTokenizer, byte_tokenizer

SMALL = ModelConfig(32, 64, 2, 4, 2, 300, 40)
THETAS = (500000.0, 1e6, 100000.0, 100.0, 12345.678)


def random(config: ModelConfig = SMALL, seed: int = 1) -> Model:
    model = Model(config)
    for name, values in ref.random_weights(config, seed, 0.2).items():
        model.weights[name] = values
    return model


def assert_same(a: Model, b: Model) -> None:
    assert dataclasses.asdict(a.config) == dataclasses.asdict(b.config)
    for name, values in a.weights.items():
        np.testing.assert_array_equal(b.weights[name], values, err_msg=name)


def refused(path: Path) -> str:
    text = message(lambda: Model.load(path), ModelError)
    assert str(path) in text
    return text


# ---------------------------------------------------------------------------- formats


@pytest.mark.parametrize("ending", [".bin", ".gguf", ".GGUF", ""])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_model_loads_whatever_its_name_is_then(
    tmp_path: Path, ending: str, tied: bool
) -> None:
    needs.module("safetensors"), needs.module("gguf")
    model = random(dataclasses.replace(SMALL, tied=tied))
    model.tokenizer = PieceTokenizer([*byte_tokenizer().pieces()[0], *[b"ab"] * 41], [0.0] * 300)
    path = tmp_path / f"model{ending}"
    size = model.save(path)
    assert size == sum(p.stat().st_size for p in [path, *path.glob("*")] if p.is_file())
    os.rename(path, tmp_path / "another name")
    again = Model.load(tmp_path / "another name")
    assert_same(again, model)
    assert again.path == tmp_path / "another name"
    if not ending:
        assert_same(Model.load(tmp_path / "another name" / "model.safetensors"), model)


def test_tensors_are_those_of_the_native_table() -> None:
    for changes in (
        {},
        {"tied": False, "head_dim": 6},
        {"n_kv_heads": 1, "n_heads": 2},
    ):
        config = dataclasses.replace(SMALL, **changes)
        places = TensorTable(config).places
        assert {t.name: t.shape for t in tensors(config)} == {n: s for n, (_, s) in places.items()}
    for config in (SMALL, dataclasses.replace(SMALL, qkv_bias=True, qk_norm=True, tied=False)):
        assert {t.name: t.shape for t in tensors(config)} == ref.tensor_shapes(config)


def test_rows_of_pairs_are_put_side_by_side_and_back() -> None:
    rows = np.arange(12).reshape(12, 1) * [1.0, 10.0]
    assert from_half_split(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    np.testing.assert_array_equal(to_half_split(from_half_split(rows, 3), 3), rows)
    assert from_half_split(np.arange(4), 1).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize("name", ["llama2", "theta-tied", "llama3", "linear", "wide-heads"])
def test_model_of_transformers_goes_through_every_format(tmp_path: Path, name: str) -> None:
    needs.module("gguf")
    families.save(name, tmp_path / "a", vocab_size=300)
    model = Model.load(tmp_path / "a")
    model.tokenizer = None
    with pytest.warns(UserWarning, match="gets no tokenizer"):
        model.save(tmp_path / "b.gguf")
    Model.load(tmp_path / "b.gguf").save(tmp_path / "c")
    assert_same(Model.load(tmp_path / "c"), model)


def test_tokenizer_stays_with_copies_of_a_model() -> None:
    model = random()
    assert model.tokenizer is None
    model.tokenizer = StoredTokenizer("huggingface", files={"tokenizer.json": b"{}"})
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.tokenizer == model.tokenizer
        assert_same(again, model)


def test_dtype_that_the_format_lacks_is_refused(tmp_path: Path) -> None:
    model = random()
    for name, dtype, expected in (
        ("m.bin", "f16", ".bin files hold f32"),
        ("m.gguf", "q4_0", "GGUF files hold f32, f16, bf16, q8_0"),
        ("m", "q8_0", "Hugging Face folders hold f32, f16, bf16"),
    ):
        assert expected in message(lambda n=name, d=dtype: model.save(tmp_path / n, d), ModelError)
    assert "name the folder" in message(lambda: model.save(tmp_path / "m.safetensors"), ModelError)
    (tmp_path / "file").write_bytes(b"mine")
    assert "it is no folder" in message(lambda: model.save(tmp_path / "file"), ModelError)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_check_writable_finds_what_saving_would_meet(tmp_path: Path) -> None:
    needs.module("safetensors"), needs.module("gguf")
    (tmp_path / "there").mkdir()
    for name in ("m.bin", "m.gguf", "new", "there"):
        formats.check_writable(SMALL, tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["there"]
    for name in ("no/m.bin", "no/m"):
        with pytest.raises(ConfigError, match="there is no folder"):
            formats.check_writable(SMALL, tmp_path / name)
    with pytest.raises(ModelError, match="cannot hold this model's norm_eps"):
        formats.check_writable(dataclasses.replace(SMALL, norm_eps=1e-6), tmp_path / "m.bin")
    with pytest.raises(ConfigError, match="MB free"):
        formats.check_writable(SMALL, tmp_path / "there", 1 << 60)


@pytest.mark.parametrize(
    ("package", "name", "extra"), [("safetensors", "m", "hf"), ("gguf", "m.gguf", "gguf")]
)
def test_missing_package_is_named_with_its_extra(
    tmp_path: Path, package: str, name: str, extra: str
) -> None:
    needs.module(package)
    model = random()
    model.tokenizer = StoredTokenizer("gguf", fields={"tokenizer.ggml.model": ((8,), "none")})
    model.save(tmp_path / name)
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "import anepy\n"
        "for call in (lambda: anepy.Model.load(sys.argv[1]),\n"
        "             lambda: anepy.Model.init(anepy.PRESETS['stories260K']).save(sys.argv[2])):\n"
        "    try: call()\n"
        "    except anepy.AnepyError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / f"2{name}")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 2
    assert all(f"pip install 'anepy[{extra}]'" in line for line in lines)


# ---------------------------------------------------------------------------- llama2.c


def version_1(path: Path, config: ModelConfig, weights: dict[str, Any], version: int = 1) -> None:
    """Write what llama2.c's `version1_export` does, by its description."""
    c = config
    head = struct.pack("<Ii7iB", 0x616B3432, version, c.dim, c.hidden_dim, c.n_layers, c.n_heads,
                       c.n_kv_heads, c.vocab_size, c.seq_len, c.tied)  # fmt: skip
    names = [f"layers.{n}.attention_norm.weight" for n in range(c.n_layers)]
    names += [f"layers.{n}.ffn_norm.weight" for n in range(c.n_layers)]
    names += ["norm.weight", "tok_embeddings.weight"]
    for part in ("attention.wq", "attention.wk", "attention.wv", "attention.wo"):
        names += [f"layers.{n}.{part}.weight" for n in range(c.n_layers)]
    for part in ("w1", "w2", "w3"):
        names += [f"layers.{n}.feed_forward.{part}.weight" for n in range(c.n_layers)]
    names += [] if c.tied else ["output.weight"]
    body = b"".join(weights[name].astype("<f4").tobytes() for name in names)
    path.write_bytes(head.ljust(256, b"\0") + body)


@pytest.mark.parametrize("tied", [True, False])
def test_version_1_loads(tmp_path: Path, tied: bool) -> None:
    model = random(dataclasses.replace(SMALL, tied=tied))
    path = tmp_path / "m.bin"
    version_1(path, model.config, dict(model.weights))
    assert_same(Model.load(path), model)
    whole = path.read_bytes()
    for length in (4, 100, 255, 256, len(whole) - 4):
        path.write_bytes(whole[:length])
        assert "truncated" in refused(path)
    path.write_bytes(whole + b"\0")
    assert "longer than it says" in refused(path)
    version_1(path, model.config, dict(model.weights), version=2)
    assert "llama2.c file of version 2, whose weights are not float32" in refused(path)
    path.write_bytes(whole[:8] + struct.pack("<i", 33) + whole[12:])
    assert "a header of which" in refused(path)
    model.weights["norm.weight"][3] = math.nan
    version_1(path, model.config, dict(model.weights))
    assert "tensor norm.weight has NaN or infinite weights" in refused(path)


@pytest.mark.parametrize("theta", THETAS)
def test_base_of_the_tables_is_honoured_and_kept(tmp_path: Path, theta: float) -> None:
    """It was read as 10,000 and lost on saving."""
    config = dataclasses.replace(SMALL, rope_theta=theta, tied=False)
    path = tmp_path / "m.bin"
    llama2c.write(path, config, ref.random_weights(config, 2))
    model = Model.load(path)
    assert model.config.rope_theta == pytest.approx(theta, rel=1e-6)
    assert model.config.rope_theta == theta or theta == THETAS[-1]
    before = path.read_bytes()
    model.save(tmp_path / "copy.bin")
    again = Model.load(tmp_path / "copy.bin")
    assert again.config == model.config
    table = slice(len(before) - 4 * 32 * 300 - 4 * 40 * 8, len(before) - 4 * 32 * 300)
    old, new = (
        np.frombuffer(b[table], "<f4") for b in (before, (tmp_path / "copy.bin").read_bytes())
    )
    np.testing.assert_allclose(old, new, atol=1e-5)


@pytest.mark.parametrize(
    "tables",
    [
        np.zeros((2, 40, 4)),
        np.full((2, 40, 4), np.nan),
        np.ones((2, 40, 4)),
        np.random.default_rng(0).normal(size=(2, 40, 4)),
        -np.stack([np.ones((40, 4)), np.zeros((40, 4))]),
    ],
    ids=["zeros", "nan", "ones", "random", "negative"],
)
def test_tables_of_no_base_are_refused(tmp_path: Path, tables: np.ndarray) -> None:
    path = tmp_path / "m.bin"
    random().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: -tables.size * 4] + tables.astype("<f4").tobytes())
    assert "rotary cosines and sines that are of no base" in refused(path)


def test_tables_of_scaled_frequencies_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    config = dataclasses.replace(SMALL, rope_scaling={"rope_type": "linear", "factor": 2.0})
    llama2c.write(path, config, ref.random_weights(config, 2))
    assert "of no base" in refused(path)


def test_file_without_tables_has_the_usual_base(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    model = random()
    model.save(path)
    path.write_bytes(path.read_bytes()[: -4 * 40 * 8])
    assert_same(Model.load(path), model)


@pytest.mark.parametrize("seed", range(40))
def test_base_is_found_in_tables_of_any_shape_and_precision(seed: int) -> None:
    draw = np.random.default_rng(seed)
    width, length = int(draw.choice([4, 8, 48, 64, 128])), int(draw.choice([2, 3, 256, 4096]))
    theta = float(draw.choice([10000.0, 5e5, 1e6, 1e7, 200.0, round(draw.uniform(50, 1e6))]))
    # As llama2.c makes them: frequencies, positions and angles in float32.
    pairs = np.arange(0, width, 2).astype("f4") / np.float32(width)
    frequencies = np.float32(1) / np.float32(theta) ** pairs
    angles = np.outer(np.arange(length, dtype="f4"), frequencies)
    assert angles.dtype == np.float32
    assert rope.theta_of(np.cos(angles), np.sin(angles)) == theta


def test_tables_too_small_to_tell_have_the_usual_base(tmp_path: Path) -> None:
    for changes in ({"seq_len": 1}, {"dim": 8, "n_heads": 4}):
        config = dataclasses.replace(SMALL, **changes)
        random(config).save(tmp_path / "m.bin")
        assert Model.load(tmp_path / "m.bin").config == config
        other = dataclasses.replace(config, rope_theta=5e5)
        text = message(lambda c=other: random(c).save(tmp_path / "m.bin"), ModelError)
        assert "cannot hold this model's rope_theta" in text
        assert "save it as .gguf or as a Hugging Face folder" in text


# ---------------------------------------------------------------------------- what is no model


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def _torch() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("model/data/0", b"\0" * 64)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(b"x" * 4000), "a gzip file"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1\n",
            "a Git LFS pointer",
        ),
        (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
        (b"<html>", "a web page"),
        (_npz(), "a NumPy archive (.npz)"),
        (_torch(), "a PyTorch file (.pt)"),
        (b"PK\x03\x04 and no more", "a damaged zip file"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "an old PyTorch file (.pt)"),
        (b"\x93NUMPY\x01\0v\0{'descr'", "a NumPy array (.npy)"),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 90, "an HDF5 file"),
        (json.dumps({"model_type": "llama"}).encode(), "a JSON file"),
        (b"", "empty"),
        (b"BZh91AY&SY", "a compressed file"),
        (b"Once upon a time there was a model that was a text.\n" * 20, "a text file"),
    ],
)
def test_other_files_are_named_as_what_they_are(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    text = refused(path)
    assert f"it is {expected}" in text
    assert "llama2.c .bin files, GGUF files and Hugging Face folders" in text


def test_widths_that_look_like_letters_are_no_other_file(tmp_path: Path) -> None:
    """The first bytes of a header are the width: 123 is "{", 60 is "<", 640 begins a pickle."""
    for dim, heads in ((124, 2), (92, 2), (60, 2), (32, 2), (640, 2), (10, 1), (8074, 1)):
        config = ModelConfig(dim, 8, 1, heads, 1, 11, 4)
        random(config).save(tmp_path / "m.bin")
        assert Model.load(tmp_path / "m.bin").config == config


def test_folder_and_safetensors_without_config_say_what_is_missing(tmp_path: Path) -> None:
    needs.module("safetensors")
    assert "is a folder without config.json" in refused(tmp_path)
    random().save(tmp_path / "m")
    os.remove(tmp_path / "m" / "config.json")
    assert "a safetensors file without config.json beside it" in refused(
        tmp_path / "m" / "model.safetensors"
    )


def test_shape_that_the_engine_refuses_is_said_with_the_file(tmp_path: Path) -> None:
    needs.module("safetensors")
    random().save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))
    assert "cannot be computed: norm_eps" in refused(tmp_path / "m")
