"""Windows of whole documents: one in each, or several packed into one.

The target of a token is never of another document. Documents longer than a window are cut. Each
pass over the data has an order of its own, and window number i depends on the seed and on i alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, DataError
from .data import UNCOUNTED, Sampler, TokenData, Window, window_at, windows


class DocumentSampler(Sampler):
    """Draw documents, one a window or packed, the rest of it not counted.

    Args:
        data: with `starts`.
        seq_len: tokens per window.
        seed: 0 or more.
        pack: put several documents into a window, each where it leaves the least room (best fit).

    Attributes:
        cut: how many documents are longer than a window.
        windows: how many windows a pass over the data has.

    Raises:
        ConfigError: `seq_len` or `seed` is out of range.
        DataError: it is not known where documents begin, or none has a target that counts.

    Example:
        >>> data = TokenData.from_array(np.arange(9))
        >>> data.starts = np.array([0, 4])
        >>> sampler = DocumentSampler(data, 6, seed=0)
        >>> sorted(sampler.next()[1].tolist() for _ in range(2))
        [[1, 2, 3, -100, -100, -100], [5, 6, 7, 8, -100, -100]]
    """

    def __init__(self, data: TokenData, seq_len: int, seed: int, pack: bool = False) -> None:
        if data.starts is None:
            raise DataError(
                f"{data.name} does not say where its documents begin; write it with anepy prepare"
            )
        if seq_len < 1:
            raise ConfigError(f"the sequence length is {seq_len}; use 1 or more")
        super().__init__(data, min(seq_len, max(1, len(data) - 1)), seed)
        self.seq_len = seq_len
        self.pack = pack
        self.cut = int((np.append(data.starts[1:], len(data)) - data.starts - 1 > seq_len).sum())
        self._begins, self._lengths = _places(data, data.starts, seq_len)
        self._arrange()

    def _arrange(self) -> None:
        """Decide which documents share a window."""
        count = len(self._begins)
        self._rooms = [[i] for i in range(count)]
        if self.pack:
            order = _shuffled(count, self._seed, 0)
            self._rooms = _packed(self._lengths[order], order, self.seq_len)
        self.windows = len(self._rooms)
        self._pass, self._order = -1, np.zeros(0, np.int64)

    def restore(self, state: Mapping[str, SupportsIndex]) -> None:
        """Continue where `state` was taken, as `Sampler.restore` says."""
        super().restore(state)
        self._arrange()

    def next(self) -> tuple[npt.NDArray[Any], ...]:
        """Return the next window.

        Returns:
            (seq_len,) int32 tokens and (seq_len,) int32 targets, -100 where none counts; of packed
            documents also (seq_len,) bool: where one begins.
        """
        done, at = divmod(self._index, self.windows)
        if done != self._pass:
            self._pass, self._order = done, _shuffled(self.windows, self._seed, done + 1)
        self._index += 1
        tokens = np.zeros(self.seq_len, np.int32)
        targets = np.full(self.seq_len, UNCOUNTED, np.int32)
        starts = np.zeros(self.seq_len, np.bool_)
        end = 0
        for document in self._rooms[self._order[at]]:
            begin, length = int(self._begins[document]), int(self._lengths[document])
            window = window_at(self.data, begin, length)
            tokens[end : end + length], targets[end : end + length] = window
            starts[end] = True
            end += length
        if end < self.seq_len:
            starts[end] = True  # what fills the window attends to no document
        return (tokens, targets, starts) if self.pack else (tokens, targets)


def evaluation_windows(data: TokenData, seq_len: int, count: int, pack: bool) -> list[Window]:
    """Return what to evaluate a run on: whole documents where these are trained on."""
    if (pack or data.mask is not None) and data.starts is not None:
        return document_windows(data, data.starts, seq_len, count)
    return list(windows(data, seq_len, count))


def document_windows(
    data: TokenData, starts: npt.NDArray[np.int64], longest: int, count: int | None
) -> list[Window]:
    """Return documents from their begin, evenly spaced, the same ones each time.

    Args:
        data: what to evaluate on.
        starts: where its documents begin.
        longest: tokens to which they are cut.
        count: how many at most; None: all.

    Raises:
        DataError: none has a target that counts.
    """
    begins, lengths = _places(data, starts, longest)
    n = len(begins) if count is None else min(count, len(begins))
    chosen = [i * (len(begins) - 1) // max(n - 1, 1) for i in range(n)]
    return [window_at(data, int(begins[i]), int(lengths[i])) for i in chosen]


def _places(
    data: TokenData, starts: npt.NDArray[np.int64], longest: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return begins and lengths of the documents that have a target that counts."""
    lengths = np.minimum(np.append(starts[1:], len(data)) - starts - 1, longest)
    useful = lengths > 0
    if data.mask is not None:
        # How many targets count before each token.
        sums = np.concatenate([[0], np.cumsum(data.mask, dtype=np.int64)])
        useful &= sums[np.minimum(starts + 1 + lengths, len(data))] > sums[starts + 1]
    if not useful.any():
        raise DataError(f"{data.name} has no document with a target that counts")
    return starts[useful], lengths[useful]


def _shuffled(count: int, seed: int, passed: int) -> npt.NDArray[np.int64]:
    """Return 0..count-1 in an order that depends on seed and pass alone.

    Raw bits are sorted here because numpy fixes those for ever, but not what it makes of them.
    """
    bits = np.random.Philox(key=seed, counter=(passed << 64) + (1 << 192)).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)


def _packed(
    lengths: npt.NDArray[np.int64], names: npt.NDArray[np.int64], room: int
) -> list[list[int]]:
    """Place documents one after the other into the window with the least sufficient room.

    Args:
        lengths: of the documents, at most `room`.
        names: what to call each of them.
        room: tokens of a window.
    """
    windows: list[list[int]] = []
    # Windows by the room that is left; bit n of `left` says that there are some with n.
    by_room: list[list[int]] = [[] for _ in range(room + 1)]
    left = 0
    for length, name in zip(lengths.tolist(), names.tolist(), strict=True):
        fitting = left >> length
        if fitting:
            rest = length + (fitting & -fitting).bit_length() - 1
            window = by_room[rest].pop()
            if not by_room[rest]:
                left &= ~(1 << rest)
        else:
            rest, window = room, len(windows)
            windows.append([])
        windows[window].append(name)
        rest -= length
        if rest:
            by_room[rest].append(window)
            left |= 1 << rest
    return windows
