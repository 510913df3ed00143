"""What a Mac tells about itself, with stand-ins for the questions put to macOS."""

from __future__ import annotations

import json
from collections.abc import Mapping

import needs
import pytest
from commands import Run

from anepy.engine import Engine, adapt
from anepy.errors import ConfigError
from anepy.models.model import PRESETS, Model
from anepy.system import mac, machine

MAX = {
    "machdep.cpu.brand_string": "Apple M4 Max",
    "hw.model": "Mac16,5",
    "hw.memsize": "68719476736",
    "hw.perflevel0.physicalcpu": "12",
    "hw.perflevel1.physicalcpu": "4",
    "kern.hv_vmm_present": "0",
}


class Answers(mac.System):
    """A Mac that answers what it is told to."""

    name = "darwin"

    def __init__(
        self,
        values: Mapping[str, str] = MAX,
        version: str = "26.2",
        architecture: str = "arm64",
        missing: tuple[str, ...] = (),
    ) -> None:
        self.architecture = architecture
        self._values, self._version, self._missing = values, version, missing

    def sysctl(self, name: str) -> str:
        return self._values.get(name, "")

    def version(self) -> tuple[str, str]:
        return self._version, "25C56"

    def opens(self, path: str) -> bool:
        assert path.startswith("/System/Library/") and ".framework/" in path
        return path.rsplit("/", 1)[1] not in self._missing


def test_this_machine_is_a_mac_only_if_it_is_one() -> None:
    found = mac.describe()
    assert (found is not None) == (mac.THIS.name == "darwin")
    if found is None:
        assert mac.obstacle() == "" and not mac.THIS.opens("/System/Library/None")
        assert machine.macos() == ("", "")


def test_mac_is_described() -> None:
    found = mac.describe(Answers())
    assert found == mac.Mac(
        chip="Apple M4 Max", model="Mac16,5", memory=64 << 30, performance_cores=12,
        efficiency_cores=4, macos="26.2", build="25C56", family="h16", translated=False,
        virtual=False, warnings=(),
        frameworks=dict.fromkeys(["AppleNeuralEngine", "IOSurface", "Metal",
                                  "MetalPerformanceShaders", "Accelerate"], True),
    )  # fmt: skip
    assert mac.obstacle(Answers()) == ""


@pytest.mark.parametrize(
    ("chip", "family"),
    [
        ("Apple M1", "h13"), ("Apple M1 Ultra", "h13"), ("Apple M2 Pro", "h14"),
        ("Apple M3 Max", "h15"), ("Apple M4", "h16"), ("Apple M4 Pro", "h16"),
        ("Apple M5", "h16"), ("Apple M5 Max", "h17"), ("Apple M5 Pro", "h16 or h17"),
        ("Apple M9", ""), ("Apple A18 Pro", ""), ("VirtualApple", ""), ("", ""),
        ("Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", ""),
    ],
)  # fmt: skip
def test_family_of_a_chip(chip: str, family: str) -> None:
    assert mac.family(chip) == family


INTEL = {"machdep.cpu.brand_string": "Intel(R) Core(TM) i7", "hw.model": "MacBookPro16,1"}
ROSETTA = MAX | {"sysctl.proc_translated": "1"}
VIRTUAL = MAX | {"kern.hv_vmm_present": "1", "hw.model": "VirtualMac2,1"}


@pytest.mark.parametrize(
    ("system", "obstacle"),
    [
        (Answers(INTEL, "15.3", "x86_64"), "has an Intel processor and no Neural Engine"),
        (Answers(ROSETTA, "15.3", "x86_64"), "an Intel program under Rosetta"),
        (Answers(VIRTUAL), "this is a virtual machine"),
        (Answers(version="12.7.6"), "macOS 12.7.6 is too old for the Neural Engine's programs"),
    ],
    ids=["intel", "rosetta", "virtual", "old"],
)
def test_obstacles_say_what_to_do(system: Answers, obstacle: str) -> None:
    text = mac.obstacle(system)
    assert obstacle in text and ": " in text and "\n" not in text
    found = mac.describe(system)
    assert found is not None and found.warnings[0] == text
    assert found.translated == ("Rosetta" in text) and found.virtual == ("virtual machine" in text)
    if "Rosetta" in text:
        assert "no Neural Engine (Apple" not in " ".join(found.warnings)


@pytest.mark.parametrize(
    ("system", "warning"),
    [
        (Answers(version="14.7"), "macOS 14.7 may know the older dialect of programs only"),
        (Answers(MAX | {"machdep.cpu.brand_string": "Apple M9"}), "chip Apple M9 is new to anepy"),
        (Answers(missing=("AppleNeuralEngine",)), "AppleNeuralEngine.framework cannot be opened"),
        (Answers(missing=("Metal",)), "Metal.framework cannot be opened: no weight gradients"),
        (Answers(missing=("Accelerate",)), "anepy's own kernels"),
        (Answers(missing=("IOSurface",)), "is this system complete?"),
    ],
)
def test_oddities_are_warnings_but_no_obstacle(system: Answers, warning: str) -> None:
    found = mac.describe(system)
    assert found is not None and len(found.warnings) == 1 and warning in found.warnings[0]
    assert mac.obstacle(system) == ""


def test_mac_that_tells_nothing_is_described_all_the_same() -> None:
    found = mac.describe(Answers({}, ""))
    assert found is not None and (found.memory, found.performance_cores) == (0, 0)
    assert found.family == "" and "without a name" in found.warnings[0]


# ------------------------------------------------------------------------ where it is told


def test_info_shows_the_mac(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mac, "THIS", Answers(ROSETTA, "14.2", "x86_64"))
    shown = run("info")
    assert shown.code == 0
    for line in (
        "macOS: 14.2 (25C56) on Mac16,5",
        "cores: 12 performance, 4 efficiency",
        "neural engine: family h16",
        "frameworks: AppleNeuralEngine, IOSurface, Metal, MetalPerformanceShaders, Acc",
        "warning: this Python is an Intel program under Rosetta",
        "warning: macOS 14.2 may know the older dialect",
    ):
        assert line in " ".join(shown.out.split()), shown.out
    record = json.loads(run("info", "--json").out)
    assert record["mac"]["translated"] is True and len(record["mac"]["warnings"]) == 2
    assert record["mac"]["frameworks"]["AppleNeuralEngine"] is True


@needs.NO_MAC
def test_info_elsewhere_has_no_mac_and_no_probe(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: object,
) -> None:
    monkeypatch.setenv("ANEPY_CACHE", str(tmp_path))
    record = json.loads(run("info", "--json").out)
    assert record["mac"] is None and record["probe"] is None
    assert "neural engine" not in run("info").out


def test_info_shows_what_was_probed(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: object,
) -> None:
    monkeypatch.setenv("ANEPY_CACHE", str(tmp_path))
    record = {
        "schema": adapt.SCHEMA, "device": "ane", "created": "2026-11-23T04:09:05+00:00",
        "verdicts": {"ok": 16, "differs": 1, "failed": 0},
        "adapts": [{"detail": "dialect=1.0", "because": "x"}],
    }  # fmt: skip
    path = adapt.store(record)
    assert f"16 ok, 1 differs on 2026-11-23; dialect=1.0 ({path})" in run("info").out
    assert json.loads(run("info", "--json").out)["probe"]["adapts"] == ["dialect=1.0"]


def test_unusable_neural_engine_says_what_the_mac_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.no_neural_engine()
    model = Model.init(PRESETS["stories260K"])
    with pytest.raises(ConfigError, match="device ane: ") as plain:
        Engine(model, device="ane")
    monkeypatch.setattr(mac, "THIS", Answers(INTEL, "15.3", "x86_64"))
    with pytest.raises(ConfigError, match="device ane: this Mac has an Intel processor") as found:
        Engine(model, device="ane")
    assert str(found.value) != str(plain.value) and "\n" not in str(found.value)
    with Engine(model) as engine:
        assert "not ane: this Mac has an Intel processor and no Neural" in engine.device_note
    with pytest.raises(ConfigError, match="unknown variant"):  # other errors stay what they are
        Engine(model, "nonsense", "cpu")
