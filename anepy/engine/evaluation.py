"""Losses of many sequences, as many side by side as the CPU runs at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .engine import Engine
from .ids import Ids

UNCOUNTED = -100  # a target that is not counted
_PANEL, _COLUMNS = 64, 512  # a sequence takes a multiple of the one, a group at most the other


def sequence_losses(
    engine: Engine, sequences: Sequence[tuple[Ids, Ids]]
) -> list[tuple[int, float]]:
    """Return how many targets of each sequence are counted, and the mean of their losses in nats.

    Args:
        engine: what computes them.
        sequences: tokens and targets of each, int32 (n,), of any lengths up to `engine.seq_len`.

    Returns:
        (counted, loss) in the order of the sequences; loss is 0 where none is counted.
    """
    found = [(0, 0.0)] * len(sequences)
    for group in _groups(engine, sequences):
        length = max(len(sequences[i][0]) for i in group)
        tokens = np.zeros((len(group), length), np.int32)
        targets = np.full((len(group), length), UNCOUNTED, np.int32)
        for row, i in enumerate(group):
            tokens[row, : len(sequences[i][0])], targets[row, : len(sequences[i][1])] = sequences[i]
        counted = np.count_nonzero(targets >= 0, axis=1)
        if not counted.any():
            continue
        losses = engine.losses(tokens, targets)
        for row, i in enumerate(group):
            found[i] = int(counted[row]), math.fsum(losses[row]) / max(1, counted[row])
    return found


def mean_loss(losses: Sequence[tuple[int, float]]) -> float:
    """Return the mean over all counted targets of what `sequence_losses` returned."""
    return math.fsum(n * loss for n, loss in losses) / sum(n for n, _ in losses)


def _groups(engine: Engine, sequences: Sequence[tuple[Ids, Ids]]) -> Iterator[list[int]]:
    """Yield indices of sequences to run in one call, so that an interrupt waits for few of them.

    Padding them to one length costs nothing: they take equally many columns.
    """

    def columns(index: int) -> int:
        return -(-len(sequences[index][0]) // _PANEL) * _PANEL

    most = _COLUMNS if engine.device == "cpu" else 0  # other devices run one after the other
    group: list[int] = []
    for index in sorted(range(len(sequences)), key=columns):
        if group and (
            columns(index) != columns(group[0]) or columns(index) * (len(group) + 1) > most
        ):
            yield group
            group = []
        group.append(index)
    if group:
        yield group
