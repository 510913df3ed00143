"""What tells that a library is the one that was built or installed, and that it will stay so.

A file is known by its SHA-256: pinned in the release record, or written beside it when it was built
(`libanepy.so.sha256`, as `sha256sum` writes it). A record helps only where nobody else can change
both, so a cache that others can write to is not used.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path


def recorded(library: Path) -> str | None:
    """Return the SHA-256 written beside a library, None if there is none, "" if it is damaged."""
    try:
        text = _record(library).read_bytes()[:64].decode("ascii", "replace")
    except OSError:
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else ""


def record(library: Path, sha256: str) -> None:
    """Write down the SHA-256 of a library; before the library itself, so that it never lacks one.

    Raises:
        OSError: it cannot be written.
    """
    _record(library).write_text(f"{sha256}  {library.name}\n", "ascii")


def forget(library: Path) -> None:
    """Remove a library and its record, if they are there."""
    library.unlink(missing_ok=True)
    _record(library).unlink(missing_ok=True)


def exposure(path: Path, root: Path) -> str | None:
    """Say in one sentence why others could change or replace a file, None if nobody else can.

    From `root` down to the file everything must belong to this user or to root, nobody else may
    write there, and nothing may be a symbolic link. What is not there yet is safe: `make_private`.
    """
    for place in reversed([path, *path.parents]):
        try:
            facts = place.lstat() if place.is_relative_to(root) else place.stat()
        except OSError:
            return None  # nothing there, and so nothing below
        everybody, group = (bool(facts.st_mode & bit) for bit in (stat.S_IWOTH, stat.S_IWGRP))
        if not place.is_relative_to(root):
            if everybody and not facts.st_mode & stat.S_ISVTX:
                return f"is not used: everybody can write to {place} (chmod o-w {place})"
        elif stat.S_ISLNK(facts.st_mode):
            return f"is not used: {place} is a symbolic link (set ANEPY_CACHE to a real folder)"
        elif facts.st_uid not in (os.geteuid(), 0):
            return f"is not used: {place} belongs to user {facts.st_uid} (set ANEPY_CACHE)"
        elif everybody or group:
            return f"is not used: others can write to {place} (chmod go-w {place})"
    return None


def forbidden(path: Path) -> str | None:
    """Say in one sentence why no library that lies there can be loaded; None if it can."""
    place = next((each for each in path.parents if each.is_dir()), Path("/"))
    if os.statvfs(place).f_flag & getattr(os, "ST_NOEXEC", 0):
        return f"is not used: {place} is mounted noexec (set ANEPY_CACHE to another folder)"
    return None


def make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, for this user alone.

    Raises:
        OSError: as the system reports it.
    """
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            path.mkdir(mode=0o700, exist_ok=True)


def _record(library: Path) -> Path:
    return library.with_name(f"{library.name}.sha256")
