"""What a Mac is, as far as the Neural Engine is concerned: chip, system, frameworks, obstacles.

`System` holds every question that is put to macOS, so that a test can answer them.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from . import machine

_FRAMEWORKS = {
    "AppleNeuralEngine": "/System/Library/PrivateFrameworks/AppleNeuralEngine.framework",
    "IOSurface": "/System/Library/Frameworks/IOSurface.framework",
    "Metal": "/System/Library/Frameworks/Metal.framework",
    "MetalPerformanceShaders": "/System/Library/Frameworks/MetalPerformanceShaders.framework",
    "Accelerate": "/System/Library/Frameworks/Accelerate.framework",
}
# Compiler families of the engine, by generation (docs/neural-engine.md#framework).
_FAMILIES = {"M1": "h13", "M2": "h14", "M3": "h15", "M4": "h16"}
_M5 = {"M5": "h16", "M5 Max": "h17"}
# Apple's figure for one Neural Engine; the research programs' utilization refers to it too.
ANE_PEAK_TFLOPS = 15.8
_OLDEST = 13  # functions of the older dialect came with it, those of the newer one with 15
_NEWER_DIALECT = 15


class System:
    """The questions that are put to macOS."""

    name = sys.platform
    architecture = platform.machine()

    def sysctl(self, name: str) -> str:
        """Return a value of sysctl, empty if there is none."""
        return machine.sysctl(name)

    def version(self) -> tuple[str, str]:
        """Return version and build of macOS."""
        return machine.macos()

    def opens(self, path: str) -> bool:
        """Return whether a framework can be opened; its file is in the system's shared cache."""
        with contextlib.suppress(OSError):
            ctypes.CDLL(path)
            return True
        return False


@dataclass(frozen=True)
class Mac:
    """A Mac.

    Attributes:
        chip: like "Apple M4 Max".
        model: like "Mac16,5".
        memory: bytes.
        performance_cores: physical performance cores; 0 if macOS does not tell.
        efficiency_cores: physical efficiency cores; 0 if macOS does not tell.
        macos: its version, like "26.2".
        build: of macOS, like "25C56".
        family: of the Neural Engine, h13 to h17; empty if unknown.
        translated: this Python is an Intel program under Rosetta.
        virtual: this is a virtual machine.
        frameworks: which can be opened.
        warnings: what stands in the way or is unusual, one line each, the worst first.
    """

    chip: str
    model: str
    memory: int
    performance_cores: int
    efficiency_cores: int
    macos: str
    build: str
    family: str
    translated: bool
    virtual: bool
    frameworks: Mapping[str, bool]
    warnings: tuple[str, ...]


THIS = System()
"""Who is asked by default; a test may put its own here."""


def describe(system: System | None = None) -> Mac | None:
    """Describe this Mac; None elsewhere."""
    system = system or THIS
    if system.name != "darwin":
        return None
    version, build = system.version()
    chip = system.sysctl("machdep.cpu.brand_string")
    frameworks = {name: system.opens(f"{path}/{name}") for name, path in _FRAMEWORKS.items()}
    return Mac(
        chip=chip,
        model=system.sysctl("hw.model"),
        memory=_number(system.sysctl("hw.memsize")),
        performance_cores=_number(system.sysctl("hw.perflevel0.physicalcpu")),
        efficiency_cores=_number(system.sysctl("hw.perflevel1.physicalcpu")),
        macos=version,
        build=build,
        family=family(chip),
        translated=_translated(system),
        virtual=_virtual(system),
        frameworks=frameworks,
        warnings=(*_obstacles(system), *_oddities(system, chip, frameworks)),
    )


def obstacle(system: System | None = None) -> str:
    """Return what keeps this Mac from using its Neural Engine and what to do, empty if nothing."""
    system = system or THIS
    return next(iter(_obstacles(system)), "") if system.name == "darwin" else ""


def family(chip: str) -> str:
    """Return the compiler family of a chip's Neural Engine, empty if unknown.

    Example:
        >>> family("Apple M2 Pro")
        'h14'
    """
    words = chip.removeprefix("Apple ").split()
    if not words:
        return ""
    if words[0] == "M5":
        return _M5.get(" ".join(words[:2]), "h16 or h17")
    return _FAMILIES.get(words[0], "")


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _translated(system: System) -> bool:
    return system.sysctl("sysctl.proc_translated") == "1"


def _virtual(system: System) -> bool:
    return system.sysctl("kern.hv_vmm_present") == "1"


def _major(version: str) -> int:
    return _number(version.partition(".")[0])


def _obstacles(system: System) -> list[str]:
    """List what makes the Neural Engine unusable."""
    version, _ = system.version()
    found = []
    if _translated(system):
        found.append(
            "this Python is an Intel program under Rosetta, the Neural Engine needs an arm64 one: "
            "install Python from python.org, or with an arm64 Homebrew, and make a new virtual "
            "environment with it"
        )
    elif system.architecture == "x86_64":
        found.append(
            "this Mac has an Intel processor and no Neural Engine (Apple silicon has one): "
            "device cpu works"
        )
    if _virtual(system):
        found.append("this is a virtual machine, which has no Neural Engine: run on the Mac itself")
    if 0 < _major(version) < _OLDEST:
        found.append(
            f"macOS {version} is too old for the Neural Engine's programs: update to {_OLDEST} or "
            f"later, best {_NEWER_DIALECT} or later"
        )
    return found


def _oddities(system: System, chip: str, frameworks: Mapping[str, bool]) -> list[str]:
    """List what may work, but is worth a word."""
    version, _ = system.version()
    found = []
    if _OLDEST <= _major(version) < _NEWER_DIALECT:
        found.append(
            f"macOS {version} may know the older dialect of programs only: `anepy probe` finds out"
        )
    if system.architecture == "arm64" and not family(chip):
        found.append(f"chip {chip or 'without a name'} is new to anepy: `anepy probe` tests it")
    found += [
        f"{name}.framework cannot be opened: {_MISSING.get(name, 'is this system complete?')}"
        for name, there in frameworks.items()
        if not there
    ]
    return found


_MISSING = {
    "AppleNeuralEngine": "this macOS may keep it elsewhere; please send `anepy info --json`",
    "Metal": "no weight gradients on the GPU (--metal)",
    "MetalPerformanceShaders": "no weight gradients on the GPU (--metal)",
    "Accelerate": "products on the CPU use anepy's own kernels",
}
