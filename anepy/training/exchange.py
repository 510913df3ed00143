"""Sums of gradients over all ranks, while the backward pass is still computing others.

The arena of gradients is cut into chunks of one slice for each rank. A chunk travels as soon as it
is final: every rank gets its slice of all others, adds them in the order of the ranks, and what it
has is gathered again. So each sum is made once, in one place and in one order: all ranks get the
same bits, whatever the library does, and so does every run. If each rank updates its slices only,
the weights are gathered instead.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.handle import float_pointer
from ..engine.shared import Part, SharedEngine, spans_of
from ..errors import NativeError
from ..models.storages import STORAGES
from ..models.views import Array, Tensors
from ..native import find
from .ranks import Job, Ranks, Steps, waiting

_SLICE = 1 << 17  # elements of a slice at most: 512 KiB
_PAGE = 1 << 12  # and a multiple of these: 16 KiB, the largest page in use
_FLIGHT = 4  # chunks under way at a time
_NAN = 0x7FC0  # of bfloat16


@dataclass
class Sum:
    """A reduction under way; `gathered` counts the chunks whose sums have set out."""

    counted: int
    scale: float
    squares: float = 0.0
    nbytes: int = 0
    busy: float = 0.0
    gathered: int = 0


class Exchange:
    """Add the gradients of an engine to those of the other ranks.

    Args:
        ranks: all of them.
        engine: that of this one.
        wire: "fp32", or "bf16": gradients are rounded for the way to the rank that adds them, in
            float32, and their sum for the way back.
        shard: each rank updates its slices only.

    Attributes:
        part: the slices of this rank.
    """

    def __init__(self, ranks: Ranks, engine: SharedEngine, wire: str, shard: bool) -> None:
        self.ranks, self.engine, self.shard = ranks, engine, shard
        n = len(engine.arena)
        pages = -(-n // (ranks.size * _PAGE))
        self.length = min(_SLICE, max(1, pages) * _PAGE)
        self.stride = self.length * ranks.size
        self.part = Part(ranks.rank * self.length, self.length, self.stride)
        if shard:
            engine.part = self.part
        self._rounded = wire == "bf16"
        self._lib = find.library()
        self._staging: list[npt.NDArray[Any]] = []
        self._chunks = [(at, min(at + self.stride, n)) for at in range(0, n, self.stride)]

    # Before and after

    def begin(
        self, counted: int, scale: float, running: int | None = None, held: int = 0
    ) -> Job[Sum]:
        """Start a reduction; all ranks do so at the same step.

        Args:
            counted: targets that the gradients of this rank will be the sum over.
            scale: what the gradient of each will carry; 0: there are none.
            running: how many steps had begun before the one that is about to run; None: none is,
                and the gradients are final.
            held: what `holds` said.
        """
        self.engine.hold_embedding(held > 0)
        return self.ranks.post(self._reduce(counted, scale, running, held > 0))

    def holds(self, sequences: int, tokens: int) -> int:
        """Return how many rows of the embedding's gradient travel by themselves; 0: none.

        They are those of the last tokens of a step. All others are final with the first bucket,
        and all would have to wait for the end of the step.
        """
        place, places = self.engine.embedding(), self.engine.places()
        if place is None or len(places) < 2 or places[0][0] == place[0]:
            return 0
        rows = self.engine.last_tokens(sequences, tokens)
        return rows if 2 * self.ranks.size * rows <= place[1] else 0

    def add_held(self, total: Sum, ids: npt.NDArray[np.int32], scale: float) -> None:
        """Add what the last step of every rank left out of the embedding's gradient."""
        rows = self.engine.held_embedding()
        self.engine.hold_embedding(False)
        self.ranks.post(self._add_held(total, ids, rows, scale)).wait()

    def settle(self, total: Sum) -> float:
        """Return the sum of squares of all gradients, which all ranks get alike."""
        parts = self.ranks.gather("update", [total.squares])[:, 0]
        return float(sum(parts.tolist()))

    def gather_weights(self) -> int:
        """Bring the weights of all slices to all ranks; return the bytes this one sent."""
        sent = self.ranks.post(self._gather(self.engine.trained_spans())).wait()
        self.engine.refresh()
        return sent

    def gather_moments(self) -> tuple[Array, Array]:
        """Return both moments of all slices; on other ranks than 0 they may not be used."""
        whole = []
        for moment in self.engine.moment_arenas:
            copy = np.array(moment) if self.shard and len(moment) else moment
            if copy is not moment:
                self.ranks.post(self._gather([(0, copy)])).wait()
            whole.append(copy)
        return whole[0], whole[1]

    def take_moments(self, m: Tensors, v: Tensors) -> None:
        """Keep the slices of this rank of both moments."""
        places = self.engine.trained_places()
        for kept, values in zip(self.engine.moment_arenas, (m, v), strict=True):
            for name, value in values.items():
                first = places[name]
                spans = [(first, value.reshape(-1))]
                for at in range(self.part.first, first + value.size, self.stride):
                    for away, part in spans_of(spans, at, at + self.length):
                        kept[at + away : at + away + len(part)] = part

    # What the thread of the ranks does

    def copies(self, counted: int, scale: float) -> Steps[tuple[int, float, Array]]:
        """Add copies of the gradients of all ranks on rank 0; targets, their scale, the sum."""
        told = yield from self.ranks.gathering("save", [counted, scale])
        joint = min((row[1] for row in told if row[1] > 0), default=1.0)
        arena = self.engine.arena
        copy = arena * np.float32(joint / scale) if scale > 0 else np.zeros_like(arena)
        for begin, end in self._chunks:
            part = copy[begin:end]
            mpi = self.ranks.mpi
            sent = mpi.IN_PLACE if self.ranks.first else part
            yield from waiting(self.ranks.bulk.Ireduce(sent, part, mpi.SUM, 0))
        return int(told[:, 0].sum()), joint, copy

    def _reduce(self, counted: int, scale: float, running: int | None, held: bool) -> Steps[Sum]:
        told = yield from self.ranks.gathering("update", [counted, scale])
        scales = [row[1] for row in told if row[1] > 0]
        total = Sum(int(told[:, 0].sum()), min(scales, default=1.0))
        factor = total.scale / scale if scale > 0 else 0.0
        order = self._order(held)
        live: list[tuple[int, Steps[None]]] = []
        at = 0
        while at < len(order) or live:
            moved = False
            while at < len(order) and len(live) < _FLIGHT and self._final(order[at][0], running):
                slot = next(i for i in range(_FLIGHT) if all(i != used for used, _ in live))
                began = time.perf_counter()
                live.append((slot, self._chunk(slot, at, *order[at][1], factor, total)))
                total.busy += time.perf_counter() - began
                at, moved = at + 1, True
            for each in list(live):
                began = time.perf_counter()
                try:
                    moved |= next(each[1])
                except StopIteration:
                    live.remove(each)
                    moved = True
                total.busy += time.perf_counter() - began
            yield moved
        return total

    def _order(self, held: bool) -> list[tuple[int, tuple[int, int]]]:
        """Return the chunks as they become final, each behind the bucket it waits for."""
        places = self.engine.places()
        embedding = self.engine.embedding()
        order = []
        for begin, end in self._chunks:
            need = 0
            for first, stop, bucket in places:
                if first < end and begin < stop:
                    early = held and embedding is not None and first == embedding[0]
                    need = max(need, 1 if early else bucket)
            order.append((need, (begin, end)))
        return sorted(order, key=lambda each: (each[0], -each[1][0]))

    def _final(self, bucket: int, running: int | None) -> bool:
        if running is None:
            return True
        steps, buckets = self.engine.ready
        return steps > running and buckets >= bucket

    def _counts(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        """Return lengths and places of all slices of a chunk."""
        places = [min(r * self.length, end - begin) for r in range(self.ranks.size)]
        ends = [*places[1:], end - begin]
        return [stop - at for at, stop in zip(places, ends, strict=True)], places

    def _chunk(
        self, slot: int, number: int, begin: int, end: int, factor: float, total: Sum
    ) -> Steps[None]:
        ranks, comm = self.ranks, self.ranks.bulk
        chunk = self.engine.arena[begin:end]
        if factor == 0.0:
            chunk[...] = 0.0
        elif factor != 1.0:
            chunk *= np.float32(factor)
        counts, places = self._counts(begin, end)
        own = counts[ranks.rank]
        mine = chunk[places[ranks.rank] : places[ranks.rank] + own]
        mpi_kind = ranks.mpi.UINT16_T if self._rounded else ranks.mpi.FLOAT
        staging = self._slot(slot)
        received = staging[: ranks.size * own]
        sent: npt.NDArray[Any] = chunk
        if self._rounded:
            sent = staging[self.stride : self.stride + len(chunk)]
            self._round(sent, chunk)
        # Single messages, since MPICH moves 8 KiB of an Ialltoallv at a call, and arrive in order.
        requests = []
        parts = list(received.reshape(ranks.size, own))
        for other in range(ranks.size):
            if other != ranks.rank:
                away = sent[places[other] : places[other] + counts[other]]
                requests.append(comm.Irecv([parts[other], mpi_kind], other))
                requests.append(comm.Isend([away, mpi_kind], other))
        while not ranks.mpi.Request.Testall(requests):
            yield False
        total.nbytes += (len(chunk) - own) * sent.itemsize
        free, parts[ranks.rank] = parts[ranks.rank], sent[places[ranks.rank] :][:own]
        if self._rounded:
            mine[...] = _widened(parts[0])
            for part in parts[1:]:
                mine += _widened(part)
        else:
            so_far = parts[0]
            for part in parts[1:]:
                so_far = np.add(so_far, part, out=mine if part is parts[-1] else free)
        if self._rounded and not self.shard:
            own_part = sent[places[ranks.rank] : places[ranks.rank] + own]
            self._round(own_part, mine)
            mine[...] = _widened(own_part)
        total.squares += _squares(mine)
        yield True
        if self.shard:
            return
        whole: npt.NDArray[Any] = sent if self._rounded else chunk
        while total.gathered < number:  # all ranks must start these in one order
            yield False
        gathering = comm.Iallgatherv(ranks.mpi.IN_PLACE, [whole, counts, places, mpi_kind])
        total.gathered += 1
        yield from waiting(gathering)
        total.nbytes += own * (ranks.size - 1) * whole.itemsize
        if self._rounded:
            chunk[...] = _widened(whole)

    def _slot(self, slot: int) -> npt.NDArray[Any]:
        while len(self._staging) <= slot:
            if self._rounded:
                self._staging.append(np.empty(2 * self.stride, np.uint16))
            else:
                self._staging.append(np.empty(self.stride, np.float32))
        return self._staging[slot]

    def _round(self, out: npt.NDArray[Any], values: Array) -> None:
        """Round to bfloat16, to nearest even; what does not fit makes all of it NaN."""
        try:
            self._lib.anepy_pack(
                out.ctypes.data_as(ctypes.c_void_p),
                float_pointer(values),
                STORAGES["bf16"],
                len(values),
            )
        except NativeError:
            out[...] = _NAN

    def _add_held(
        self, total: Sum, ids: npt.NDArray[np.int32], rows: Array, scale: float
    ) -> Steps[None]:
        ranks, engine = self.ranks, self.engine
        began = time.perf_counter()
        place = engine.embedding()
        assert place is not None
        if scale != total.scale:
            rows *= np.float32(total.scale / scale)
        tokens = len(rows)
        all_ids = np.empty(ranks.size * tokens, np.int32)
        all_rows = np.empty((ranks.size * tokens, rows.shape[1]), np.float32)
        ids = np.ascontiguousarray(ids, np.int32)
        yield from waiting(ranks.bulk.Iallgather(ids, all_ids))
        yield from waiting(ranks.bulk.Iallgather(rows, all_rows))
        total.nbytes += (ranks.size - 1) * rows.nbytes
        order = np.argsort(all_ids, kind="stable")
        distinct, starts = np.unique(all_ids[order], return_index=True)
        added = np.add.reduceat(all_rows[order], starts, axis=0)
        first, count, columns = place
        gradient = engine.arena[first : first + count * columns].reshape(count, columns)
        old = gradient[distinct]
        gradient[distinct] = old + added
        if self.shard:
            at = first + distinct[:, None].astype(np.int64) * columns + np.arange(columns)
            added *= at // self.length % ranks.size == ranks.rank
        if self.shard or ranks.first:  # (old + added)^2 - old^2
            total.squares += float(np.sum(added * (added + 2 * old), dtype=np.float64))
        total.busy += time.perf_counter() - began

    def _gather(self, spans: list[tuple[int, Array]]) -> Steps[int]:
        """Fill values of all slices with what their ranks have."""
        sent, mpi = 0, self.ranks.mpi
        for begin, end in self._chunks:
            parts = spans_of(spans, begin, end)
            whole = len(parts) == 1 and len(parts[0][1]) == end - begin
            chunk = parts[0][1] if whole else np.empty(end - begin, parts[0][1].dtype)
            if not whole:
                for at, values in parts:
                    chunk[at : at + len(values)] = values
            kind = mpi.FLOAT if chunk.dtype == np.float32 else mpi.UINT16_T
            counts, places = self._counts(begin, end)
            yield from waiting(
                self.ranks.bulk.Iallgatherv(mpi.IN_PLACE, [chunk, counts, places, kind])
            )
            sent += counts[self.ranks.rank] * (self.ranks.size - 1) * chunk.itemsize
            if not whole:
                for at, values in parts:
                    values[...] = chunk[at : at + len(values)]
            yield True
        return sent


def _widened(values: npt.NDArray[Any]) -> Array:
    """Return the float32 of bfloat16 as uint16."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def _squares(values: Array) -> float:
    """Return the sum of squares; in float64 where float32 is too small for it."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.dot(values, values))
    if np.isfinite(found):
        return found
    return float((values.astype(np.float64) ** 2).sum())
