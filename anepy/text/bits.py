"""Loss per byte of text: what models with different tokenizers can be compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..engine.engine import Losses
from .tokenizer import Tokenizer


def spelled_bytes(
    tokenizer: Tokenizer, tokens: npt.NDArray[np.int32], targets: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """Return how many bytes of text each target spells: 0 for special tokens, and if not counted.

    Args:
        tokenizer: what made the ids.
        tokens: (n,), before each target.
        targets: (n,), below 0 where one is not counted.
    """
    # Of the token before it matters only whether it begins a text.
    begins = tokens == (-1 if tokenizer.bos_id is None else tokenizer.bos_id)
    keys, where = np.unique(2 * targets.astype(np.int64) + begins, return_inverse=True)
    sizes = [_spelled(tokenizer, int(key)) for key in keys]
    return np.array(sizes, np.int64)[where.reshape(-1)]


def _spelled(tokenizer: Tokenizer, key: int) -> int:
    target, begins = divmod(key, 2)
    if not 0 <= target < tokenizer.vocab_size:
        return 0
    # Any ordinary token stands for those that begin nothing.
    before = tokenizer.bos_id if begins and tokenizer.bos_id is not None else target
    return len(tokenizer.piece(before, target))


def bits_per_byte(
    tokenizer: Tokenizer,
    sequences: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]],
    losses: Sequence[Losses],
) -> tuple[float, int] | None:
    """Return the loss of text in bits per byte, and the bytes of it.

    Targets that spell nothing, as the end of a document, are left out: not every tokenizer has
    them.

    Args:
        tokenizer: what made the ids.
        sequences: tokens and targets of each, int32 (n,).
        losses: what `token_losses` says of them.

    Returns:
        None if no target spells anything.
    """
    nats, count = 0.0, 0
    for (tokens, targets), each in zip(sequences, losses, strict=True):
        sizes = spelled_bytes(tokenizer, tokens, targets)
        nats += math.fsum(each[sizes > 0])
        count += int(sizes.sum())
    return (nats / math.log(2) / count, count) if count else None
