"""This machine: its processor, its memory, its system. Facts only, gathered once asked for."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_CGROUPS = Path("/sys/fs/cgroup")


def describe() -> dict[str, Any]:
    """Describe this machine for a result that leaves it; nothing that names its owner.

    Returns:
        `system`, `processor`, `cpus` (usable by this process), `memory` (bytes); on a Mac also
        `macos`, `macos_build` and `model`.
    """
    facts: dict[str, Any] = {
        "system": system(),
        "processor": processor(),
        "cpus": usable_cpus(),
        "memory": memory(),
    }
    version, build = macos()
    if version:
        facts |= {"macos": version, "macos_build": build, "model": sysctl("hw.model")}
    return facts


def system() -> str:
    """Name the operating system, its release and the architecture of this process."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def processor() -> str:
    """Name the processor, or the architecture where the system does not tell."""
    if name := sysctl("machdep.cpu.brand_string"):
        return name
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> int:
    """Count the CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int:
    """Return the physical memory in bytes, 0 where the system does not tell."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroups: Path = _CGROUPS) -> int:
    """Return the bytes a new process could use without swapping, 0 where they are unknown.

    On Linux what the kernel estimates, and not more than the control group and this process's own
    limit of addresses leave. Elsewhere half of the physical memory: the system gives no such
    estimate, and others need some too.

    Args:
        meminfo: the kernel's table.
        cgroups: where control groups are mounted.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left = int(line.split()[1]) * 1024
                return min(left, _left_of_addresses(), *_left_in_cgroups(cgroups))
    return memory() // 2


def _left_of_addresses() -> int:
    """Return how many bytes `ulimit -v` leaves this process."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return 1 << 62
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return max(0, limit - pages * os.sysconf("SC_PAGE_SIZE"))
    return limit


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Yield how many bytes each limit of this container leaves; the first is no limit at all.

    Control groups of version 2 and of version 1 name their files differently.
    """
    yield 2**62
    for limit, usage, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
        ),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            left = int((root / limit).read_text()) - int((root / usage).read_text())
            # Files that were read count as used, and are dropped first when memory is short.
            for line in (root / statistics).read_text().splitlines():
                if line.startswith("inactive_file "):
                    left += int(line.split()[1])
            yield max(0, left)


def sysctl(name: str) -> str:
    """Return a value of macOS's sysctl; empty elsewhere or if there is no such value."""
    return _output("sysctl", "-n", name)


def sysctl_below(name: str) -> str:
    """Return the lines `name: value` of all values below a name of macOS's sysctl; else empty."""
    return _output("sysctl", name)


def macos() -> tuple[str, str]:
    """Return the version and the build of macOS, like ("26.2", "25C56"); empty elsewhere."""
    # platform.mac_ver() says 10.16 to a Python built for old systems.
    return _output("sw_vers", "-productVersion"), _output("sw_vers", "-buildVersion")


def _output(*command: str) -> str:
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
            return done.stdout.strip()
    return ""
