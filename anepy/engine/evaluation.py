"""Losses of many sequences, as many side by side as the CPU runs at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .engine import Engine, Losses
from .ids import Ids

UNCOUNTED = -100  # a target that is not counted
_PANEL, _COLUMNS = 64, 512  # a sequence takes a multiple of the one, a group at most the other


def token_losses(engine: Engine, sequences: Sequence[tuple[Ids, Ids]]) -> list[Losses]:
    """Return the losses of all targets of each sequence in nats, 0 where one is not counted.

    Args:
        engine: what computes them.
        sequences: tokens and targets of each, int32 (n,), of any lengths up to `engine.seq_len`.

    Returns:
        float64 (n,) of each sequence, in their order.
    """
    found: list[Losses] = [np.zeros(len(targets)) for _, targets in sequences]
    for group in _groups(engine, sequences):
        length = max(len(sequences[i][0]) for i in group)
        tokens = np.zeros((len(group), length), np.int32)
        targets = np.full((len(group), length), UNCOUNTED, np.int32)
        for row, i in enumerate(group):
            tokens[row, : len(sequences[i][0])], targets[row, : len(sequences[i][1])] = sequences[i]
        if not (targets >= 0).any():
            continue
        losses = engine.losses(tokens, targets)
        for row, i in enumerate(group):
            found[i] = losses[row, : len(found[i])]
    return found


def sequence_losses(
    engine: Engine, sequences: Sequence[tuple[Ids, Ids]]
) -> list[tuple[int, float]]:
    """Return of each sequence how many targets are counted, and the mean of their losses in nats.

    Arguments are those of `token_losses`; the mean is 0 where none is counted.
    """
    return means(sequences, token_losses(engine, sequences))


def means(
    sequences: Sequence[tuple[Ids, Ids]], losses: Sequence[Losses]
) -> list[tuple[int, float]]:
    """Return what `sequence_losses` does, of what `token_losses` returned."""
    found = []
    for (_, targets), each in zip(sequences, losses, strict=True):
        counted = int(np.count_nonzero(targets >= 0))
        found.append((counted, math.fsum(each) / max(1, counted)))
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
