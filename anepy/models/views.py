"""Tensors of a model by name: views of one array, which an assignment copies into."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping

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
        near = difflib.get_close_matches(str(name), tensors, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"the first is {next(iter(tensors))!r}"
        raise ConfigError(f"there is no tensor {name!r}: {hint}")
    target = tensors[name]
    try:
        array = np.asarray(values)
        if array.shape == target.shape:
            np.copyto(target, array, casting="same_kind")
            return
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"tensor {name!r} takes real numbers: {reason}") from None
    raise ConfigError(f"tensor {name!r} has shape {target.shape}, not {array.shape}")
