"""A file on its way: hashed while it grows, under its name only when it is complete and right.

Kept, it grows in `NAME.part`, beside which `NAME.part.json` holds what the server said of it, so
that a later process goes on where an earlier one stopped. Otherwise it is a temporary file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import BinaryIO

from ..errors import ChecksumError, DownloadError
from . import files
from .files import parsed
from .owner import owned

_CHUNK_NBYTES = 1 << 20


class Arriving:
    """The bytes of one file, as a context: leaving the block without `finish` changes nothing.

    Args:
        dest: where it will be.
        kept: keep what has arrived for a later attempt.
        url: where it comes from; what is kept of another address is not used.

    Attributes:
        done: bytes that have arrived.
        validator: ETag or date that the server gave them; "" if it gave none.

    Raises:
        BusyError: another process brings the same file.
        DownloadError: nothing can be written there.
    """

    def __init__(self, dest: Path, kept: bool, url: str) -> None:
        self.dest = dest
        self.part = dest.with_name(f"{dest.name}.part")
        self.done = 0
        self.validator = ""
        self._kept = kept
        self._url = url
        self._facts = dest.with_name(f"{dest.name}.part.json")
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Arriving:
        try:
            if self._kept:
                self.dest.parent.mkdir(parents=True, exist_ok=True)
                lock = self.dest.with_name(f"{self.dest.name}.part.owner")
                self._stack.enter_context(owned(lock, f"{self.dest}, which is being downloaded,"))
                self._stack.callback(self._close)
                self._take_up()
        except OSError as error:
            self._stack.close()
            raise unwritable(self.dest, error) from error
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.__exit__(*failure)  # type: ignore[arg-type]

    def _take_up(self) -> None:
        """Read what an earlier attempt kept."""
        try:
            facts = parsed(self._facts.read_bytes())
            if facts["url"] != self._url:
                return
            with open(self.part, "rb") as file:
                while chunk := file.read(_CHUNK_NBYTES):
                    self._digest.update(chunk)
                    self.done += len(chunk)
            self.validator = str(facts["validator"])
        except (OSError, ValueError, TypeError, KeyError):
            self.done, self._digest = 0, hashlib.sha256()

    def begin(self, validator: str) -> None:
        """Start over with a file of which the server says this."""
        self._digest = hashlib.sha256()
        self.done, self.validator = 0, validator
        try:
            self._open("wb")
            if self._kept:
                facts = {"url": self._url, "validator": validator}
                with files.replacing(self._facts) as file:
                    file.write(files.dumps(facts).encode())
        except OSError as error:
            raise unwritable(self.dest, error) from error

    def proceed(self) -> None:
        """Go on behind what has arrived."""
        try:
            self._open("r+b")
        except OSError as error:
            raise unwritable(self.dest, error) from error

    def _open(self, mode: str) -> None:
        if self._file is None and self._kept:
            self._file = open(self.part, mode)  # type: ignore[assignment]
        elif self._file is None:
            self.dest.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._stack.enter_context(files.replacing(self.dest))
        assert self._file is not None
        if self._file.tell() != self.done:
            self._file.seek(self.done)
            self._file.truncate()

    def write(self, chunk: bytes) -> None:
        """Take the next bytes."""
        assert self._file is not None
        try:
            self._file.write(chunk)
        except OSError as error:
            raise unwritable(self.dest, error) from error
        self._digest.update(chunk)
        self.done += len(chunk)

    def finish(self, sha256: str | None, where: str) -> None:
        """Check the hash and give the file its name.

        Raises:
            ChecksumError: it is another one; what has arrived is discarded.
        """
        found = self._digest.hexdigest()
        if sha256 is not None and found != sha256.lower():
            self.discard()
            raise ChecksumError(
                f"{where} has SHA-256 {found} instead of {sha256.lower()}; not installed: it is "
                "another version, or something between the server and here changed it"
            )
        try:
            if self._kept:
                if self._file is None:  # all of it had arrived before
                    self.proceed()
                assert self._file is not None
                self._file.flush()
                os.fsync(self._file.fileno())
                self._close()
                os.replace(self.part, self.dest)
                self.discard()
            self._stack.close()
        except OSError as error:
            raise unwritable(self.dest, error) from error

    def discard(self) -> None:
        """Forget what has been kept."""
        self._close()
        self.done, self.validator = 0, ""
        if self._kept:
            for path in (self.part, self._facts):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _close(self) -> None:
        if self._kept and self._file is not None:
            file, self._file = self._file, None
            # On a full disk the last bytes are lost; those before them stay.
            with contextlib.suppress(OSError):
                file.close()


def unwritable(dest: Path, error: OSError) -> DownloadError:
    """Say why nothing can be written at `dest`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DownloadError(f"the disk of {dest} is full; free some space, or choose another")
    reason = error.strerror
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        reason = f"{error.filename} is not a folder"
    return DownloadError(f"cannot write {dest}: {reason}; choose another folder")


def check_space(dest: Path, size: int) -> None:
    """Refuse a transfer that cannot fit, before it starts.

    Raises:
        DownloadError: the disk has less than `size` bytes left.
    """
    folder = dest.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return  # the write itself will tell
    if free < size:
        raise DownloadError(
            f"{dest} needs {size:,} bytes and its disk has {free:,} left; "
            "free some space, or choose another"
        )
