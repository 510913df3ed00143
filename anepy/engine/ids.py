"""Token ids as the native library takes them: int32 arrays, checked."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

Ids = npt.NDArray[np.int32]
Starts = npt.NDArray[np.uint8]


def as_ids(values: npt.ArrayLike, what: str) -> Ids:
    """Return ids as a contiguous int32 array; whether the vocabulary has them, the library checks.

    Args:
        values: integers (n,) or (sequences, n); at least one.
        what: their name, for the message.

    Raises:
        ConfigError: they are something else, or no 32-bit numbers.
    """
    expected = "integers in one dimension or (sequences, tokens)"
    try:
        array = np.asarray(values)
    except ValueError:  # rows of different lengths
        raise ConfigError(f"{what} is nested unevenly, expected {expected}") from None
    if not 1 <= array.ndim <= 2 or array.dtype.kind not in "iu" or array.size == 0:
        raise ConfigError(
            f"{what} has shape {array.shape} and type {array.dtype}, expected {expected}, at "
            "least one"
        )
    if not np.can_cast(array.dtype, np.int32):  # a cast of what does not fit makes another id
        for extreme in (int(array.max()), int(array.min())):
            if not -(2**31) <= extreme < 2**31:
                raise ConfigError(f"{what} holds {extreme}, which is no token id")
    return np.ascontiguousarray(array, dtype=np.int32)


def pair(tokens: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[Ids, Ids]:
    """Return tokens and targets as `as_ids` does.

    Raises:
        ConfigError: also if their shapes differ.
    """
    ids, wanted = as_ids(tokens, "tokens"), as_ids(targets, "targets")
    if ids.shape == wanted.shape:
        return ids, wanted
    if ids.ndim == wanted.ndim == 1:
        raise ConfigError(f"{len(ids)} tokens but {len(wanted)} targets: they go in pairs")
    raise ConfigError(
        f"tokens have shape {ids.shape} but targets have shape {wanted.shape}: they go in pairs"
    )


def as_starts(starts: npt.ArrayLike | None, ids: Ids) -> Starts | None:
    """Return which tokens begin a document as contiguous uint8 of the shape of `ids`.

    Raises:
        ConfigError: they are neither truth values nor integers, or their shape differs.
    """
    if starts is None:
        return None
    try:
        array = np.asarray(starts)
    except ValueError:  # rows of different lengths
        raise ConfigError("starts is nested unevenly, expected one truth value per token") from None
    if array.shape != ids.shape or array.dtype.kind not in "biu":
        raise ConfigError(
            f"starts has shape {array.shape} and type {array.dtype}, expected a truth value for "
            f"each token, in the shape {ids.shape}"
        )
    return np.ascontiguousarray(array != 0, dtype=np.uint8)
