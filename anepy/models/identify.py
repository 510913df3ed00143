"""What a file is, by its first bytes."""

from __future__ import annotations

import zipfile
from pathlib import Path

HEAD_BYTES = 512


def known_as(path: Path) -> str | None:
    """Name what a file is that is no model anepy reads; None if it may be one.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return "empty"
    # Numbers of a binary header may look like the first letters of a text.
    text = b"" if b"\0" in head else head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip file"
    if head.startswith((b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return "a compressed file"
    if head.startswith(b"PK\x03\x04"):
        return _zip(path)
    if head.startswith(b"\x93NUMPY"):
        return "a NumPy array (.npy)"
    if head.startswith(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9"):
        return "an old PyTorch file (.pt)"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file"
    if text.startswith((b"{", b"[")):
        return "a JSON file"
    if len(text) > 28 and head.isascii():
        return "a text file"
    return None


def _zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return "a damaged zip file"
    if any(name.endswith("data.pkl") for name in names):
        return "a PyTorch file (.pt)"
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz)"
    return "a zip file"
