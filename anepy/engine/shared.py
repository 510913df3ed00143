"""An engine that trains as one with the engines of other processes, each of which has its share."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..models.model import TensorTable
from ..models.views import Array, Tensors
from ..native import abi
from .engine import Engine
from .handle import float_pointer
from .stats import UpdateStats


class Part(NamedTuple):
    """Elements of the arena of gradients: `length` from `first` on, and again every `stride`."""

    first: int
    length: int
    stride: int


class SharedEngine(Engine):
    """An `Engine` whose gradients are summed with those of other engines while a step runs.

    Args:
        arguments: as for `Engine`.
        sparse: `update` will be given a part only; of moments outside of it no memory is used.
        options: as for `Engine`.

    Attributes:
        part: what updates are restricted to; None: nothing.
        squares: the sum of squares of the gradients, for the norm of the next update; None: it is
            taken by the update itself.
    """

    def __init__(self, *arguments: Any, sparse: bool = False, **options: Any) -> None:
        self._sparse = sparse
        self.part: Part | None = None
        self.squares: float | None = None
        super().__init__(*arguments, **options)

    def _moments(self, table: TensorTable, dtype: type[Any]) -> Array:
        if not self._sparse:
            return super()._moments(table, dtype)
        # Pages that nobody touches take no memory; of large pages hardly one would stay untouched.
        pages = mmap.mmap(-1, np.dtype(dtype).itemsize * table.trainable_size)
        with contextlib.suppress(AttributeError, OSError):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(pages, dtype)

    def _complete(self, options: abi.UpdateOptions) -> None:
        if self.part is not None:
            options.part_first, options.part_n, options.part_stride = self.part
        if self.squares is not None:
            options.squares = self.squares
            options.flags |= abi.SQUARES_GIVEN

    @property
    def arena(self) -> Array:
        """All gradients, float32 (n,), as they are: also those that an update has left behind."""
        return self._grads

    @property
    def moment_arenas(self) -> tuple[Array, Array]:
        """Both moments, (n,) each, float32 or bf16 as uint16; the second may be empty."""
        return self._m, self._v

    def named(self, arena: Array, like: Iterable[str]) -> Tensors:
        """Return tensors of an arena as large as that of the gradients, by their names."""
        return self._table.views(arena, True, {name: self._table.trainable[name] for name in like})

    def trained_places(self) -> dict[str, int]:
        """Return where each trained tensor begins in the arenas of gradients and moments."""
        return {name: first for name, (first, _) in self._table.trainable.items()}

    def places(self) -> list[tuple[int, int, int]]:
        """Return (first, end, bucket) of all gradients; buckets count from 1, as `ready` does."""
        found: list[tuple[int, int, int]] = []
        for number, bucket in enumerate(self._gradients.bucket_places(), 1):
            found.append((*bucket, number))
        return found

    def embedding(self) -> tuple[int, int, int] | None:
        """Return where the embedding's gradient begins, its rows and columns; None: no gradient."""
        place = self._table.trainable.get("tok_embeddings.weight")
        return None if place is None else (place[0], *place[1])  # type: ignore[return-value]

    def trained_spans(self) -> list[tuple[int, Array]]:
        """Return the values that are trained as (first gradient, float32 (n,) view), in order."""
        if self.lora is not None:
            return [(0, self.lora.arena)]
        spans: list[tuple[int, Array]] = []
        weights = self.model.weights
        for name, (first, shape) in self._table.trainable.items():
            spans.append((first, weights[name].reshape(math.prod(shape))))
        return spans

    def hold_embedding(self, on: bool) -> None:
        """Have steps leave the rows of their last tokens out of the embedding's gradient, or not.

        All else of it is final with the first bucket then.
        """
        with self._call() as handle:
            self._lib.anepy_engine_hold_embedding(handle, on)

    def last_tokens(self, sequences: int, tokens: int) -> int:
        """Return how many tokens those sequences of a step have that run last, side by side."""
        with self._call() as handle:
            return int(self._lib.anepy_engine_holds(handle, sequences, tokens))

    def held_embedding(self) -> Array:
        """Return the rows that the last step left out, float32 (tokens, dim): its last tokens'."""
        with self._call() as handle:
            tokens = self._lib.anepy_engine_held_embedding(handle, None)
            rows = np.empty((tokens, self.model.config.dim), np.float32)
            self._lib.anepy_engine_held_embedding(handle, float_pointer(rows))
        return rows

    def join(self, counted: int, scale: float, reduced: bool) -> None:
        """Take over what was agreed, as `reduce` does, without lending the gradients.

        Args:
            counted: targets of all engines; 0: the next update is to be skipped by all.
            scale: what the gradient of each target is to carry.
            reduced: the gradients are the sums already, and carry it.
        """
        with self._call() as handle:
            flags = abi.REDUCED if reduced else 0
            self._lib.anepy_engine_reduce(handle, counted, scale, flags)
            self._gradients.stale = False

    def update_joined(self, options: dict[str, Any], squares: float | None) -> UpdateStats:
        """Update with gradients whose sum of squares over all parts is known."""
        self.squares = squares
        try:
            return self.update(**options)
        finally:
            self.squares = None

    def refresh(self) -> None:
        """Have programs made for weights that others have changed."""
        if self.device != "cpu":
            self.restore(0, self.updates, self.loss_scale, self.clean_steps, unit=self.unit)


def spans_of(spans: Sequence[tuple[int, Array]], begin: int, end: int) -> list[tuple[int, Array]]:
    """Return the parts of spans between two places, as (distance from `begin`, view)."""
    found = []
    for first, values in spans:
        low, high = max(begin, first), min(end, first + len(values))
        if low < high:
            found.append((low - begin, values[low - first : high - first]))
    return found
