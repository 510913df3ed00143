"""Fixtures shared by tests of several rooms."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from commands import SMALL, Run, runner

from anepy.models.model import Model
from anepy.text.tokenizer import Tokenizer


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a function that runs a command in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    return runner(capsys, monkeypatch)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Return a small model, its tokens and a text."""
    paths = {name: tmp_path / name for name in ("m.bin", "d.bin", "t.txt")}
    Model.init(SMALL, seed=1).save(paths["m.bin"])
    paths["t.txt"].write_text("A cat sat on a mat. " * 40 + "<|endoftext|>" + "A dog ran. " * 40)
    ids = Tokenizer.bytes().encode(paths["t.txt"].read_text())
    np.array(ids, "<u2").tofile(paths["d.bin"])
    return paths


@pytest.fixture(scope="session")
def ane_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the native library with the Apple devices on stand-in frameworks, for coverage."""
    import apple

    return apple.build(tmp_path_factory.mktemp("ane"), (), apple.COVERAGE)
