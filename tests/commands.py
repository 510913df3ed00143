"""The command line in this process: what it prints and answers with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from anepy.cli import main as cli


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


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.code == 1, result
    assert result.err.startswith("anepy: error: ") and result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err, result.err
