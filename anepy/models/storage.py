"""Weights that are stored smaller than float32: bf16, or q8 with 32 values of a row per scale."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from .storages import STORAGES
from .views import Array, missing_text, real_numbers

Q8_BYTES, Q8_VALUES = 34, 32  # of a block: a binary16 scale, then int8 values
_AT_ONCE = 1 << 22  # numbers that are converted at once


class Row(NamedTuple):
    """Where a tensor is in the arena of weights.

    Attributes:
        byte: where it begins.
        storage: as in `STORAGES`.
        shape: (out, in), or (n,).
    """

    byte: int
    storage: str
    shape: tuple[int, ...]


class StoredTensors(Mapping[str, Array]):
    """Tensors by name, as read-only float32 copies; assigning to a name converts and stores.

    Example:
        >>> model.weights["norm.weight"] = np.ones(model.config.dim)
    """

    def __init__(self, lib: Any, rows: Mapping[str, Row], arena: npt.NDArray[np.uint8]) -> None:
        self._lib = lib
        self._rows = rows
        self._arena = arena

    def __getitem__(self, name: str) -> Array:
        row = self._rows[name]
        copy = np.empty(row.shape, np.float32)
        self._lib.anepy_unpack(_floats(copy), self._at(row), STORAGES[row.storage], copy.size)
        copy.flags.writeable = False
        return copy

    def __setitem__(self, name: str, values: npt.ArrayLike) -> None:
        """Convert values and store them.

        Raises:
            ConfigError: no such tensor, another shape, no real numbers, or one that is not finite
                or too large for the storage.
        """
        if name not in self._rows:
            raise ConfigError(missing_text(name, self._rows))
        row = self._rows[name]
        array = real_numbers(name, values, row.shape)
        flat = array.reshape(-1, row.shape[-1])
        step = max(1, _AT_ONCE // row.shape[-1])
        at = self._at(row)
        for start in range(0, len(flat), step):
            with np.errstate(over="ignore"):  # of float64
                part = np.ascontiguousarray(flat[start : start + step], np.float32)
            try:
                self._lib.anepy_pack(at, _floats(part), STORAGES[row.storage], part.size)
            except ConfigError as error:
                raise ConfigError(f"tensor {name!r}: {error}") from None
            at += nbytes(row.storage, part.size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without converting it."""
        return self._rows[name].shape

    def take_blocks(self, name: str, blocks: npt.NDArray[np.uint8]) -> bool:
        """Store the bytes of Q8_0 blocks as they are; False where the tensor is not stored so."""
        row = self._rows[name]
        if row.storage != "q8":
            return False
        size = nbytes("q8", math.prod(row.shape))
        self._arena[row.byte : row.byte + size] = blocks.reshape(-1)
        return True

    def _at(self, row: Row) -> int:
        return int(self._arena.ctypes.data) + row.byte


def nbytes(storage: str, count: int) -> int:
    """Return the bytes of `count` numbers, whole blocks of q8."""
    if storage == "q8":
        return count // Q8_VALUES * Q8_BYTES
    return count * (4 if storage == "f32" else 2)


def _floats(array: Array) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
