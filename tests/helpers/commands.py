"""The command line, in this process or one of its own: what it prints and answers with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import children
import pytest

from anepy.cli import main as cli
from anepy.models.model import ModelConfig

SMALL = ModelConfig(
    dim=32, hidden_dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=259, seq_len=32
)


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def runner(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *before: str
) -> Run:
    """Return a function that runs `anepy` with words, these before all others."""

    def call(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["anepy", *before, *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return Result(code if isinstance(code, int) else int(bool(code)), *capsys.readouterr())

    return call


def start(folder: Path, *words: object, **environment: str) -> subprocess.Popen[str]:
    """Start `anepy` as a process of its own."""
    return children.start("-m", "anepy", *words, cwd=folder, **environment)


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.code == 1, result
    assert result.err.startswith("anepy: error: ") and result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err, result.err
