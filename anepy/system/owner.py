"""One process at a time on a file or folder: an owner file beside it, where locks may not work.

Network and container file systems often ignore or refuse `flock`. Creating a file that must not
exist yet works on all of them. What it holds tells who made it, so that one left behind by a killed
process is recognised and taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BusyError
from . import files
from .files import parsed

_MOST_TRIES = 50
_PAUSE = 0.02  # s between two tries
_LONGEST_CLEARING = 10.0  # s
_LONGEST = 4096  # bytes of an owner file that are read


@contextlib.contextmanager
def owned(path: str | os.PathLike[str], what: str, inherited: bool = False) -> Iterator[None]:
    """Hold the owner file `path` while the block runs.

    Args:
        path: the owner file; its folder exists.
        what: what is owned, for the message.
        inherited: this process may have it already, from before it began again with `exec`.

    Raises:
        BusyError: a running process has it, or one of another computer.
        OSError: the file cannot be made.
    """
    mine = _mine()
    if not (inherited and os.path.exists(path) and _read(Path(path)) == mine):
        _take(Path(path), mine, what)
    try:
        with files.temporary(os.fspath(path)):
            yield
    finally:
        # Somebody who removed the file by hand may have made another.
        with contextlib.suppress(OSError):
            if _read(Path(path)) == mine:
                os.unlink(path)


def _take(path: Path, mine: bytes, what: str) -> None:
    for _ in range(_MOST_TRIES):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            _refuse_or_clear(path, what)
            continue
        try:
            os.write(descriptor, mine)
        finally:
            os.close(descriptor)
        return
    raise BusyError(f"{what} is taken by one process after another; try again later")


def _refuse_or_clear(path: Path, what: str) -> None:
    """Raise if the owner still runs, else remove its file."""
    try:
        found = _read(path)
    except FileNotFoundError:
        return
    try:
        owner = parsed(found)
        pid, host = int(owner["pid"]), str(owner["host"])
    except (ValueError, TypeError, KeyError):
        # Between creating and writing it is empty; nobody can be asked.
        raise BusyError(
            f"{what} is in use, says {path}, which names no process; remove that file if none is"
        ) from None
    if host != socket.gethostname():
        raise BusyError(
            f"{what} is in use by process {pid} on {host}; wait for it, or remove {path} if that "
            "process is gone"
        )
    if _facts(pid) == {key: owner.get(key) for key in ("boot", "started")} and files.running(pid):
        raise BusyError(f"{what} is in use by process {pid}; wait for it, or name another")
    _clear(path, found)


def _clear(path: Path, found: bytes) -> None:
    """Remove the file of an owner that is gone; only one process does so at a time."""
    clearing = path.with_name(f"{path.name}.clearing")
    try:
        os.close(os.open(clearing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
    except FileExistsError:
        with contextlib.suppress(OSError):
            if time.time() - clearing.stat().st_mtime > _LONGEST_CLEARING:
                clearing.unlink()  # killed in the middle of it
        time.sleep(_PAUSE)
        return
    try:
        with contextlib.suppress(FileNotFoundError):
            if _read(path) == found:
                path.unlink()
    finally:
        clearing.unlink(missing_ok=True)


def _mine() -> bytes:
    pid = os.getpid()
    record = {"pid": pid, "host": socket.gethostname(), **_facts(pid)}
    return json.dumps(record).encode()


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_LONGEST)


def _facts(pid: int) -> dict[str, Any]:
    """Return what tells a process from a later one of the same number; empty where unknown."""
    facts: dict[str, Any] = {"boot": "", "started": ""}
    with contextlib.suppress(OSError, IndexError):
        facts["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Field 22; the name of the program, in parentheses, may hold blanks.
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        facts["started"] = stat.rpartition(")")[2].split()[19]
    return facts
