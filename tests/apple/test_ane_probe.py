"""Probes, budget and "auto" on the Neural Engine device, whose frameworks are stand-ins here."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import needs
import numpy as np
import pytest
from commands import SMALL

from anepy.hardware.probes import PROBES
from anepy.models.model import Model

pytestmark = needs.LINUX  # a Mac has the real one

NAMES = [item.name for item in PROBES]
CODE = """
import ctypes, json, sys
from apple import ane_child
from anepy.engine import adapt
from anepy.hardware import ask as probe
from anepy.hardware.probes import find
from anepy.hardware.probe_mil import DeviceRunner
names, settings, fault, dialect = json.loads(sys.argv[1])
results = []
for name in names:
    ane_child.LIBRARY.standin_reset()
    ane_child.setting(settings)
    if fault:
        ane_child.fault(*fault)
    results.append({"name": name} | probe.ask(find(name), DeviceRunner("ane", dialect), None))
print(json.dumps({"results": results, "adapts": adapt.adaptations(results)} | ane_child.state()))
"""
ADAPTED = """
import json, sys
import numpy as np
from apple import ane_child
from anepy.engine import adapt
from anepy.engine import Engine
seen = []
for details in ([], ["dialect=1.0"]):
    ane_child.LIBRARY.standin_reset()
    ane_child.setting({"dialect": 10})
    known = {"adapts": [{"detail": d} for d in details]}
    adapt.store({"schema": adapt.SCHEMA, "device": "ane"} | known)
    with Engine(ane_child.make_model([32, 48, 1, 2, 2, 61, 64]), "opt", "ane") as engine:
        seen.append([engine.step(*ane_child.sequence(61, 64)).loss,
                     ane_child.calls("compileWithQoS:options:error:")])
print(json.dumps(seen))
"""
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(ane_library: Path, tmp_path: Path) -> Run:
    """Return a function that runs Python on the library with the stand-ins."""
    (tmp_path / "temporary").mkdir()

    def call(*words: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = children.run(
            *words,
            cwd=tmp_path,
            ANEPY_LIB=str(ane_library),
            ANEPY_CACHE=str(tmp_path / "cache"),
            TMPDIR=str(tmp_path / "temporary"),
            LLVM_PROFILE_FILE=str(tmp_path / "temporary" / "%p.profraw"),
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return call


def ask(
    python: Run, names: list[str], *, fault: Any = None, written: str = "1.3", **options: int
) -> Any:
    return json.loads(python("-c", CODE, json.dumps([names, options, fault, written])).stdout)


def verdicts(found: Any) -> dict[str, str]:
    return {item["name"]: item["verdict"] for item in found["results"]}


def test_every_probe_answers_as_on_the_simulator(python: Run) -> None:
    found = ask(python, [name for name in NAMES if name != "budget"])
    assert set(verdicts(found).values()) == {"ok"}, found
    assert (found["broken_rule"], found["live"], found["loaded"]) == ("", 0, 0)
    values = {item["name"]: item["values"] for item in found["results"]}
    assert values["floor"]["smallest"] == 49152  # the stand-in's own floor
    assert found["adapts"] == []
    found = ask(python, ["budget"])  # 130 programs, beyond what engines may compile
    assert found["results"][0]["values"] == {"limit": None, "transient": 0}
    found = ask(python, ["dialect", "add", "blob", "programs", "slice"], written="1.0", dialect=10)
    assert verdicts(found) == {
        "dialect": "differs",
        "add": "ok",
        "blob": "ok",
        "programs": "ok",
        "slice": "ok",
    }


@pytest.mark.parametrize(
    ("name", "options", "verdict", "adapts"),
    [
        ("binding", {"reverse": 1}, "failed", []),
        ("procedures", {"shuffle": 1}, "differs", ["procedures=no"]),
        ("procedures", {"procedures": 0}, "differs", ["procedures=no"]),
        ("dialect", {"dialect": 10}, "differs", ["dialect=1.0"]),
        ("add", {"framework": 0}, "failed", []),
        ("add", {"loads": 0}, "failed", []),
        ("layer", {"stride": 1}, "failed", []),
        ("layer", {"wide": 1}, "failed", []),
    ],
)
def test_engine_that_is_different_is_noticed(
    python: Run, name: str, options: dict[str, int], verdict: str, adapts: list[str]
) -> None:
    found = ask(python, [name], **options)
    assert verdicts(found) == {name: verdict}, found
    assert [item["detail"] for item in found["adapts"]] == adapts


def test_surfaces_that_must_be_equal_are_told(python: Run) -> None:
    found = ask(python, ["floor"], equal=1)
    assert found["results"][0]["values"]["unequal"] is False


@pytest.mark.parametrize(
    "fault",
    [
        ["evaluateWithQoS:options:request:error:", 0, "refuse"],
        ["evaluateWithQoS:options:request:error:", 0, "silent"],
        ["loadWithQoS:options:error:", 0, "lie"],
        ["IOSurfaceLock", 0, "refuse"],
        ["compileWithQoS:options:error:", 0, "refuse"],
    ],
    ids=lambda fault: f"{fault[0].split(':')[0]}-{fault[2]}",
)
def test_calls_that_fail_are_failures_and_no_findings(python: Run, fault: list[Any]) -> None:
    names = ["dialect", "add", "procedures", "reuse", "floor", "budget", "layer"]
    for name in names:
        found = ask(python, [name], fault=fault)
        assert verdicts(found) == {name: "failed"} and found["adapts"] == [], found
        assert "device ane" in found["results"][0]["reason"]


def test_command_asks_the_neural_engine_and_engines_follow(python: Run) -> None:
    done = python("-m", "anepy", "probe", "add", "surface", "--json")
    record = json.loads(done.stdout)
    assert (record["device"], record["device_note"], record["chip"]) == ("ane", "", None)
    assert record["verdicts"]["ok"] == 2
    (first, tries), (second, once) = json.loads(python("-c", ADAPTED).stdout)
    assert first == second and once == 1 < tries  # nothing is tried that is known to fail


def test_training_chooses_it_and_goes_on_over_processes(python: Run, tmp_path: Path) -> None:
    Model.init(SMALL, seed=1).save(tmp_path / "m.bin")
    ids = np.random.default_rng(0).integers(3, 259, 1500)
    ids.astype("<u2").tofile(tmp_path / "d.bin")
    words = ["-m", "anepy", "train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 2,
             "--steps", 12, "--lr", 0.01, "--no-checkpoint", "--variant", "opt"]  # fmt: skip
    chosen = python(*words, "--save", "auto.bin")
    assert "anepy: note: device ane, chosen automatically\n" in chosen.stderr
    assert "Engine: ane," in chosen.stdout
    limited = python(*words, "--save", "ane.bin", "--device", "ane:budget=2")
    assert limited.stdout.count("[exec() restart step") == 2 and "chosen" not in limited.stderr
    python(*words, "--save", "sim.bin", "--device", "sim")
    weights = {(tmp_path / f"{name}.bin").read_bytes() for name in ("auto", "ane", "sim")}
    assert len(weights) == 1
    left = [p.name for p in (tmp_path / "temporary").iterdir() if p.suffix != ".profraw"]
    assert not [name for name in left if name.startswith("anepy-restart")], left
