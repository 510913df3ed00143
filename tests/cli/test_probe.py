"""`anepy probe`: processes, records, what is kept and who reads it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest
from commands import Run

from anepy.engine import Engine, adapt
from anepy.hardware import ask as probe
from anepy.hardware.probes import PROBES, find
from anepy.models.model import Model, ModelConfig
from anepy.system import machine

NAMES = [item.name for item in PROBES]
TOP = {
    "schema", "anepy", "library", "device", "chip", "dialect", "machine", "created", "seconds",
    "probes", "adapts", "verdicts", "device_note",
}  # fmt: skip
PART = {"name", "question", "verdict", "values", "expected", "reason", "seconds"}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Keep the user's own records out of it."""
    monkeypatch.setenv("ANEPY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ----------------------------------------------------------------------------------- processes


def apart(code: str, timeout: float = 30.0) -> dict[str, Any]:
    command = (sys.executable, "-c", code)
    return probe.ask_apart(find("slice"), "sim:m1", "1.3", "m1", timeout, command)


def test_probe_in_its_own_process_answers_as_in_this_one() -> None:
    answer = probe.ask_apart(find("slice"), "sim:m1", "1.0", "m1")
    assert answer["verdict"] == "ok"
    assert answer["values"] == {"keeps_5000": False, "joined": True}
    refused = probe.ask_apart(find("slice"), "sim:m9", "1.0", "m1")
    assert refused["verdict"] == "failed" and "unknown device detail 'm9'" in refused["reason"]


def test_crash_is_an_answer() -> None:
    answer = apart("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (answer["verdict"], answer["values"]) == ("crashed", {})
    assert answer["reason"] == "its process was ended by SIGSEGV: no message"
    answer = apart("import sys; print('half', end=''); sys.exit('the driver is gone')")
    assert answer["reason"] == "its process ended with exit code 1: the driver is gone"
    answer = apart("print('[1]'); print('{}')")
    assert answer["verdict"] == "crashed" and "exit code 0" in answer["reason"]
    assert answer["expected"] == {"keeps_5000": False}


def test_hang_is_an_answer_and_leaves_no_process(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    answer = apart(code, timeout=2.0)
    assert (answer["verdict"], answer["reason"]) == ("hung", "no answer within 2 s")
    parent, child = map(int, (tmp_path / "pids").read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(parent, 0)
    status = Path(f"/proc/{child}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_what_a_program_prints_before_its_answer_is_no_answer() -> None:
    line = json.dumps(probe.ask(find("slice"), probe.DeviceRunner("sim:m1"), "m1"))
    assert apart(f"print('ANE says hello'); print({line!r})")["verdict"] == "ok"


# ------------------------------------------------------------------------------------- command


def test_whole_run_on_the_simulator(run: Run, cache: Path, tmp_path: Path) -> None:
    result = run("probe", "--device", "sim:m2", "-o", "out.json")
    assert (result.code, result.err) == (0, ""), result
    record = json.loads((tmp_path / "out.json").read_text())
    assert set(record) == TOP and record["schema"] == adapt.SCHEMA
    assert [item["name"] for item in record["probes"]] == NAMES
    assert all(set(item) == PART and item["verdict"] == "ok" for item in record["probes"])
    assert (record["device"], record["chip"], record["adapts"]) == ("sim:m2", "m2", [])
    assert record["verdicts"] == dict.fromkeys(probe.VERDICTS, 0) | {"ok": len(NAMES)}
    (kept,) = (cache / "probe").iterdir()
    assert json.loads(kept.read_text())["probes"] == record["probes"]
    assert kept == adapt.path("sim:m2") and f"kept in:    {kept}" in result.out
    for name in NAMES:
        assert f"\n{name}:" in result.out
    assert "adapts:     nothing" in result.out and f"{len(NAMES)} ok in" in result.out


def test_what_was_found_holds_for_later_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def answer(item: Any, device: str, dialect: str, *rest: Any) -> dict[str, Any]:
        asked[item.name] = device, dialect
        values = {"dialect": {"1.3": False, "1.0": True}, "budget": {"limit": 60}}
        return probe._answer("ok", values.get(item.name, {}), {}, "")

    monkeypatch.setattr(probe, "ask_apart", answer)
    record = probe.measure("sim:m1")
    assert asked["dialect"] == ("sim:m1", "1.3")
    assert asked["budget"] == ("sim:m1,dialect=1.0", "1.0")
    assert asked["layer"] == ("sim:m1,dialect=1.0,budget=60", "1.0")
    assert [item["detail"] for item in record["adapts"]] == ["dialect=1.0", "budget=60"]
    assert probe.with_details("ane", []) == "ane"
    assert probe.with_details("ane", ["budget=3"]) == "ane:budget=3"


def test_part_of_the_probes_is_not_kept(run: Run, cache: Path) -> None:
    result = run("probe", "slice", "add", "--device", "sim:m1", "--json")
    record = json.loads(result.out)
    assert result.code == 0 and [item["name"] for item in record["probes"]] == ["add", "slice"]
    assert not cache.exists()


def test_failure_and_adaptation_are_told(run: Run) -> None:
    result = run("probe", "budget", "layer", "--device", "sim:m4,test-fails=20")
    assert result.code == 0, result
    assert "(limit 20, transient 0)" in result.out
    assert "adapts: budget=20: a process compiles no more programs than that" in result.out
    result = run("probe", "binding", "add", "--device", "sim:m4,test-fails=1", "--json")
    assert json.loads(result.out)["verdicts"]["ok"] == 2  # each has a process of its own
    result = run("probe", "reuse", "--device", "sim:m4,test-fails=2")
    assert result.code == 1 and "failed: rule compile_budget" in result.out, result


@needs.NO_MAC
def test_auto_takes_the_simulator_and_says_so(run: Run) -> None:
    result = run("probe", "add")
    assert result.err.startswith("anepy: note: device sim, the simulator of chip M4; not ane: ")
    assert result.err.count("\n") == 1
    record = json.loads(run("probe", "add", "--json").out)
    assert record["device"] == "sim" and record["device_note"] in result.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nonsense"], "unknown probe 'nonsense': use one of dialect, add,"),
        (["--device", "cpu"], "device cpu has no Neural Engine"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["add", "--device", "sim", "-o", "no/folder.json"], "cannot write result no/folder.json"),
    ],
)
def test_bad_input_is_one_line(run: Run, words: list[str], part: str) -> None:
    result = run("probe", *words)
    assert result.code == 1 and result.err.startswith("anepy: error: "), result
    assert part in result.err and result.err.count("\n") == 1


def test_cache_that_cannot_be_written_is_told(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANEPY_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(probe, "PROBES", [find("add")])
    result = run("probe", "--device", "sim")
    assert result.code == 0 and "anepy: note: the result is not kept" in result.err


def test_interrupt_ends_the_probe_that_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    real = probe.subprocess.Popen.communicate
    calls = []

    def communicate(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(self)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    monkeypatch.setattr(probe.subprocess.Popen, "communicate", communicate)
    with pytest.raises(KeyboardInterrupt):
        apart(code + "; time.sleep(600)")
    assert calls[0].poll() is not None


# -------------------------------------------------------------------------- who reads the result


def record_of(*details: str, **changes: Any) -> dict[str, Any]:
    adapts = [{"detail": detail, "because": ""} for detail in details]
    return {"schema": adapt.SCHEMA, "device": "ane", "adapts": adapts} | changes


def test_only_device_ane_without_details_is_adapted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adapt.adapted("ane") == "ane"
    adapt.store(record_of("dialect=1.0", "budget=60"))
    adapt.store(record_of("dialect=1.0", device="sim"))
    assert adapt.adapted("ane") == "ane:dialect=1.0,budget=60"
    for device in ("ane:dialect=1.3", "cpu", "sim", "sim:m1", "auto"):
        assert adapt.adapted(device) == device
    # Another machine, or another build of the system, has to be asked itself.
    monkeypatch.setattr(machine, "macos", lambda: ("26.2", "25C56"))
    assert adapt.adapted("ane") == "ane"
    adapt.store(record_of("procedures=no"))
    assert adapt.adapted("ane") == "ane:procedures=no"
    monkeypatch.setattr(machine, "sysctl", lambda name: "Mac16,5")
    assert adapt.adapted("ane") == "ane" and adapt.path("ane").name == "ane-Mac16-5-25C56.json"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1, "adapts": [{"detail": "x"}]}'])
def test_unreadable_record_changes_nothing(text: str) -> None:
    path = adapt.store(record_of("dialect=1.0"))
    path.write_text(text)
    assert adapt.adapted("ane") == "ane" and adapt.stored("ane") is None


def test_engine_is_made_with_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator stands for the Neural Engine here: it reads the same details."""
    model = Model.init(ModelConfig(64, 96, 2, 4, 2, 97, 64), seed=1)
    ids = np.arange(64)
    adapt.store(record_of("dialect=1.0", "procedures=no", device="sim"))
    with Engine(model, "opt", "sim") as engine:
        assert engine.compiles == 1
    monkeypatch.setattr(adapt, "DEVICE", "sim")
    with Engine(model, "opt", "sim") as engine:
        assert engine.compiles > 10 and engine.device == "sim" and engine.device_note == ""
        adapted = engine.step(ids, ids).loss
    with Engine(model, "opt", "sim:m4") as engine:  # details are the user's
        assert engine.compiles == 1 and engine.step(ids, ids).loss == adapted
