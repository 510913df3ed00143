"""Files that appear complete or not at all, and the JSON they hold."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import json
import math
import os
import secrets
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError

# Temporary files that are open now; an abrupt end of the process (a second Ctrl-C) removes them.
_temporaries: set[str] = set()
_cleared: set[str] = set()  # folders in which this process has looked for what others left


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike[str], previous: str | os.PathLike[str] | None = None
) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its place if the block succeeds.

    The bytes are on the disk before the rename; the new file has the mode the umask asks for.

    Args:
        path: the file.
        previous: what the file that is replaced is called afterwards; None: it goes.

    Raises:
        OSError: as the operating system reports it; nothing stays behind, `path` is unchanged.
    """
    with _temporary(path) as (file, name, target):
        yield file
        file.flush()
        os.fsync(file.fileno())
        file.close()
        if previous is not None:
            _keep(target, os.fspath(previous))
        os.replace(name, target)
        _sync_folder(os.path.dirname(target))


def probe(path: str | os.PathLike[str]) -> None:
    """Write and remove a temporary file as `replacing` would.

    Raises:
        OSError: `replacing` would fail the same way.
    """
    with _temporary(path) as (file, _, _):
        # Some file systems accept a new name on a full disk, but not its first byte.
        file.write(b"\0")
        file.flush()


def discard_temporaries() -> None:
    """Remove what a save in progress has written; for the moment before an abrupt exit."""
    for name in list(_temporaries):
        if os.path.isdir(name):
            shutil.rmtree(name, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(name)


def new_name(folder: str) -> str:
    """Return a name for something temporary; what killed processes left in the folder goes first.

    The name says whose it is, so that nothing of a running process is touched, nor anything of
    another computer or container that shares the folder.
    """
    if folder not in _cleared:
        _cleared.add(folder)
        for left in glob.glob(f"{glob.escape(folder)}/.anepy-{_place()}-*.tmp"):
            with contextlib.suppress(OSError, ValueError):
                if not running(int(left.split("-")[-2])):
                    shutil.rmtree(left) if os.path.isdir(left) else os.unlink(left)
    return f"{folder}/.anepy-{_place()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"


@functools.cache
def _place() -> str:
    """Return what process numbers mean something in: this computer, or a container on it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
    return f"{zlib.crc32(' '.join(parts).encode()):08x}"


def running(pid: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder for temporary files of this process; it is gone at the end."""
    name = new_name(tempfile.gettempdir())
    os.mkdir(name, 0o700)
    try:
        with temporary(name):
            yield Path(name)
    finally:
        shutil.rmtree(name, ignore_errors=True)


@contextlib.contextmanager
def temporary(name: str) -> Iterator[None]:
    """Have `discard_temporaries` remove this file too while the block runs."""
    _temporaries.add(name)
    try:
        yield
    finally:
        _temporaries.discard(name)


def write_failure(path: str | os.PathLike[str], what: str, error: OSError) -> str:
    """Say in one line why a file could not be written and what to do.

    Args:
        path: the file.
        what: what the file is, in a word or two.
        error: what `replacing` or `probe` raised.
    """
    reason = error.strerror or str(error)
    advice = "choose another path"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "free some space or choose another folder; an older file there is unchanged"
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        reason = f"there is no folder {Path(path).parent}"
        advice = "create it first"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "choose a folder you may write to"
    return f"cannot write {what} {os.fspath(path)}: {reason}; {advice}"


def check_writable(path: str | os.PathLike[str], what: str, nbytes: int = 0) -> None:
    """Check that a file can be written later, before anything expensive starts.

    Args:
        path: the file that will be written.
        what: what the file is, for the message.
        nbytes: its expected size; free space below this is an error.

    Raises:
        ConfigError: the folder is missing, not writable or full, or `path` is not a file.
    """
    try:
        probe(path)
        usage = shutil.disk_usage(Path(os.path.realpath(path)).parent)
    except OSError as error:
        raise ConfigError(write_failure(path, what, error)) from error
    if usage.total and usage.free < nbytes:
        raise ConfigError(
            f"cannot write {what} {os.fspath(path)}: it needs {nbytes / 1e6:.1f} MB and the disk "
            f"has {usage.free / 1e6:.1f} MB free; choose another folder"
        )


def dumps(record: Any, indent: int | None = None) -> str:
    """Return JSON that every reader accepts: numbers that are not finite become null.

    Names of files that are no UTF-8 come back as they were, by `json.loads`.

    Args:
        record: nested mappings, sequences and plain values.
        indent: spaces per level; None for one line.
    """
    text = json.dumps(_finite(record), indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def parsed(text: str | bytes) -> Any:
    """Return what JSON says; files are not trusted to be shallow.

    Raises:
        ValueError: it is no JSON, or is nested deeper than Python follows.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


@contextlib.contextmanager
def _temporary(path: str | os.PathLike[str]) -> Iterator[tuple[BinaryIO, str, str]]:
    """Open a new file beside the target of `path`; it is gone at the end unless renamed."""
    # A link keeps pointing to the file; devices and folders are never replaced by a file.
    target = os.path.realpath(path)
    if os.path.isdir(target):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if os.path.exists(target) and not os.path.isfile(target):
        raise OSError(errno.EINVAL, "it is not a regular file")
    name = new_name(os.path.dirname(target))
    _temporaries.add(name)
    try:
        with open(name, "x+b") as file:
            try:
                yield file, name, target
            except BaseException:
                # Closing flushes: on a full disk that fails again, and the first error counts.
                with contextlib.suppress(OSError):
                    file.close()
                raise
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
        _temporaries.discard(name)


def _keep(target: str, previous: str) -> None:
    """Give a file another name too, in place of an older file; where links exist it keeps both."""
    aside = new_name(os.path.dirname(target))
    try:
        os.link(target, aside)
    except FileNotFoundError:
        return
    except OSError:
        with contextlib.suppress(OSError):
            os.replace(target, previous)
        return
    try:
        os.replace(aside, previous)
    finally:
        with contextlib.suppress(OSError):  # two names of one file are left alone by a rename
            os.unlink(aside)


def _sync_folder(folder: str) -> None:
    # Makes the rename survive a power failure; not every file system can do it.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def replacing_in(folder: str | os.PathLike[str], stale: Iterable[str] = ()) -> Iterator[Path]:
    """Make a temporary folder whose files go to `folder` if the block succeeds.

    A folder that is not there appears with all files at once. In one that is, each file takes the
    place of its older self after all are on the disk, and the files named `stale` go.

    Raises:
        OSError: as the operating system reports it; nothing stays behind, `folder` is unchanged.
    """
    target = os.path.realpath(folder)
    if os.path.lexists(target) and not os.path.isdir(target):
        raise NotADirectoryError(errno.ENOTDIR, "it is a file, not a folder")
    there = os.path.isdir(target)
    parent = target if there else os.path.dirname(target)
    name = new_name(parent)
    _temporaries.add(name)
    try:
        os.mkdir(name)
        yield Path(name)
        for path in Path(name).iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        if there:
            for path in Path(name).iterdir():
                os.replace(path, f"{target}/{path.name}")
            for old in stale:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{target}/{old}")
            _sync_folder(target)
        else:
            os.rename(name, target)
        _sync_folder(os.path.dirname(target))
    finally:
        shutil.rmtree(name, ignore_errors=True)
        _temporaries.discard(name)
