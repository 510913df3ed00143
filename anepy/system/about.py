"""What a bug report needs to know of this machine and process, and nothing that names a person."""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import locale
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from . import machine

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Instructions that decide which kernels run, as /proc/cpuinfo and macOS's sysctl name them.
_FEATURES = re.compile(
    r"sse4|avx|fma|f16c|bmi|amx|popcnt|neon|asimd|advsimd|fp16|fphp|bf16|i8mm|sve|sme(?!p)|dotprod"
)
_VARIABLES = re.compile(
    r"(ANEPY|OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|VECLIB|ATEN|MALLOC|LC)_\w+|CC|CI|LANG|TERM|COLORTERM|"
    r"NO_COLOR|FORCE_COLOR|COLUMNS|LINES|TMPDIR|XDG_CACHE_HOME|GLIBC_TUNABLES|"
    r"LD_(LIBRARY_PATH|PRELOAD)|DYLD_\w+|PYTHON\w+|(HTTPS?|ALL|NO)_PROXY|"
    r"(REQUESTS|CURL)_CA_BUNDLE|SSL_CERT_\w+",
    re.IGNORECASE,
)
_PROXY = re.compile(r"proxy$", re.IGNORECASE)
# Of version 2, then of version 1 of control groups, which has a folder for each controller.
_LIMITS = (
    "cpu.max",
    "memory.max",
    "cpu/cpu.cfs_quota_us",
    "cpu/cpu.cfs_period_us",
    "memory/memory.limit_in_bytes",
)


def computer() -> dict[str, Any]:
    """Describe system, processor, memory, and what limits this process in them."""
    return {
        **machine.describe(),
        "distribution": distribution(),
        "libc": " ".join(platform.libc_ver()).strip(),
        "features": features(),
        "online": os.cpu_count() or 0,
        "memory_available": machine.available_memory(),
        "cgroup": limits(),
    }


def distribution() -> str:
    """Name the Linux distribution; empty elsewhere, or where no file tells."""
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return ""


def features(proc: Path = _PROC) -> list[str]:
    """List the instruction sets of the processor that matter here, as the system names them.

    Args:
        proc: where the kernel's tables are.
    """
    with contextlib.suppress(OSError):
        for line in (proc / "cpuinfo").read_text().splitlines():
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return [word for word in words.split() if _FEATURES.search(word)]
    pairs = (line.partition(":") for line in machine.sysctl_below("hw.optional").splitlines())
    return [name for name, _, on in pairs if on.strip() == "1" and _FEATURES.search(name.lower())]


def limits(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> dict[str, list[str]]:
    """Read what limits this process's control group and its parents.

    Args:
        proc: where the kernel's tables are.
        cgroups: where control groups are mounted.

    Returns:
        By name of the kernel's file, of those that exist: what it says of the own group, then of
        each parent.
    """
    found: dict[str, list[str]] = {}
    for group in _groups(proc):
        for name in _LIMITS:
            folder, _, file = name.rpartition("/")
            with contextlib.suppress(OSError):
                text = (cgroups / folder / group / file).read_text().strip()
                found.setdefault(file, []).append(text)
    return found


def _groups(proc: Path) -> Iterator[str]:
    """Yield the paths of the own control groups and their parents; the root, "", is the last."""
    with contextlib.suppress(OSError):
        lines = (proc / "self" / "cgroup").read_text().splitlines()
        for path in sorted({line.split(":", 2)[-1].strip("/") for line in lines}):
            parts = path.split("/") if path else []
            yield from ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    yield ""


def interpreter() -> dict[str, Any]:
    """Describe the Python that runs."""
    return {
        "implementation": platform.python_implementation(),
        "version": sys.version.replace("\n", " "),
        "bits": 64 if sys.maxsize > 2**32 else 32,
        "executable": sys.executable,
        "isolated": sys.prefix != sys.base_prefix,
    }


def packages() -> dict[str, str | None]:
    """Return the versions of all packages that anepy names, optional ones too; None: not there."""
    try:
        lines = importlib.metadata.requires("anepy") or []
    except importlib.metadata.PackageNotFoundError:  # a folder that was put on the path
        lines = ["numpy", "requests", "platformdirs", "rich", "typer"]
    names = dict.fromkeys(re.split(r"[^\w.-]", line)[0].lower() for line in lines)
    found: dict[str, str | None] = {}
    for name in names:
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def terminal() -> dict[str, Any]:
    """Describe what output goes to, and in which encoding."""
    streams = {"stdout": sys.stdout, "stderr": sys.stderr}
    return {
        **{name: _stream(stream) for name, stream in streams.items()},
        "size": list(shutil.get_terminal_size()),
        "locale": ".".join(part or "" for part in locale.getlocale()),
        "preferred_encoding": locale.getpreferredencoding(False),
        "filesystem_encoding": sys.getfilesystemencoding(),
    }


def _stream(stream: TextIO | None) -> dict[str, Any]:
    if stream is None:
        return {"encoding": None, "terminal": False}
    return {"encoding": getattr(stream, "encoding", None), "terminal": stream.isatty()}


def environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that change what anepy does; of proxies only that there is one."""
    return {
        name: "(set)" if _PROXY.search(name) else value
        for name, value in sorted(variables.items())
        if _VARIABLES.fullmatch(name)
    }


def anonymous(record: Any) -> Any:
    """Return nested plain values without the person: home folder, user name in paths, passwords."""
    rules = [(re.compile(r"(?<=://)[^/@\s]+@"), "")]
    home = os.path.expanduser("~")
    for folder in {home, os.path.realpath(home)} - {"~", "/"}:
        rules.append((re.compile(rf"{re.escape(folder)}(?![\w.-])"), "~"))
    with contextlib.suppress(Exception):  # no such user, or no module that knows users
        user = getpass.getuser()
        if user not in ("", "root"):
            rules.append((re.compile(rf"(?<=/){re.escape(user)}(?=/|$)"), "USER"))

    def cleaned(value: Any) -> Any:
        if isinstance(value, str):
            for pattern, text in rules:
                value = pattern.sub(text, value)
            return value
        if isinstance(value, Mapping):
            return {name: cleaned(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [cleaned(item) for item in value]
        return value

    return cleaned(record)
