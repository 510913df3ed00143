"""Several weight files of a program as one: macOS 27 loads no others."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PACKED = "@model_path/weights/weight.bin"
_MAGIC = 0xDEADBEEF
_ALIGN = 64  # of the header of a file, of a record and of its data
_BLOB = re.compile(
    rb'(BLOBFILE\s*\(\s*path\s*=\s*[^"]*")([^"]*)("[^,]*,\s*offset\s*=\s*[^()]*\(\s*)(\d+)'
)


def pack(text: bytes, files: Mapping[str, Array]) -> tuple[bytes, dict[str, Array]]:
    """Put the records of all files into one file, and name that in the text.

    Args:
        text: MIL text.
        files: weight files by path (docs/neural-engine.md#weight-file).

    Returns:
        The text and its one file; both as they were where a file is no weight file.
    """
    parts: list[bytes] = []
    first: dict[str, int] = {}  # where the records of a file begin, less where they did
    at, records = _ALIGN, 0
    for path, file in files.items():
        first[path] = at - _ALIGN
        moved = _moved(file.tobytes(), first[path])
        if moved is None:
            return text, dict(files)
        count, data = moved
        parts.append(data)
        at += len(data)
        records += count

    def renamed(found: re.Match[bytes]) -> bytes:
        path = found[2].decode(errors="replace")
        if path not in first:
            return found[0]
        return found[1] + PACKED.encode() + found[3] + b"%d" % (int(found[4]) + first[path])

    whole = struct.pack("<II56x", records, 2) + b"".join(parts)
    return _BLOB.sub(renamed, text), {PACKED: np.frombuffer(whole, np.uint8)}


def _moved(file: bytes, shift: int) -> tuple[int, bytes] | None:
    """Return the number of records of a file, and these, so much further; None if it has none."""
    if len(file) < _ALIGN:
        return None
    count, found, at = struct.unpack_from("<I", file)[0], bytearray(file), _ALIGN
    for _ in range(count):
        if at + _ALIGN > len(file):
            return None
        magic, _kind, nbytes, data = struct.unpack_from("<IIQQ", file, at)
        if magic != _MAGIC or data < at + _ALIGN or data + nbytes > len(file):
            return None
        struct.pack_into("<Q", found, at + 16, data + shift)
        at = -(-(data + nbytes) // _ALIGN) * _ALIGN
    return count, bytes(found[_ALIGN:]) + bytes(-len(found) % _ALIGN)
