"""A run that goes on in new processes, as often as the compile budget asks for it.

Every run here is a process of its own: a budget counts what a process compiles.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import children
import needs
import numpy as np
import pytest
from commands import SMALL, start

from anepy.models.model import Model
from anepy.system import restart

STEPS = 18
SETTINGS = (
    "train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 2, "--lr", 0.01,
    "--schedule", "cosine", "--warmup", 2, "--seed", 5, "--held-out", 0.2, "--eval-every", 3,
    "--eval-windows", 2,
)  # fmt: skip


def fill(folder: Path) -> Path:
    """Write a model and data, and make a place for temporary files."""
    Model.init(SMALL, seed=1).save(folder / "m.bin")
    ids = np.random.default_rng(0).integers(3, 259, 1500)
    ids[::3] = 70  # something to learn
    ids.astype("<u2").tofile(folder / "d.bin")
    (folder / "temporary").mkdir()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path)


def train(folder: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `anepy train` to its end."""
    environment = {"TMPDIR": str(folder / "temporary"), **environment}
    process = start(folder, *SETTINGS, *words, **environment)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return subprocess.CompletedProcess((), process.returncode, out, err)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "temporary").iterdir()]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curve(path: Path) -> list[tuple[object, ...]]:
    """Read from a log whatever does not depend on time."""
    names = ("type", "step", "loss", "lr", "loss_scale", "skipped", "grad_norm", "update")
    return [
        tuple(record.get(name) for name in names)
        for record in records(path)
        if record["type"] in ("step", "batch", "eval")
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train once without a budget."""
    folder = fill(tmp_path_factory.mktemp("reference"))
    done = train(folder, "--steps", STEPS, "--device", "sim:m4", "--save", "a.bin",
                 "--log", "a.jsonl", "--ckpt", "a.npz", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(folder / "a.npz") as arrays:
        moments = {n: arrays[n].tobytes() for n in arrays.files if n != "meta"}
    return {
        "weights": (folder / "a.bin").read_bytes(),
        "moments": moments,
        "curve": curve(folder / "a.jsonl"),
        "summary": json.loads(done.stdout)["summary"],
    }


@pytest.mark.parametrize(
    ("device", "restarts"),
    [
        ("sim:m4,budget=4", 2),
        ("sim:m4,budget=2", 4),
        ("sim:m4,procedures=no,budget=46", 4),
        ("sim:m4,test-fails=4", 2),
    ],
    ids=["budget-4", "budget-2", "single-programs", "failing-compiler"],
)
def test_run_over_several_processes_equals_one(
    folder: Path, reference: dict[str, Any], device: str, restarts: int
) -> None:
    words = ["--steps", STEPS, "--device", device, "--save", "b.bin", "--log", "b.jsonl"]
    done = train(folder, *words, "--ckpt", "b.npz", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)  # one object alone, by the last process
    assert record["summary"]["restarts"] == restarts
    assert (folder / "b.bin").read_bytes() == reference["weights"]
    assert curve(folder / "b.jsonl") == reference["curve"]
    with np.load(folder / "b.npz") as arrays:
        found = {n: arrays[n].tobytes() for n in arrays.files if n != "meta"}
    assert found == reference["moments"]
    kinds = [r["type"] for r in records(folder / "b.jsonl")]
    assert kinds.count("run") == 1 and kinds.count("restart") == restarts
    for name in ("step", "steps", "updates", "tokens", "skipped", "first_loss", "last_loss",
                 "held_out_before", "held_out_after"):  # fmt: skip
        assert record["summary"][name] == reference["summary"][name], name
    assert record["summary"]["compiles"] >= reference["summary"]["compiles"]
    assert leftovers(folder) == []


def test_terminal_output_has_one_line_per_restart(folder: Path) -> None:
    done = train(folder, "--steps", 12, "--device", "sim:m4,budget=3", "--ckpt", "b.npz")
    lines = done.stdout.splitlines()
    said = [line for line in lines if "restart" in line]
    assert said == [
        f"[exec() restart step {step}, {n} compiles, going on in a new process]"
        for step, n in ((6, 3), (12, 3))
    ]
    assert sum(line.startswith("anepy train:") for line in lines) == 1
    assert sum(line.startswith("Total steps:     12") for line in lines) == 1
    assert [int(line.split()[1]) for line in lines if line.startswith("step ")] == [*range(1, 13)]
    assert "RESUMED" not in done.stdout and done.stderr == ""
    assert "Compiles:" in done.stdout


def test_run_that_leaves_nothing_behind_still_goes_on(folder: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    done = train(folder, "--steps", 12, "--device", "sim:m4,budget=3", "--no-checkpoint", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["summary"]["restarts"] >= 1
    assert sorted(path.name for path in folder.iterdir()) == before
    assert leftovers(folder) == []


def test_demo_goes_on_and_leaves_nothing_behind(folder: Path) -> None:
    environment = {"TMPDIR": str(folder / "temporary")}
    process = start(
        folder, "train", "--steps", 4, "--device", "sim:budget=3", "--json", **environment
    )
    out, err = process.communicate(timeout=120)
    record = json.loads(out)
    assert process.returncode == 0 and record["summary"]["restarts"] == 1, err
    assert record["sample"] and leftovers(folder) == []
    assert not list(folder.glob("*.npz"))


def test_relative_paths_and_a_bare_resume_survive(folder: Path) -> None:
    """The command line of the next process says --resume itself; it means the first checkpoint."""
    assert train(folder, "--steps", 4, "--device", "sim").returncode == 0
    done = train(folder, "--steps", 14, "--device", "sim:budget=3", "--resume", "--save", "b.bin")
    assert done.returncode == 0 and done.stdout.count("exec()") >= 1, done.stderr
    assert done.stdout.count("[RESUMED step 4,") == 1
    whole = train(folder, "--steps", 14, "--device", "sim", "--ckpt", "w.npz", "--save", "a.bin")
    assert whole.returncode == 0
    # The cosine of the first four steps had another end: the curve differs, the run is complete.
    assert "Total steps:     10" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_between_and_after_restarts_saves_and_resume_equals_one_run(
    folder: Path, reference: dict[str, Any], number: int
) -> None:
    words = [*SETTINGS, "--steps", STEPS, "--device", "sim:m4,budget=3", "--ckpt", "b.npz"]
    process = start(folder, *words, "--log", "b.jsonl")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[exec() restart"):
            break
    process.send_signal(number)  # while the process is being replaced
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, (out, err)
    assert "Traceback" not in err and "continue with:\n  anepy train m.bin --resume b.npz" in out
    done = train(folder, "--steps", STEPS, "--device", "sim:m4,budget=3", "--resume",
                 "--ckpt", "b.npz", "--log", "b.jsonl", "--save", "b.bin")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "b.bin").read_bytes() == reference["weights"]


def test_run_told_to_ignore_ctrl_c_goes_on_through_restarts(
    folder: Path, reference: dict[str, Any]
) -> None:
    words = [*SETTINGS, "--steps", STEPS, "--device", "sim:m4,budget=3", "--save", "b.bin"]
    process = children.start(
        "-m", "anepy", *words, "--no-checkpoint",
        cwd=folder, before=children.UNINTERRUPTED, TMPDIR=str(folder / "temporary"),
    )  # fmt: skip
    assert process.stdout is not None
    lines = iter(process.stdout)
    for beginning in ("step ", "[exec() restart", "step "):
        next(line for line in lines if line.startswith(beginning))
        process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (folder / "b.bin").read_bytes() == reference["weights"] and leftovers(folder) == []


BROKEN = """
import os
from anepy import errors
from anepy.cli import main as cli
from anepy.engine import engine
if os.environ.get("ANEPY_RESTART"):
    def refuse(self, *sequence):
        raise errors.NativeError(-40, "device", "ANECCompile() FAILED")
    engine.Engine.step, engine.Engine.stale = refuse, True
cli.main()
"""


def broken(folder: Path, code: str, *words: object) -> subprocess.CompletedProcess[str]:
    temporary = str(folder / "temporary")
    return children.run("-c", code, *SETTINGS, *words, cwd=folder, TMPDIR=temporary)


@pytest.mark.parametrize("keep", [["--ckpt", "b.npz"], ["--no-checkpoint"]])
def test_programs_that_never_compile_end_the_run_with_their_text(
    folder: Path, keep: list[str]
) -> None:
    """The research programs start themselves again for ever in this case."""
    done = broken(folder, BROKEN, "--steps", STEPS, "--device", "sim:m4,budget=3", *keep)
    assert done.returncode == 1
    assert done.stdout.count("[exec() restart step 6,") == restart.MOST_FUTILE
    line = done.stderr.splitlines()[-1]
    assert line.startswith("anepy: error: ANECCompile() FAILED; a new process did not help either")
    name = "b.mil" if "--ckpt" in keep else "anepy.mil"
    assert f"the MIL of the first layer's programs is in {name}: please send it with `anepy" in line
    assert (folder / name / "model.mil").read_text().startswith("program(1.3)")
    assert (folder / name / "weights" / "weight.bin").stat().st_size > 1000
    assert leftovers(folder) == []
    assert ("the run is in b.npz" in line) == ("--ckpt" in keep)
    if "--ckpt" in keep:
        with np.load(folder / "b.npz") as arrays:
            assert json.loads(str(arrays["meta"]))["step"] == 6


def test_failing_to_save_ends_the_run_instead_of_losing_it(folder: Path) -> None:
    code = (
        "from anepy import errors\n"
        "from anepy.cli import main as cli\n"
        "from anepy.training import trainer\n"
        "def refuse(self, *a, **k): raise errors.CheckpointError('cannot write checkpoint: full')\n"
        "trainer.Trainer.save_checkpoint = refuse\n"
        "cli.main()\n"
    )
    done = broken(folder, code, "--steps", STEPS, "--device", "sim:m4,budget=3", "--no-checkpoint")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith("checkpoint: full")
    assert "exec()" not in done.stdout and leftovers(folder) == []


def test_next_process_has_no_open_files_of_the_last(folder: Path) -> None:
    code = (
        "import os, sys\n"
        "from anepy.cli import main as cli\n"
        "if os.environ.get('ANEPY_RESTART'):\n"
        "    print('open', sorted(int(n) for n in os.listdir('/proc/self/fd')), flush=True)\n"
        "else:\n"
        "    leak = os.dup(1); os.set_inheritable(leak, True)\n"
        "cli.main()\n"
    )
    needs.proc()
    done = broken(folder, code, "--steps", 8, "--device", "sim:m4,budget=3", "--no-checkpoint")
    opened = [line for line in done.stdout.splitlines() if line.startswith("open")]
    assert opened == ["open [0, 1, 2, 3]"] * len(opened) and opened  # 3 is the listing itself


def test_next_process_that_cannot_begin_says_why_and_leaves_nothing(folder: Path) -> None:
    code = (
        "import os\n"
        "from anepy.cli import main as cli\n"
        "if os.environ.get('ANEPY_RESTART'):\n"
        "    os.rename('d.bin', 'gone.bin')\n"
        "cli.main()\n"
    )
    done = broken(folder, code, "--steps", STEPS, "--device", "sim:m4,budget=3", "--no-checkpoint")
    assert done.returncode == 1 and done.stdout.count("exec()") == 1
    assert done.stderr.splitlines()[-1].startswith("anepy: error: ") and "d.bin" in done.stderr
    assert "Traceback" not in done.stderr and leftovers(folder) == []


def test_next_process_on_another_device_says_so(folder: Path) -> None:
    """A fallback is never silent, not even between two processes of a run."""
    code = (
        "import os\n"
        "from anepy.cli import main as cli\n"
        "from anepy.engine import device\n"
        "info = device.DeviceInfo\n"
        "better = info('sim:m4,budget=3', not os.environ.get('ANEPY_RESTART'), 'it is wedged')\n"
        "device.devices = lambda: [better, info('cpu', True, '')]\n"
        "cli.main()\n"
    )
    words = ["--steps", STEPS, "--no-checkpoint", "--log", "l.jsonl", "--variant", "opt"]
    done = broken(folder, code, *words)
    assert done.returncode == 0 and done.stdout.count("exec()") == 1, done.stderr
    notes = done.stderr.splitlines()
    assert (
        "anepy: note: device cpu, chosen automatically; not sim:m4,budget=3: it is wedged" in notes
    )
    assert any("device is cpu, the checkpoint had sim" in line for line in notes)
    engines = [r["engine"]["device"] for r in records(folder / "l.jsonl") if r["type"] == "run"]
    assert engines == ["sim", "cpu"]


SCRIPT = """
import sys
from pathlib import Path
from anepy import CompileBudgetError, TrainConfig, Trainer
settings = TrainConfig(steps=18, accum=2, seq=16, lr=0.01, schedule="cosine", warmup=2, seed=5,
                       held_out=0.2, eval_every=3, eval_windows=2, device="sim:m4,budget=5")
resume = "s.npz" if Path("s.npz").exists() else None
with Trainer("m.bin", "d.bin", settings, resume=resume) as trainer:
    try:
        for report in trainer:
            print(report.step, report.loss, report.held_out_loss)
    except CompileBudgetError:
        assert trainer.engine.stale
        trainer.save_checkpoint("s.npz")
        sys.exit(7)
    trainer.model.save("s.bin")
"""


def test_script_goes_on_from_the_exception_and_gets_every_report_once(
    folder: Path, reference: dict[str, Any]
) -> None:
    reports: list[str] = []
    for _ in range(10):
        done = children.run("-c", SCRIPT, cwd=folder)
        reports += done.stdout.splitlines()
        if done.returncode != 7:
            break
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "s.bin").read_bytes() == reference["weights"]
    expected = {step: loss for kind, step, loss, *_ in reference["curve"] if kind == "step"}
    held_out = {step: loss for kind, step, loss, *_ in reference["curve"] if kind == "eval"}
    assert reports == [f"{s} {loss} {held_out.get(s)}" for s, loss in expected.items()]


def test_budget_for_less_than_one_set_of_programs_is_refused_at_once(folder: Path) -> None:
    done = train(folder, "--steps", 4, "--device", "sim:m4,procedures=no,budget=11")
    assert done.returncode == 1 and "exec()" not in done.stdout
    assert "the programs need 20 compilations, a process may make 11" in done.stderr


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '{"pid": 1}', "[1]", "null"])
def test_foreign_values_of_the_variable_are_ignored(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv(restart.VARIABLE, text)
    assert restart.pending() is None and restart.VARIABLE not in os.environ


def test_another_process_does_not_take_over_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    found = restart.following(None, 7, Path("c.npz"))
    assert found == restart.Restart(os.getpid(), os.path.abspath("c.npz"), False, 7, 0)
    for pid, expected in ((os.getpid(), found), (os.getppid(), None)):
        values = {**found.__dict__, "pid": pid}
        monkeypatch.setenv(restart.VARIABLE, json.dumps(values))
        assert restart.pending() == expected
    assert restart.following(found, 7, Path("c.npz")).futile == 1
    assert restart.following(found, 8, Path("c.npz")).futile == 0
