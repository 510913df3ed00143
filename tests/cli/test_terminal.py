"""What names, files, models and prompts could make a terminal do: nothing, however it is shown."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import children
import needs
import numpy as np
import pytest
from commands import SMALL, Result, Run
from comparisons import make_comparison

from anepy.comparing import file as comparison_file
from anepy.models.model import Model
from anepy.system import terminal
from anepy.text.tokenizer import Tokenizer
from anepy.text.tokenizer_pieces import PieceTokenizer
from anepy.training.trainer import Trainer

EVIL = "\x1b]0;x\x07\x1b[31m\x9b2J\r\x7f"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TRAIN = ["--data", "d.bin", "--seq", 16, "--steps", 2]


def evil_pieces(run: Run) -> Result:
    """Pieces of several bytes, of which no single one is a control character of ASCII alone."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % value for value in range(256))]
    pieces += [EVIL.encode() + b"x" * n for n in range(500)]
    PieceTokenizer(pieces, [0.0] * len(pieces)).save("t.bin")
    Model.init(replace(SMALL, vocab_size=len(pieces)), seed=1).save("v.bin")
    result = run("generate", "v.bin", "-z", "t.bin", "-p", "A", "-t", 1, "-n", 28)
    assert "]0;x" in result.out, result
    return result


def evil_log(run: Run) -> Result:
    assert run("train", "m.bin", *TRAIN, "--run", "r").code == 0
    for name in ("r/log.jsonl", "r/run.json"):
        if Path(name).exists():
            Path(name).write_text(Path(name).read_text().replace("m.bin", json.dumps(EVIL)[1:-1]))
    return run("runs", "r", "--json")


def evil_checkpoint(run: Run) -> Result:
    with Trainer("m.bin", "d.bin") as trainer:
        trainer.source["model"] = trainer.source["data"] = EVIL
        trainer.save_checkpoint("c.npz")
    return run("train", "--resume", "c.npz")


def evil_comparison(run: Run) -> Result:
    comparison_file.save(make_comparison(), "a.json")
    text = Path("a.json").read_text()
    variant = json.loads(text)["groups"][0]["runs"][0]["label"]
    Path("a.json").write_text(text.replace(f'"{variant}"', json.dumps(EVIL)))
    return run("compare", "--load", "a.json", "a.json")


def evil_names(run: Run) -> Result:
    Path("m.bin").rename(f"{EVIL}.bin")
    Path("d.bin").rename(f"{EVIL}d")
    words = ["--checkpoint", f"{EVIL}.npz", "--log", f"{EVIL}.jsonl", "--save", f"{EVIL}s.bin"]
    return run("train", f"{EVIL}.bin", "--data", f"{EVIL}d", *TRAIN[2:], *words)


WAYS: dict[str, Callable[[Run], Result]] = {
    "pieces": evil_pieces,
    "log of a run": evil_log,
    "checkpoint": evil_checkpoint,
    "comparison": evil_comparison,
    "names of files": evil_names,
    "prompt": lambda run: run("generate", "m.bin", "-p", EVIL, "-n", 12),
    "sample": lambda run: run("train", "m.bin", *TRAIN, "--sample-every", 1, "--prompt", EVIL),
    "folder of a run": lambda run: run("train", "m.bin", *TRAIN, "--run", EVIL),
    "missing file": lambda run: run("eval", f"{EVIL}.gguf", "--data", "d.bin"),
    "usage": lambda run: run("train", "m.bin", f"--{EVIL}"),
    "device": lambda run: run("train", "m.bin", *TRAIN, "--device", EVIL),
    "variant": lambda run: run("train", "m.bin", *TRAIN, "--variant", EVIL),
    "init": lambda run: run("init", "stories260K", "-o", f"{EVIL}.bin"),
    "prepare": lambda run: run("prepare", "t.txt", "-o", f"{EVIL}.bin"),
    "convert": lambda run: run("convert", "m.bin", f"{EVIL}.gguf"),
    "mil": lambda run: run("mil", EVIL),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_control_character_is_printed_raw(run: Run, files: dict[str, Path], way: str) -> None:
    needs.module("gguf") if way == "convert" else None
    result = WAYS[way](run)
    shown = result.out + result.err
    assert shown and not RAW.search(shown), RAW.findall(shown)
    if way not in ("pieces", "prompt"):  # of text they are left out
        assert "x1b" in shown or "u001b" in shown, shown


def test_json_with_control_characters_stays_json(run: Run, files: dict[str, Path]) -> None:
    Path("m.bin").rename(f"{EVIL}.bin")
    result = run("train", f"{EVIL}.bin", *TRAIN, "--json")
    assert not RAW.search(result.out)
    assert json.loads(result.out)["model"] == f"{EVIL}.bin"


def test_text_has_no_control_characters(tmp_path: Path) -> None:
    assert terminal.without_control(f"a\n\tb{EVIL}é\u200d") == "a\n\tb]0;x[31m2Jé\u200d"
    assert terminal.escaped("\x9b\n") == "\\u009b\n"


def test_a_display_that_moves_the_cursor_shows_none(tmp_path: Path) -> None:
    """On a terminal, where rich adds control characters of its own."""
    (tmp_path / "m").mkdir()
    Model.init(SMALL, seed=1).save(tmp_path / f"{EVIL}.bin")
    np.array(Tokenizer.bytes().encode("A cat sat. " * 40), "<u2").tofile(tmp_path / f"{EVIL}d")
    shown = b""
    for words in (
        ["train", f"{EVIL}.bin", "--data", f"{EVIL}d", *TRAIN[2:], "--run", f"r{EVIL}",
         "--sample-every", "1", "--prompt", EVIL],
        ["runs", f"r{EVIL}"],
    ):  # fmt: skip
        master, slave = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "anepy", *map(str, words)], cwd=tmp_path, stdin=slave,
            stdout=slave, stderr=slave,
            env={**os.environ, "PYTHONPATH": children.PYTHONPATH, "TERM": "xterm"},
        ) as process:  # fmt: skip
            os.close(slave)
            try:
                while piece := os.read(master, 4096):
                    shown += piece
            except OSError:
                pass  # the terminal has no writer any more
            os.close(master)
        assert process.returncode == 0, shown
    text = shown.decode()
    assert "\x1b[" in text and "]0;x" in text
    for part in ("\x1b]", "\x07", "\x9b", "\x7f", "\x1b[31m"):
        assert part not in text, text
