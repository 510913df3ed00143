"""What every command says to something that is no model: one line, which file, and nothing done."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import needs
import numpy as np
import pytest
from commands import SMALL, Run, assert_one_line_error

from anepy.models.model import Model

ENDINGS = [".bin", ".gguf", ".safetensors", ".npz", ""]


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


def _whole(kind: str) -> bytes:
    """Return a model as a file of a format."""
    folder = Path("made")
    Model.init(SMALL, seed=1).save(folder / "m" if kind == "folder" else folder / f"m.{kind}")
    return (folder / ("m/model.safetensors" if kind == "folder" else f"m.{kind}")).read_bytes()


def _nan() -> bytes:
    whole = _whole("bin")
    return whole[:28] + np.float32(np.nan).tobytes() + whole[32:]


CONTENTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "gzip": (lambda: gzip.compress(_whole("bin")), "it is a gzip file"),
    "lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS"),
    "html": (lambda: b"<!DOCTYPE html>\n<html></html>", "it is a web page"),
    "npz": (_npz, "it is a NumPy archive (.npz)"),
    "empty": (lambda: b"", "it is empty"),
    "text": (lambda: b"A cat sat on a mat.\n" * 20, "it is a text file"),
    "noise": (lambda: np.random.default_rng(0).bytes(999), "it is no llama2.c .bin file"),
    "safetensors": (lambda: _whole("folder"), "without config.json beside it"),
    "cut safetensors": (lambda: _whole("folder")[:999], "without config.json beside it"),
    "cut gguf": (lambda: _whole("gguf")[:999], "it is truncated or damaged"),
    "cut bin": (lambda: _whole("bin")[:999], "it is truncated"),
    "nan": (_nan, "tok_embeddings.weight has NaN"),
}


@pytest.fixture
def refused(run: Run, files: dict[str, Path]) -> Callable[..., None]:
    """Return a function that gives a path to every command that reads a model."""
    data = files["d.bin"]

    def check(path: Path, *parts: str) -> None:
        before = sorted(Path.cwd().rglob("*"))
        for words in (
            ("train", path, "--data", data, "--steps", 1, "--device", "cpu"),
            ("eval", path, "--data", data),
            ("generate", path, "--prompt", "A cat"),
        ):
            assert_one_line_error(run(*words), *parts)
        assert sorted(Path.cwd().rglob("*")) == before

    return check


@pytest.mark.filterwarnings("ignore:.*gets no tokenizer")
@pytest.mark.parametrize("kind", CONTENTS)
def test_file_that_is_no_model_is_refused_under_any_name(
    refused: Callable[..., None], kind: str
) -> None:
    needs.module("safetensors"), needs.module("gguf")
    Path("made").mkdir()
    make, expected = CONTENTS[kind]
    content = make()
    for ending in ENDINGS:
        path = Path(f"bad{ending}")
        path.write_bytes(content)
        refused(path, str(path), expected)


def test_what_is_no_file_is_refused(refused: Callable[..., None]) -> None:
    Path("folder").mkdir()
    Path("folder.bin").mkdir()
    os.symlink("loop", "loop")
    os.mkfifo("pipe")
    for name in ("folder", "folder.bin"):
        refused(Path(name), f"{name}: it is a folder without config.json")
    refused(Path("loop"), "loop: Too many levels of symbolic links")
    refused(Path("pipe"), "pipe: it is not a regular file")
    for name in ("missing.bin", "missing", "folder/missing.gguf"):
        refused(Path(name), f"{name}: No such file")


def test_names_in_a_file_do_nothing_to_a_terminal(refused: Callable[..., None]) -> None:
    needs.module("safetensors")
    from safetensors.numpy import load_file, save_file

    Model.init(SMALL).save("m")
    weights = Path("m/model.safetensors")
    save_file(load_file(weights) | {"a\n\x1b[31mb": np.ones(1, "f4")}, weights)
    refused(Path("m"), r"holds tensor a \x1b[31mb")
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps(config | {"model_type": "\x1b]0;x\x07"}))
    refused(Path("m"), "model_type")


def test_file_that_may_not_be_read_is_named(refused: Callable[..., None]) -> None:
    needs.held_by_permissions()
    needs.module("safetensors")
    Model.init(SMALL).save("m.bin")
    for name in ("config.json", "model.safetensors"):
        Model.init(SMALL).save(name[0])
        os.chmod(Path(name[0]) / name, 0)
        refused(Path(name[0]), f"{name[0]}/{name}: Permission denied")
    os.chmod("m.bin", 0)
    refused(Path("m.bin"), "m.bin: Permission denied; make it readable")


def test_no_path_is_left_to_typers_own_check() -> None:
    """It would refuse what may not be read with another exit code, which root never sees."""
    sources = sorted((needs.CHECKOUT / "anepy" / "cli").glob("*.py"))
    found = [
        re.findall(r"\bPath(?: \| None|\])?,\s*(\w[\w.]*)\(", path.read_text()) for path in sources
    ]
    assert {name for names in found for name in names} == {"path_option", "path_argument"}
