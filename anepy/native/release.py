"""What a release says about its libraries: the file `release.json` in the package.

`.ci/release.py` writes it into the wheels it makes; a checkout and a source archive have none, so
nothing is downloaded there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypedDict, cast

from ..errors import LibraryNotFoundError
from ..system.files import parsed
from ..system.version import __version__

FILE_NAME = "release.json"


class ReleaseFile(TypedDict):
    """One file of a release: its name below the base address, bytes, SHA-256."""

    name: str
    size: int
    sha256: str


class Release(TypedDict):
    """What is pinned: `files` by platform tag, built from sources with that hash."""

    version: str
    sources: str
    base_url: str
    files: dict[str, ReleaseFile]


def read(folder: Path) -> Release:
    """Return the record in a folder, one without files if there is none.

    Raises:
        LibraryNotFoundError: it is damaged, or of another version.
    """
    path = folder / FILE_NAME
    try:
        record = parsed(path.read_bytes())
    except FileNotFoundError:
        return {"version": __version__, "sources": "", "base_url": "", "files": {}}
    except (OSError, ValueError) as error:
        raise LibraryNotFoundError(f"cannot read {path}: {error}; reinstall anepy") from error
    if not _whole(record):
        raise LibraryNotFoundError(f"{path} is damaged: no release record; reinstall anepy")
    if record["version"] != __version__:
        raise LibraryNotFoundError(
            f"{path} is of anepy {record['version']}, this is {__version__}; reinstall anepy"
        )
    return cast(Release, record)


def _whole(record: object) -> bool:
    if not isinstance(record, dict) or set(record) != set(Release.__annotations__):
        return False
    files = record["files"]
    return (
        all(isinstance(record[name], str) for name in ("version", "sources", "base_url"))
        and isinstance(files, dict)
        and all(
            isinstance(file, dict)
            and set(file) == set(ReleaseFile.__annotations__)
            and re.fullmatch(r"[\w.+-]+", str(file["name"])) is not None
            and isinstance(file["size"], int)
            and re.fullmatch(r"[0-9a-f]{64}", str(file["sha256"])) is not None
            for file in files.values()
        )
    )
