"""Runs that a person keeps: their folders, lists and pictures, and what must not lose them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import children
import needs
import numpy as np
import pytest
from commands import Run, assert_one_line_error, start
from http_server import wait_for

from anepy import Model, TokenData, TrainConfig, Trainer
from anepy.text.tokenizer_pieces import PieceTokenizer
from anepy.training import runs
from anepy.training.checkpoint import read_meta
from anepy.training.loop import Loop

TRAIN = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 2]
KEPT = [*TRAIN, "--run", "r"]


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# Folders


def test_run_folder_keeps_everything_and_goes_on(run: Run, files: dict[str, Path]) -> None:
    words = [*KEPT, "--held-out", 0.2, "--eval-every", 4, "--checkpoint-every", 2, "--keep", 2]
    result = run(*words, "--steps", 8)
    assert result.code == 0, result.err
    assert names("r") == {
        "run.json", "log.jsonl", "checkpoint.npz", "checkpoint-previous.npz",
        "checkpoint-00000006.npz", "checkpoint-00000008.npz", "best.npz", "model.bin", "plot.html",
    }  # fmt: skip
    assert read_meta("r/checkpoint-00000006.npz").step == 6
    assert read_meta("r/checkpoint.npz").step == 8
    assert_one_line_error(run(*words, "--steps", 9), "r holds a run already", "--resume")
    result = run("train", "--run", "r", "--resume", "--steps", 12)
    assert result.code == 0 and "[RESUMED step 8" in result.out, result.err
    read = runs.read("r")
    assert read.steps == 12 and sorted(read.losses) == list(range(1, 13))
    assert run(*TRAIN, "--steps", 12, "--held-out", 0.2, "--save", "once.bin").code == 0
    assert Path("once.bin").read_bytes() == Path("r/model.bin").read_bytes()


def test_best_checkpoint_is_of_the_best_evaluation(run: Run, files: dict[str, Path]) -> None:
    """With a rate that ruins the model after some updates, the best is not the last."""
    words = [*KEPT, "--steps", 40, "--lr", 0.05, "--held-out", 0.2, "--eval-every", 2]
    assert run(*words, "--patience", 3).code == 0
    read, meta = runs.read("r"), read_meta("r/best.npz")
    assert read.best is not None and read.best[0] == meta.step
    assert read.best[1] == min(read.held_out.values())
    assert read.steps == meta.step + 6 < 40 and read.summary["step"] == read.steps


def test_patience_is_told_and_the_model_saved(run: Run, files: dict[str, Path]) -> None:
    words = [*TRAIN, "--steps", 100, "--lr", 0, "--held-out", 0.2, "--eval-every", 2]
    result = run(*words, "--patience", 2, "--save", "s.bin", "--json")
    record = json.loads(result.out)
    assert record["interrupted"] is False and record["saved"] == "s.bin"
    assert record["summary"]["step"] == 6  # the first evaluation is the best, two more are not
    result = run(*words, "--patience", 2)
    assert "ended after step 6: no better loss than" in result.out


def test_minutes_end_a_run_after_a_step_with_an_update(run: Run, files: dict[str, Path]) -> None:
    result = run(*TRAIN, "--steps", 10**6, "--accum", 10**5, "--minutes", 0.01, "--save", "s.bin")
    assert result.code == 0 and "0.01 minutes are over" in result.out, result.err
    meta = read_meta("m.ckpt.npz")
    assert 0 < meta.step < 10**6 and meta.updates == 1 and meta.accumulated == 0
    assert Path("s.bin").exists()


def test_minutes_alone_end_a_run_whatever_its_steps(run: Run, files: dict[str, Path]) -> None:
    """Without --steps there is no other end, on a resume neither, and no schedule towards one."""
    words = [*TRAIN, "--accum", 1, "--minutes", 0.03]
    result = run(*words, "--json")
    record = json.loads(result.out)
    assert record["summary"]["total"] == 0 and record["summary"]["wall_s"] >= 1.8, result.err
    result = run("train", "--resume", "m.ckpt.npz", "--minutes", 0.001)
    assert result.code == 0 and "0.001 minutes are over" in result.out, result.err
    assert read_meta("m.ckpt.npz").step > record["summary"]["step"]
    assert_one_line_error(run(*words, "--schedule", "cosine"), "cosine", "set steps")
    assert TrainConfig().steps == TrainConfig(steps=1000, minutes=1).steps == 1000


def test_validation_data_of_its_own(run: Run, files: dict[str, Path]) -> None:
    np.array(list(range(3, 100)) * 3, "<u2").tofile("v.bin")
    words = [*TRAIN, "--validation", "v.bin", "--eval-every", 2]
    assert run(*words, "--steps", 4, "--log", "a.jsonl").code == 0
    evaluations = runs.read("a.jsonl").held_out
    assert sorted(evaluations) == [2, 4]
    with Trainer(
        "m.bin", "d.bin", TrainConfig(steps=4, seq=16, accum=2), validation=TokenData("v.bin")
    ) as trainer:
        list(trainer)
        assert abs(trainer.evaluate() - evaluations[4]) < 1e-6
    # A resumed run knows them.
    assert run("train", "--resume", "m.ckpt.npz", "--steps", 6, "--log", "b.jsonl").code == 0
    assert sorted(runs.read("b.jsonl").held_out) == [6]
    assert_one_line_error(run(*words, "--steps", 4, "--held-out", 0.2), "exclude each other")


def test_samples_are_shown_and_logged(run: Run, files: dict[str, Path]) -> None:
    result = run(*KEPT, "--steps", 4, "--sample-every", 2, "-p", "A cat")
    assert result.code == 0 and result.out.count('Sample (prompt "A cat")') == 2, result.err
    lines = [json.loads(line) for line in Path("r/log.jsonl").read_text().splitlines()]
    samples = [line for line in lines if line["type"] == "sample"]
    assert [line["step"] for line in samples] == [2, 4]
    assert all(line["text"].startswith("A cat") for line in samples)


def test_sampling_changes_nothing(run: Run, files: dict[str, Path]) -> None:
    assert run(*TRAIN, "--steps", 6, "--save", "a.bin", "--no-checkpoint").code == 0
    words = ["--steps", 6, "--save", "b.bin", "--no-checkpoint", "--sample-every", 1]
    assert run(*TRAIN, *words).code == 0
    assert Path("a.bin").read_bytes() == Path("b.bin").read_bytes()


# One process at a time


@pytest.mark.parametrize("words", [["--run", "r"], ["--checkpoint", "c.npz"], []])
def test_second_run_on_the_same_files_is_refused(
    run: Run, files: dict[str, Path], tmp_path: Path, words: list[str]
) -> None:
    process = start(tmp_path, *TRAIN, *words, "--steps", 10**6)
    assert process.stdout is not None
    while "step 1 " not in process.stdout.readline():
        assert process.poll() is None
    again = [*words, "--resume"] if "--run" in words else words
    if "--run" in words:
        with Trainer("m.bin", "d.bin", TrainConfig(steps=1, seq=16)) as trainer:
            list(trainer)
            trainer.save_checkpoint("r/checkpoint.npz")
    result = run(*TRAIN, *again, "--steps", 4)
    assert_one_line_error(result, f"in use by process {process.pid}")
    if "--checkpoint" in words:  # by another name
        os.symlink("c.npz", "link.npz")
        result = run(*TRAIN, "--checkpoint", "link.npz", "--steps", 4)
        assert_one_line_error(result, f"in use by process {process.pid}")
    process.kill()
    process.communicate()
    # The dead are no owners.
    assert run(*TRAIN, *again, "--steps", 4).code == 0
    assert not list(tmp_path.rglob("*.owner"))


# What must not lose a run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_hang_up_and_termination_save(
    files: dict[str, Path], tmp_path: Path, number: int, code: int
) -> None:
    process = start(tmp_path, *TRAIN, "--steps", 10**6)
    assert process.stdout is not None
    while "step 1 " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code and "continue with:" in out
    assert read_meta(tmp_path / "m.ckpt.npz").step > 0


def test_hang_up_that_the_parent_ignores_stays_ignored(
    files: dict[str, Path], tmp_path: Path
) -> None:
    ignoring = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
    words = ["-m", "anepy", *TRAIN, "--steps", 10**6]
    process = children.start(*words, cwd=tmp_path, before=ignoring)
    assert process.stdout is not None
    while "step 1 " not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert not wait_for(lambda: process.poll() is not None, 1.0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143


@needs.LINUX  # which has /dev/full
@pytest.mark.parametrize("ending", ["| head -2", "> /dev/full", ">&-"])
def test_output_that_nobody_takes_does_not_lose_the_run(
    files: dict[str, Path], tmp_path: Path, ending: str
) -> None:
    words = f"{sys.executable} -m anepy {' '.join(map(str, TRAIN))} --steps 300 {ending}"
    environment = os.environ | {"PYTHONPATH": children.PYTHONPATH}
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert read_meta(tmp_path / "m.ckpt.npz").step == 300
    if ending == "> /dev/full":
        assert "the run goes on without it" in done.stderr


@pytest.mark.parametrize("words", ["info", "fetch", "runs", "info --json"])
def test_closed_output_is_no_traceback(tmp_path: Path, words: str) -> None:
    environment = os.environ | {"PYTHONPATH": children.PYTHONPATH}
    command = f"{sys.executable} -m anepy {words} >&-"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr


def test_full_disk_at_a_checkpoint_is_a_note_and_tried_again(
    run: Run, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full for the second of four checkpoints."""
    from anepy.errors import CheckpointError

    save, calls = Trainer.save_checkpoint, []

    def failing(self: Trainer, *args: object, **options: object) -> int:
        calls.append(self.steps_done)
        if len(calls) == 3:
            raise CheckpointError("cannot write checkpoint c.npz: No space left on device")
        return save(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "save_checkpoint", failing)
    result = run(
        *TRAIN, "--steps", 8, "--checkpoint-every", 2, "--ckpt", "c.npz", "--save", "s.bin"
    )
    assert result.code == 0 and calls == [0, 2, 4, 6, 8]
    assert "No space left on device; training goes on, and tries again" in result.err + result.out
    assert read_meta("c.npz").step == 8


def test_checkpoint_that_fails_at_the_end_does_not_take_the_model_along(
    run: Run, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    with needs.small_disk(tmp_path / "full", 2000):
        words = [*TRAIN, "--ckpt", "full/c.npz", "--save", "s.bin", "--steps", 400]
        process = start(tmp_path, *words)
        assert process.stdout is not None
        while "step 1 " not in process.stdout.readline():
            assert process.poll() is None
        with contextlib.suppress(OSError):  # as much as fits
            (tmp_path / "full" / "filler").write_bytes(bytes(1_900_000))
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "model saved: s.bin" in errors, errors
    assert Model.load(tmp_path / "s.bin").n_parameters


def test_diverged_run_leaves_its_last_good_state(run: Run, files: dict[str, Path]) -> None:
    """Weights of 1e30 are finite, but what they give is not: they replace no good checkpoint."""
    ruin = [*TRAIN, "--device", "cpu", "--steps", 400, "--lr", 1e30, "--save", "s.bin"]
    result = run(*ruin, "--checkpoint", "c.npz")
    assert_one_line_error(result, "not finite", "largest weight is 1e+30, in", "began is in c.npz")
    assert read_meta("c.npz").step == 0 and names(".") == {*files, "c.npz"}
    assert run(*TRAIN, "--steps", 8, "--checkpoint", "c.npz").code == 0
    words = ["--steps", 400, "--lr", 1e30, "--checkpoint-every", 1, "--save", "s.bin"]
    result = run("train", "--resume", "c.npz", *words)
    assert result.code == 1 and "not finite" in result.err
    assert "the last checkpoint is in c.npz" in result.err
    assert read_meta("c.npz").updates == 4 and not Path("s.bin").exists()


def test_diverged_run_goes_back_and_on_with_other_data(
    run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    whole = Loop.step

    def poisoned(loop: Loop) -> object:
        steps.append(loop.steps + 1)
        if len(steps) in (7, 9):  # once each: what follows is other data
            raise loop.diverged("loss", loop.steps + 1)
        return whole(loop)

    monkeypatch.setattr(Loop, "step", poisoned)
    words = [*TRAIN, "--steps", 10, "--checkpoint-every", 4, "--checkpoint", "c.npz"]
    result = run(*words, "--on-diverge", "rollback", "--log", "l.jsonl")
    assert result.code == 0, result.err
    assert steps == [1, 2, 3, 4, 5, 6, 7, 5, 6, 5, 6, 7, 8, 9, 10]
    assert result.err.count("back to step 4, and on with other data") == 2
    # Those of the failed steps were not drawn here.
    assert read_meta("c.npz").sampler["index"] == 13 and read_meta("c.npz").step == 10
    back = [r for r in map(json.loads, Path("l.jsonl").open()) if r["type"] == "rollback"]
    assert [r["step"] for r in back] == [4, 4] and "not finite" in back[0]["reason"]
    ruin = [*TRAIN, "--device", "cpu", "--lr", 1e30, "--checkpoint", "d.npz"]
    steps.clear()
    result = run(*ruin, "--on-diverge", "rollback")
    assert result.code == 1 and result.err.count("back to step 0") == 3, result.err
    assert_one_line_error(run(*TRAIN, "--on-diverge", "maybe"), "must be stop or rollback")
    words = ["--on-diverge", "rollback", "--no-checkpoint"]
    assert_one_line_error(run(*TRAIN, *words), "needs a checkpoint to go back to")


def test_model_that_gives_no_numbers_is_named_everywhere(run: Run, files: dict[str, Path]) -> None:
    model = Model.load("m.bin")
    model.weights["norm.weight"][...] = 1e38
    model.weights["tok_embeddings.weight"][...] *= 1e3
    model.save("m.bin")
    bytes_only = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % value for value in range(256))]
    PieceTokenizer(bytes_only, [0.0] * len(bytes_only)).save("tokenizer.bin")
    told = ("m.bin", "not finite", "1e+38, in norm.weight")
    for words in (["-t", 0], ["-t", 1], ["-t", 1, "--json"]):
        result = run("generate", "m.bin", "-p", "", *words)
        assert result.code == 1 and all(part in result.err for part in told), result.err
        assert "Traceback" not in result.err
    assert_one_line_error(run("eval", "m.bin", "--data", "d.bin"), *told)
    result = run(*TRAIN, "--checkpoint", "c.npz")
    assert result.code == 1 and "step 0" in result.err and "norm.weight" in result.err
    assert not Path("c.npz").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--log", "m.bin"], "log and the model are the same file"),
        (["--log", "hard.bin"], "log and the model are the same file"),
        (["--log", "d.bin"], "log and the data are the same file"),
        (["--log", "d.bin.json"], "same file"),
        (["--log", "t.txt"], "is no log of anepy"),
        (["--checkpoint", "hard.bin"], "the checkpoint and the model"),
        (["--save", "link.bin"], "the model to save and the data"),
        (["--save", "d.bin.json"], "the data's .json"),
        (["--checkpoint", "v.bin", "--validation", "v.bin"], "validation data"),
    ],
)
def test_outputs_replace_no_input(
    run: Run, files: dict[str, Path], words: list[str], told: str
) -> None:
    os.link("m.bin", "hard.bin")
    os.symlink("d.bin", "link.bin")
    shutil.copy("d.bin", "v.bin")
    facts = {"format": "anepy-tokens-1", "dtype": "uint16", "vocab_size": 259}
    facts["tokens"] = Path("d.bin").stat().st_size // 2
    Path("d.bin.json").write_text(json.dumps(facts))
    before = {path: path.read_bytes() for path in Path().iterdir()}
    assert_one_line_error(run(*TRAIN, "--steps", 2, *words), told)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


# Lists and pictures


def test_runs_are_listed_and_drawn(run: Run, files: dict[str, Path]) -> None:
    words = ["--held-out", 0.2, "--eval-every", 2, "--steps", 6]
    assert run(*TRAIN, "--run", "first", *words).code == 0
    assert run(*TRAIN, "--run", "<b>second", *words, "--lr", 1e-3).code == 0
    result = run("runs")
    lines = result.out.splitlines()
    assert lines[0].split()[:3] == ["RUN", "STEP", "LOSS"] and len(lines) == 3, result
    assert {line.split()[0] for line in lines[1:]} == {"first", "<b>second"}
    assert run("plot", "first", "<b>second").code == 0
    page = Path("plot.html").read_text()
    assert "<b>second" not in page and "&lt;b&gt;second" in page
    assert page.count('class="curve"') == 6 and page.count('class="dot"') == 6
    assert "http" not in page.replace("http://www.w3.org", "")
    assert run("plot", "first", "<b>second", "-o", "p.svg").code == 0
    drawn = xml.etree.ElementTree.parse("p.svg").getroot()
    kinds = [element.tag.rpartition("}")[2] for element in drawn.iter()]
    assert kinds.count("polyline") == 2 and kinds.count("circle") == 6


def test_what_is_no_run_is_one_line(run: Run, files: dict[str, Path]) -> None:
    assert_one_line_error(run("runs"), "no folder here holds a run")
    assert_one_line_error(run("runs", "none"), "none")
    assert_one_line_error(run("plot", "m.bin"), "is no log of a run")
    assert run(*KEPT, "--steps", 2).code == 0
    assert_one_line_error(run("plot", "r", "-o", "x.gif"), ".html or .svg or .png")
    os.link("r/log.jsonl", "x.svg")
    assert_one_line_error(run("plot", "r", "-o", "x.svg"), "same file")
    Path("f").write_text("")
    assert_one_line_error(run(*TRAIN, "--run", "f", "--steps", 2), "f is a file")
