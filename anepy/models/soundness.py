"""Whether numbers of a model are finite, and where not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .model import Model


def unsound(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the name of the first array that has a value which is not finite; empty if none."""
    return next((name for name, array in arrays.items() if not np.isfinite(array).all()), "")


def largest(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[float, str]:
    """Return the largest absolute value of all arrays, and in which it is; NaN counts as such."""
    found = 0.0, ""
    for name, array in arrays.items():
        size = float(max(array.max(), -array.min()))
        if not size <= found[0]:
            found = size, name
    return found


def overflow(model: Model) -> str:
    """Say which weight may be why the numbers that a model gives are not finite."""
    size, name = largest(model.weights)
    return (
        f"model {model.path or ''} gives numbers that are not finite; its largest weight is "
        f"{size:.2g}, in {name}: it is damaged, or its training diverged; take another one"
    ).replace("  ", " ")
