"""`anepy compare`: what it accepts, prints, writes and answers with."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
from cases import GQA, make_model
from commands import Run, assert_one_line_error, runner
from comparisons import make_comparison

from anepy.comparing.file import load, save
from anepy.engine import Engine
from anepy.errors import NativeError

SHORT = ["--model", "m.bin", "--data", "d.bin", "--rounds", 2, "--steps", 2, "--warmup", 0,
         "--seq", 16, "--device", "cpu", "--precision", "fp32"]  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Return a function that runs `anepy compare` in a folder with a small model and tokens."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    make_model().save("m.bin")
    np.random.default_rng(0).integers(0, GQA.vocab_size, 400).astype("<u2").tofile("d.bin")
    return runner(capsys, monkeypatch, "compare")


def test_compare_prints_a_table_and_what_it_means(run: Run) -> None:
    result = run("baseline", "opt", *SHORT)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    end = next(at for at, line in enumerate(lines) if line.startswith("opt: "))
    assert max(map(len, lines[7:end])) <= 80
    head = next(line for line in lines if "delta" in line)
    assert head.split() == ["baseline", "opt", "delta"]
    for part in ("ms/step", "forward + backward", "allocations/step", "loss curves"):
        assert part in result.out, part
    # Plain kernels on one thread add in the same order in both.
    assert "agree to" in result.out or "bit-identical" in result.out
    assert "opt: " in result.out and "time per step against baseline" in result.out
    assert "2 rounds: intervals are to be trusted from 5 on" in result.out
    assert "\x1b" not in result.out, "no colour in a pipe"


def test_compare_ablate_has_a_row_per_switch(run: Run) -> None:
    result = run("baseline", "max", "--ablate", *SHORT)
    assert result.code == 0, result.err
    for switch in ("simd_adam", "prealloc", "metal_dw", "background_compile"):
        assert f"\n{switch} " in result.out, switch
    assert "what each switch changes" in result.out and "not on this device" in result.out


def test_compare_json_holds_every_sample_and_the_command(run: Run) -> None:
    result = run("baseline", "opt", *SHORT, "--json", "r.json")
    assert result.code == 0 and "results written: r.json" in result.out
    record = json.loads(Path("r.json").read_text())
    assert record["command"][:4] == ["anepy", "compare", "baseline", "opt"]
    assert record["machine"]["processor"] and len(record["library"]["sha256"]) == 64
    steps = record["groups"][0]["runs"][1]["steps"]
    assert len(steps["step_ms"]) == len(steps["device_ms"]) == 4
    assert load("r.json").runs("opt")[0].rounds == 2


def test_compare_json_to_standard_output_is_alone_there(run: Run) -> None:
    result = run("baseline", "opt", *SHORT, "--json", "-")
    assert json.loads(result.out)["format"] == "anepy-compare" and result.err == ""


def test_compare_without_model_and_data(run: Run) -> None:
    result = run(
        "baseline", "opt", "--preset", "stories260K", "--seq", 16, "--rounds", 1, "--steps", 1,
        "--device", "cpu",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "stories260K shape, random weights" in result.out and "Zipf" in result.out
    assert "one round, no interval" in result.out


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["opt"],
        ["opt", "max", "--nonsense"],
        ["opt", "max", "--rounds", "many"],
        ["opt", "max", "--model", "m.bin", "--preset", "stories15M"],
        ["--load"],
        ["--load", "a.json", "--steps", "3"],
        ["--load", "a.json", "--model", "m.bin"],
        ["--load", "a.json", "--json", "b.json"],
    ],
)
def test_compare_wrong_usage_exits_with_2(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert result.code == 2 and result.out == "" and "Usage:" in result.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["baseline", "nonsense"], ["nonsense", "baseline, opt"]),
        (["baseline", "opt+nonsense"], ["nonsense"]),
        (["opt", "opt+background_compile"], ["background_compile", "device cpu"]),
        (["baseline", "opt", "--rounds", "0"], ["rounds is 0"]),
        (["baseline", "opt", "--seq", "999"], ["context is"]),
        (["baseline", "opt", "--precision", "fp7"], ["fp7"]),
        (["baseline", "opt", "--device", "toaster"], ["toaster"]),
        (["baseline", "opt", "--model", "no.bin"], ["no.bin"]),
        (["baseline", "opt", "--data", "no.bin"], ["no.bin"]),
        (["baseline", "opt", "--json", "no/r.json"], ["no/r.json", "no folder"]),
        (["baseline", "opt", "--json", "/dev/null"], ["regular file"]),
        (["baseline", "opt", "--json", "m.bin"], ["same file"]),
        (["baseline", "opt", "--report", "no/r.html"], ["no/r.html", "no folder"]),
        (["baseline", "opt", "--report", "x", "--json", "x"], ["same file"]),
    ],
)
def test_compare_bad_input_is_one_line_and_writes_nothing(
    run: Run, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert_one_line_error(run(*SHORT, *words), *parts)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_compare_variant_that_fails_is_told_and_exits_with_1(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine.step

    def step(self: Engine, *args: Any) -> Any:
        if self.variant == "opt":
            raise NativeError(-40, "device", "the device failed")
        return real(self, *args)

    monkeypatch.setattr(Engine, "step", step)
    result = run("baseline", "opt", "max", *SHORT, "--json", "r.json")
    assert result.code == 1
    assert "opt ended after 0 rounds: the device failed" in result.out
    assert load("r.json").runs("max")[0].rounds == 2
    assert_one_line_error(run("opt", "opt", *SHORT), "nothing could be measured", "device failed")


def test_compare_writes_a_report(run: Run) -> None:
    result = run("baseline", "opt", "max", "--ablate", *SHORT, "--report", "r.html")
    assert result.code == 0 and "report written: r.html" in result.out
    page = Path("r.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and "Where the time goes" in page
    assert "anepy compare baseline opt max --ablate" in page, "the command"
    assert page.count('class="estimate') >= 12 and "not on this device" in page


def test_compare_failing_variant_still_writes_its_files(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine.update

    def update(self: Engine, *args: Any, **more: Any) -> Any:
        if self.variant == "baseline" and self.updates == 1:
            raise NativeError(-40, "device", "the device failed")
        return real(self, *args, **more)

    monkeypatch.setattr(Engine, "update", update)
    result = run("baseline", "opt", *SHORT, "--report", "r.html", "--json", "r.json")
    assert result.code == 1 and "the device failed" in Path("r.html").read_text()
    loaded = run("--load", "r.json", "--report", "again.html")
    assert loaded.code == 0 and "report written" in loaded.out
    assert "the device failed" in Path("again.html").read_text()


# Earlier results


def test_compare_load_lays_files_side_by_side(run: Run) -> None:
    first, second = make_comparison(), make_comparison({"opt": 300.0})
    second.machine = second.machine | {"processor": "Apple M4"}
    save(first, "epyc.json")
    save(second, "m4.json")
    result = run("--load", "epyc.json", "m4.json")
    assert (result.code, result.err) == (0, "")
    for part in ("epyc: baseline", "m4: opt", "different machines", "Apple M4", "measured apart"):
        assert part in result.out, part
    alone = run("--load", "epyc.json")
    assert alone.code == 0 and "delta" in alone.out and "different" not in alone.out


def test_compare_load_same_stem_and_same_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save(make_comparison(), "r.json")
    save(make_comparison(), "a/r.json")
    result = run("--load", "r.json", "a/r.json", "r.json")
    assert result.code == 0
    for name in ("r.json (1): opt", "a/r.json: opt", "r.json (2): opt"):
        assert name in result.out, name


def test_compare_load_of_something_else_is_one_line(run: Run) -> None:
    Path("x.json").write_text("{}")
    assert_one_line_error(run("--load", "x.json"), "x.json", "no result of anepy compare")
    assert_one_line_error(run("--load", "no.json"), "no.json")


# Ctrl-C


def test_compare_interrupt_shows_what_was_measured(run: Run, tmp_path: Path) -> None:
    # Tells on standard error when a round begins, so that the test knows when to interrupt.
    code = (
        "import sys\n"
        "from anepy.cli import main as cli\n"
        "from anepy.console import compare\n"
        "def turn(self, progress):\n"
        "    print('round', progress.round, file=sys.stderr, flush=True)\n"
        "compare.Turns.turn = turn\n"
        "cli.main()"
    )
    words = [*SHORT, "--rounds", 10**6, "--json", "r.json"]
    process = children.start("-c", code, "compare", "baseline", "opt", *words, cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.split() == ["round", "4"]:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "interrupted: these are the rounds that were complete" in out and "ms/step" in out
    assert "Traceback" not in err and "showing what was measured" in err
    result = load("r.json")
    assert result.interrupted and result.runs("opt")[0].rounds >= 3


def test_compare_interrupt_before_anything_is_quiet(run: Run, tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from anepy.cli import main as cli\n"
        "from anepy.comparing import session\n"
        "real = session.synthetic\n"
        "def synthetic(*args):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    return real(*args)\n"
        "session.synthetic = synthetic\n"
        "cli.main()"
    )
    words = ["compare", "baseline", "opt", "--preset", "stories260K", "--json", "r.json"]
    done = children.run("-c", code, *words, cwd=tmp_path)
    assert done.returncode == 130, done
    assert "interrupted before a round was complete" in done.stderr and done.stdout == ""
    assert not Path("r.json").exists()
