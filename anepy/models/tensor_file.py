"""Safetensors files: where each tensor is, its values, and writing one.

Source: safetensors' description of its format. Its package checks what is read and lays out what is
written; tensors are mapped, so that none is copied before it is converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..system.files import parsed
from . import tensors
from .identify import known_as

DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F64": "<f8"}
_KINDS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are.

    Attributes:
        path: the file.
        dtype: as the file names it, like "F32".
        shape: of the tensor.
        offset: its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def is_safetensors(head: bytes) -> bool:
    """Say whether the first bytes of a file are those of a safetensors file."""
    return head[4:9] == b"\0\0\0\0{"  # the length of the table, then its JSON


def places(path: Path) -> dict[str, Place]:
    """Read the table of a file; the package checks it against the file's size.

    Raises:
        ModelError: it is no whole safetensors file, or the package is not installed.
    """
    safetensors = package()
    try:
        with safetensors.safe_open(path, "numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            table = parsed(file.read(size))
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        what = known_as(path)
        reason = f"is {what}" if what else f"is no whole safetensors file: {error}"
        raise ModelError(f"{path} {reason}; get it again") from None
    table.pop("__metadata__", None)
    return {
        name: Place(path, row["dtype"], tuple(row["shape"]), 8 + size + row["data_offsets"][0])
        for name, row in table.items()
    }


def values(place: Place) -> npt.NDArray[Any]:
    """Map a tensor of one of `DTYPES`; bfloat16 is widened.

    Raises:
        ModelError: the file cannot be mapped.
    """
    count = math.prod(place.shape)
    try:
        stored = np.memmap(place.path, DTYPES[place.dtype], "r", place.offset, (count,))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot map {place.path}: {error}") from None
    wide = tensors.from_bfloat16(stored) if place.dtype == "BF16" else stored
    return wide.reshape(place.shape)


def write(path: Path, stored: Mapping[str, npt.NDArray[Any]], dtype: str) -> None:
    """Write a file.

    Args:
        path: the file.
        stored: name -> C-contiguous array, as `tensors.rounded` makes it of `dtype`.
        dtype: "f32", "f16" or "bf16".

    Raises:
        OSError: it cannot be written.
    """
    safetensors = package()
    table = {
        name: safetensors.TensorSpec(
            dtype=_KINDS[dtype], shape=list(v.shape), data_ptr=v.ctypes.data, data_len=v.nbytes
        )
        for name, v in stored.items()
    }
    try:
        safetensors.serialize_file(table, path, {"format": "pt"})
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from None


def package() -> Any:
    """Return the package that knows the format.

    Raises:
        ModelError: it is not installed.
    """
    try:
        import safetensors
    except ImportError:
        raise ModelError(
            "safetensors files need the package safetensors; pip install 'anepy[hf]'"
        ) from None
    return safetensors
