"""Runs in the programs of others: TensorBoard, Weights & Biases, pictures by matplotlib."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import needs
import pytest
from commands import Run, assert_one_line_error

from anepy.training import runs, trackers

TRAIN = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 1, "--lr", 0.01]


def test_tensorboard_shows_what_the_log_has(run: Run, files: dict[str, Path]) -> None:
    needs.peer("tensorboard")
    words = ["--held-out", 0.2, "--eval-every", 2, "--sample-every", 4, "-p", "A cat"]
    result = run(*TRAIN, *words, "--steps", 4, "--tensorboard", "tb", "--log", "l.jsonl")
    assert result.code == 0, result.err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator("tb")
    board.Reload()
    log = runs.read("l.jsonl")
    found = {point.step: point.value for point in board.Scalars("train/loss")}
    assert found == pytest.approx(log.losses, rel=1e-6)
    assert [point.step for point in board.Scalars("held_out/loss")] == [2, 4]
    assert board.Scalars("train/lr")[0].value == pytest.approx(0.01)
    (sample,) = board.Tensors("sample")
    assert sample.tensor_proto.string_val[0].startswith(b"A cat")


def test_wandb_keeps_a_run_offline(
    run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own calls, told apart by a recorder in its place."""
    calls: list[Any] = []

    class Recorded:
        class config:
            @staticmethod
            def update(values: dict[str, Any], **_: Any) -> None:
                calls.append(("config", values["settings"]["steps"]))

        @staticmethod
        def log(values: dict[str, Any], step: int) -> None:
            calls.append((step, sorted(values)))

        @staticmethod
        def finish() -> None:
            calls.append("finish")

    class Package:
        Settings = dict

        @staticmethod
        def init(**options: Any) -> Recorded:
            calls.append(options)
            return Recorded()

    monkeypatch.setitem(sys.modules, "wandb", Package)
    words = ["--held-out", 0.2, "--eval-every", 2, "--run", "r", "--wandb", "mine"]
    assert run(*TRAIN, *words, "--steps", 2).code == 0
    step = ["speed/ms_per_step", "speed/tokens_per_s", "train/loss", "train/lr"]
    assert calls[0]["project"] == "mine" and calls[0]["name"] == "r"
    assert calls[1:] == [("config", 2), (1, step), (2, ["held_out/loss", *step]), "finish"]


def test_wandb_itself_takes_it(
    run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.peer("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run(*TRAIN, "--steps", 2, "--wandb", "mine", "--no-checkpoint")
    assert result.code == 0, result.err
    (kept,) = Path("wandb").glob("offline-run-*/run-*.wandb")
    assert kept.stat().st_size > 500


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensorboard", ["--tensorboard", "tb"]),
        ("wandb", ["--wandb", "mine"]),
    ],
)
def test_missing_package_is_named_before_training(
    run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, words: list[str]
) -> None:
    for loaded in [*sys.modules]:
        if loaded.partition(".")[0] == name:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, name, None)
    result = run(*TRAIN, "--steps", 2, "--save", "s.bin", *words)
    assert_one_line_error(result, f"needs the package {name}", f"'anepy[{name}]'")
    assert not Path("s.bin").exists()


def test_tracker_that_fails_ends_nothing(
    run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        name = "TensorBoard"

        def __init__(self, folder: Path) -> None:
            pass

        def write(self, record: dict[str, Any]) -> None:
            if record["type"] == "step":
                raise RuntimeError("no\nroom")

        def close(self) -> None:
            raise AssertionError("closed once more")

    monkeypatch.setattr("anepy.cli.run.TensorBoard", Failing)
    result = run(*TRAIN, "--steps", 3, "--tensorboard", "tb", "--save", "s.bin")
    assert result.code == 0 and Path("s.bin").exists()
    assert result.err.count("TensorBoard ends early: no room") == 1


def test_scalars_are_finite_numbers() -> None:
    record = {"type": "batch", "step": 1, "grad_norm": float("nan")}
    assert trackers.scalars(record) == {}
    assert trackers.scalars(record | {"grad_norm": 2}) == {"train/grad_norm": 2.0}


def test_plot_writes_a_picture(
    run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.module("matplotlib")
    words = ["--held-out", 0.2, "--eval-every", 2, "--steps", 4]
    assert run(*TRAIN, *words, "--run", "a").code == run(*TRAIN, *words, "--run", "_b").code == 0
    result = run("plot", "a", "_b", "-o", "p.png")
    assert result.code == 0, result.err
    raw = Path("p.png").read_bytes()
    assert raw.startswith(b"\x89PNG") and struct.unpack(">II", raw[16:24]) == (1800, 960)
    page = Path("a/plot.html").read_text("utf-8")
    assert "<h1>a</h1>" in page and "Learning rate" in page
    assert_one_line_error(run("plot", "a", "-o", "p.gif"), "p.gif", ".png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_one_line_error(run("plot", "a", "-o", "q.png"), "matplotlib", "'anepy[plot]'")
    assert not Path("q.png").exists()
