"""Tensors of a model by name: views of one array, which an assignment copies into."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError

Array = npt.NDArray[np.float32]


class Tensors(Mapping[str, Array]):
    """Tensors by name, as writable float32 views.

    Example:
        >>> model.weights["norm.weight"] = np.ones(model.config.dim)  # copies, after a check
        >>> model.weights["norm.weight"][0] = 2.0
    """

    def __init__(self, views: Mapping[str, Array], frozen: Collection[str] = ()) -> None:
        self._views = dict(views)
        self._frozen = frozen

    def __getitem__(self, name: str) -> Array:
        if name in self._frozen:
            raise KeyError(frozen_text(name))
        return self._views[name]

    def __setitem__(self, name: str, values: npt.ArrayLike) -> None:
        """Copy values into a tensor, as `assign` does."""
        assign(self, name, values, self._frozen)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def frozen_text(name: str) -> str:
    """Say why a tensor of the model is not among those that are trained."""
    return f"{name} is frozen: it has no gradient and no moments"


def assign(
    tensors: Mapping[str, Array], name: str, values: npt.ArrayLike, frozen: Collection[str] = ()
) -> None:
    """Copy values into a tensor.

    Args:
        tensors: writable views by name.
        name: one of theirs.
        values: real numbers of exactly its shape; they are rounded to float32.
        frozen: names of the model that are not among them.

    Raises:
        ConfigError: no such tensor, another shape, or no real numbers; nothing has changed then.
    """
    if name in frozen:
        raise ConfigError(frozen_text(name))
    if name not in tensors:
        raise ConfigError(missing_text(name, tensors))
    target = tensors[name]
    array = real_numbers(name, values, target.shape)
    if not np.can_cast(array.dtype, target.dtype, casting="same_kind"):
        raise ConfigError(
            f"tensor {name!r} is bf16, uint16 with the upper half of each float32: give it such"
        )
    np.copyto(target, array, casting="same_kind")


def missing_text(name: str, tensors: Collection[str]) -> str:
    """Say that there is no tensor of a name, and which one may be meant."""
    near = difflib.get_close_matches(str(name), tensors, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"the first is {next(iter(tensors))!r}"
    return f"there is no tensor {name!r}: {hint}"


def real_numbers(name: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Return values as an array that float32 can take.

    Raises:
        ConfigError: another shape, or no real numbers.
    """
    try:
        array: npt.NDArray[Any] = np.asarray(values)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"tensor {name!r} takes real numbers: {reason}") from None
    if not np.can_cast(array.dtype, np.float32, casting="same_kind"):
        raise ConfigError(f"tensor {name!r} takes real numbers, not {array.dtype}")
    if array.shape != shape:
        raise ConfigError(f"tensor {name!r} has shape {shape}, not {array.shape}")
    return array
