"""Which device "auto" takes, and that it says so: in the API, on the terminal and in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from commands import Run

from anepy.engine import Engine, device
from anepy.engine import engine as engine_module
from anepy.engine.device import DeviceInfo, choice_note, open_device
from anepy.errors import CompileBudgetError, ConfigError, NativeError
from anepy.models.model import PRESETS, Model

CHOSEN = "device cpu, chosen automatically; not ane: "
SMALL = PRESETS["stories260K"]


def known(monkeypatch: pytest.MonkeyPatch, *found: DeviceInfo) -> None:
    """Let a machine have these devices."""
    monkeypatch.setattr(device, "devices", lambda: list(found))


def make(name: str) -> str:
    return name.upper()


def test_a_named_device_is_taken_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch)
    assert open_device("sim:m1", make) == ("SIM:M1", "")


def test_auto_takes_the_first_usable_and_says_why_not_a_better_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = DeviceInfo("cpu", True, "native")
    known(monkeypatch, DeviceInfo("ane", True, "Apple Neural Engine"), cpu)
    assert open_device("auto", make) == ("ANE", "device ane, chosen automatically")
    reason = "device ane: this Mac has an Intel processor; use --device cpu"
    known(monkeypatch, DeviceInfo("ane", False, reason), cpu)
    assert open_device("auto", make) == ("CPU", CHOSEN + "this Mac has an Intel processor")


@pytest.mark.parametrize(
    "error",
    [
        NativeError(-40, "device", "device ane: program ffn_fwd does not compile\nhere"),
        ConfigError("device ane: program ffn_fwd does not compile here; use --device cpu"),
    ],
)
def test_auto_goes_on_where_an_engine_cannot_be_made(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def breaks(name: str) -> str:
        if name == "ane":
            raise error
        return name

    known(monkeypatch, DeviceInfo("ane", True, ""), DeviceInfo("cpu", True, ""))
    assert open_device("auto", breaks) == ("cpu", CHOSEN + "program ffn_fwd does not compile here")
    with pytest.raises(type(error)):  # what was named is not replaced
        open_device("ane", breaks)


def test_auto_ends_with_the_last_error_and_never_takes_the_simulator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = []

    def breaks(name: str) -> str:
        tried.append(name)
        raise ConfigError(f"{name} is broken")

    found = [DeviceInfo(name, True, "") for name in ("ane", "cpu", "sim")]
    known(monkeypatch, *found)
    with pytest.raises(ConfigError, match=r"^cpu is broken$"):
        open_device("auto", breaks)
    assert tried == ["ane", "cpu"]

    def spent(name: str) -> str:
        raise CompileBudgetError(-42, "budget", f"{name} compiled enough")

    with pytest.raises(CompileBudgetError, match=r"^ane compiled"):
        open_device("auto", spent)


def test_engine_tells_where_it_runs_and_why() -> None:
    names = [info.name for info in device.devices()]
    assert names[-1] == "sim" and names.index("ane") < names.index("cpu")
    with Engine(Model.init(SMALL)) as engine:
        if engine.device == "cpu":
            assert engine.device_note.startswith(CHOSEN) and "\n" not in engine.device_note
        else:
            assert engine.device_note == choice_note("ane", [])
    for name in ("cpu", "sim"):
        with Engine(Model.init(SMALL), device=name) as engine:
            assert (engine.device, engine.device_note) == (name, "")


@pytest.mark.parametrize(
    "words",
    [
        ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--steps", 2],
        ["eval", "m.bin", "--data", "d.bin"],
        ["generate", "m.bin", "-n", 3],
    ],
    ids=["train", "eval", "generate"],
)
def test_commands_say_it_once_and_only_if_the_device_was_not_named(
    run: Run,
    files: dict[str, Path],
    words: list[object],
) -> None:
    chosen = run(*words)
    lines = [line for line in chosen.err.splitlines() if "chosen automatically" in line]
    assert chosen.code == 0 and len(lines) == 1, chosen
    assert lines[0].startswith("anepy: note: device ") and "device cpu, chosen" not in chosen.out
    named = run(*words, "--device", "cpu")
    assert named.code == 0 and "chosen automatically" not in named.err
    assert "device cpu, chosen" not in named.out
    record = json.loads(run(*words, "--json").out)
    told = record.get("device_note") or record["notes"][0]
    assert f"anepy: note: {told}" == lines[0]
    record = json.loads(run(*words, "--device", "cpu", "--json").out)
    assert not record.get("device_note") and not record.get("notes")


def test_log_of_a_run_has_the_choice(run: Run, files: dict[str, Path]) -> None:
    words = ["train", "m.bin", "--data", "d.bin", "--seq", 16, "--steps", 1, "--log", "l.jsonl"]
    assert run(*words).code == 0
    record = json.loads(Path("l.jsonl").read_text().splitlines()[0])
    assert "chosen automatically" in record["notes"][0]


def test_generate_refuses_other_devices(run: Run, files: dict[str, Path]) -> None:
    result = run("generate", "m.bin", "--device", "sim")
    assert result.code == 1 and "text is generated on the CPU, not on device sim" in result.err


def test_auto_and_named_train_the_same() -> None:
    losses = []
    for name in ("auto", "cpu"):
        with Engine(Model.init(SMALL, seed=1), device=name, precision="fp32") as engine:
            losses.append(engine.step(np.arange(64), np.arange(64)).loss)
    assert losses[0] == losses[1]


def test_engine_that_cannot_be_made_on_the_better_device_is_made_on_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The library says that the simulator's chip is usable until an engine is made on it."""
    known(monkeypatch, DeviceInfo("sim:m9", True, ""), DeviceInfo("cpu", True, ""))
    with Engine(Model.init(SMALL)) as engine:
        assert engine.device == "cpu"
        assert engine.device_note.startswith(
            "device cpu, chosen automatically; not sim:m9: unknown device detail 'm9'"
        )


def test_compare_says_it_and_keeps_to_one_device(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["compare", "baseline", "opt", "--preset", "stories260K", "--rounds", 1, "--steps", 1]
    words += ["--warmup", 0, "--seq", 16]
    assert run(*words).out.count("chosen automatically") == 1
    assert "chosen automatically" not in run(*words, "--device", "cpu").out
    asked: list[str] = []
    real = engine_module.open_device

    def note(name: str, create: Callable[[str], object]) -> object:
        asked.append(name)
        return real(name, create)

    monkeypatch.setattr(engine_module, "open_device", note)
    record = json.loads(run(*words, "--json", "-").out)
    assert asked[0] == "auto" and set(asked[1:]) == {record["engine"]["device"]}
    assert "chosen automatically" in record["notes"][0]
