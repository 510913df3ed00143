"""Runs that something goes wrong with: memory, data, logs, signals, a kill before the end."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path

import needs
import numpy as np
import pytest
from commands import Run, assert_one_line_error, start

from anepy.models.model import Model
from anepy.system import machine
from anepy.training.checkpoint import read_meta
from anepy.training.loop import Loop

TRAIN = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 2, "--checkpoint", "c.npz"]


def test_data_emptied_in_place_ends_the_run_with_a_checkpoint(
    run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Loop.step

    def emptied(loop: Loop) -> object:
        if loop.steps == 4:
            os.truncate("d.bin", 0)
        return whole(loop)

    monkeypatch.setattr(Loop, "step", emptied)
    result = run(*TRAIN, "--steps", 50)
    assert result.code == 1 and "d.bin has become shorter" in result.err, result.err
    assert "the run as it was then is in c.npz" in result.err
    assert read_meta("c.npz").step == 4


def test_other_data_of_equal_length_is_noted(run: Run, files: dict[str, Path]) -> None:
    assert run(*TRAIN, "--steps", 2).code == 0
    np.roll(np.fromfile("d.bin", "<u2"), 1).tofile("e.bin")
    words = ["train", "m.bin", "--resume", "c.npz", "--steps", 4]
    assert "data is not the checkpoint's" not in run(*words, "--data", "d.bin").err
    words[-1] = 6
    assert "data is not the checkpoint's" in run(*words, "--data", "e.bin").err


def test_log_of_a_killed_run_ends_where_its_checkpoint_is(run: Run, files: dict[str, Path]) -> None:
    assert run(*TRAIN, "--steps", 4, "--log", "l.jsonl").code == 0
    with open("l.jsonl", "a") as log:
        log.write('{"type": "step", "step": 5, "loss": 1}\n{"type": "eval", "step": 5}\n')
        log.write('{"type": "step", "step": 6, "lo')
    words = ["train", "m.bin", "--resume", "c.npz", "--log", "l.jsonl", "--steps"]
    assert run(*words, 6).code == 0
    records = [json.loads(line) for line in Path("l.jsonl").open()]
    steps = [record["step"] for record in records if record["type"] == "step"]
    assert steps == [1, 2, 3, 4, 5, 6] and all(r["type"] != "eval" for r in records)
    assert records[-1]["type"] == "summary"


def test_run_killed_before_its_end_writes_its_model(run: Run, files: dict[str, Path]) -> None:
    assert run(*TRAIN, "--steps", 4, "--save", "s.bin").code == 0
    told = run("train", "--resume", "c.npz")
    assert_one_line_error(told, "nothing left to do", "--save to write its model")
    before = Path("c.npz").read_bytes()
    assert run("train", "--resume", "c.npz", "--save", "again.bin").code == 0
    assert Path("again.bin").read_bytes() == Path("s.bin").read_bytes()
    assert Path("c.npz").read_bytes() == before
    words = ["train", "m.bin", "--data", "d.bin", "--run", "r", "--steps", 4, "--seq", 16]
    assert run(*words).code == 0
    model = Path("r/model.bin").read_bytes()
    Path("r/model.bin").unlink()
    assert run("train", "--run", "r", "--resume").code == 0
    assert Path("r/model.bin").read_bytes() == model


def test_memory_that_is_not_there_is_named_before_it_is_used(
    run: Run, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["this run needs", "are available", "smaller batch"]
    assert_one_line_error(run(*TRAIN, "--batch", 1 << 40), *words, "the tokens of a step")
    need = 12 * Model.load("m.bin").n_parameters
    monkeypatch.setattr(machine, "available_memory", lambda: need)
    assert_one_line_error(run(*TRAIN), *words, "activations", "gradients and moments")
    assert not Path("c.npz").exists()


@needs.LINUX
def test_limit_of_addresses_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + (1 << 24)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert 0 < machine.available_memory() <= 1 << 25


@needs.LINUX
def test_figure_of_the_summary_takes_no_memory_that_is_not_there(
    tmp_path: Path, files: dict[str, Path]
) -> None:
    """256 MiB for the speed of memory used to fail a run that was complete."""
    before = ("sh", "-c", 'ulimit -v 700000; exec "$@"', "sh")
    from children import start as start_python

    words = [*TRAIN, "--steps", 2, "--threads", 1]
    process = start_python(
        "-m", "anepy", *words, cwd=tmp_path, before=before, OPENBLAS_NUM_THREADS="1"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("number", [signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
def test_signal_that_ended_the_process_saves_the_run(
    tmp_path: Path, files: dict[str, Path], number: signal.Signals
) -> None:
    process = start(tmp_path, *TRAIN, "--steps", 10**6)
    try:
        assert process.stdout is not None
        while "step 1 " not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, errors
    assert read_meta(tmp_path / "c.npz").step > 0


def test_second_interrupt_says_where_the_run_is(tmp_path: Path, files: dict[str, Path]) -> None:
    """While a step that never ends is waited for, and while the summary is made."""
    from children import start as start_python

    stuck = (
        "import sys, time\n"
        "from anepy.cli import main, run\n"
        "from anepy.training.loop import Loop\n"
        "def wait(*_):\n"
        "    print('stuck', flush=True)\n"
        "    time.sleep(60)\n"
        "step = Loop.step\n"
        "if sys.argv[-1] == '7':\n"
        "    Loop.step = lambda self: step(self) if self.steps < 4 else wait()\n"
        "else:\n"
        "    run.device_peak = lambda *_: print('stuck', flush=True) or time.sleep(2)\n"
        "main.main()"
    )
    for seed, told in ((7, "in c.npz, as it was after step 4"), (8, "checkpoint saved: c.npz")):
        words = [*TRAIN, "--steps", 6, "--checkpoint-every", 4, "--seed", seed]
        process = start_python("-c", stuck, *words, cwd=tmp_path)
        try:
            assert process.stdout is not None
            before = ""
            while "stuck" not in (line := process.stdout.readline()):
                assert process.poll() is None
                before += line
            process.send_signal(signal.SIGINT)
            if seed == 7:
                time.sleep(0.6)  # sooner it could be an echo of the first
                process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=30)
        finally:
            process.kill()
        assert process.returncode == 130 and told in out + errors, (out, errors)
        assert "Traceback" not in errors


def test_interrupt_during_the_first_imports_is_quiet(tmp_path: Path) -> None:
    from children import start as start_python

    code = (
        "import os, signal, sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'anepy.cli.main':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            time.sleep(30)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "import anepy.__main__"
    )
    process = start_python("-c", code, cwd=tmp_path)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == -signal.SIGINT


def test_names_that_are_no_utf8(run: Run, files: dict[str, Path]) -> None:
    os.rename(b"m.bin", b"m\xff.bin")
    model, folder = os.fsdecode(b"m\xff.bin"), os.fsdecode(b"r\xff")
    words = ["train", model, *TRAIN[2:6], "--steps", 2]
    assert run(*words, "--run", folder).code == 0
    first = json.loads((Path(folder) / "log.jsonl").read_bytes().splitlines()[0])
    assert first["model"] == model
    assert run("train", "--run", folder, "--resume", "--steps", 4).code == 0
    assert run("runs", folder).code == 0
    for wrong in (["mil", os.fsdecode(b"\xff")], [*words, "--variant", os.fsdecode(b"\xff")]):
        assert_one_line_error(run(*wrong), "unknown")
    assert run("plot", folder, "-o", os.fsdecode(b"p\xff.html")).code == 0
    assert run("plot", folder, "-o", "p.svg").code == 0


@pytest.mark.parametrize("rate", [1e31, 1e39])
def test_rate_that_no_update_takes_is_refused_before_the_first_step(
    run: Run, files: dict[str, Path], rate: float
) -> None:
    result = run(*TRAIN, "--steps", 4, "--lr", rate)
    assert_one_line_error(result, f"lr is {rate}", "from 0 to 1e30")
    assert result.out == "" and not Path("c.npz").exists()
