"""Which tensors a run leaves as they are: names by pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from ..errors import ConfigError

Freeze = str | Sequence[str]


def patterns(freeze: Freeze) -> tuple[str, ...]:
    """Return what was given as a tuple: one pattern, or a sequence of them.

    Raises:
        ConfigError: it is neither.
    """
    given = (freeze,) if isinstance(freeze, str) else freeze
    if not isinstance(given, Iterable) or not all(isinstance(each, str) for each in given):
        raise ConfigError(f"freeze is {freeze!r}, it must be a pattern of names or several")
    return tuple(given)


def frozen_names(names: Sequence[str], freeze: Freeze) -> list[str]:
    """List the names that a pattern matches as a shell does: `*`, `?`, `[…]`, case counts.

    Args:
        names: of all tensors.
        freeze: a pattern, or several.

    Raises:
        ConfigError: a pattern matches nothing, or no tensor would be left.
    """
    found: set[str] = set()
    for pattern in patterns(freeze):
        matched = fnmatch.filter(names, pattern)
        if not matched:
            hint = f"names are like {names[min(2, len(names) - 1)]!r}"
            if fnmatch.fnmatchcase("output.weight", pattern):
                hint = "this model's classifier is its embedding, 'tok_embeddings.weight'"
            raise ConfigError(f"freeze: no tensor is named {pattern!r}; {hint}")
        found.update(matched)
    if len(found) == len(names):
        raise ConfigError("freeze: every tensor is frozen, nothing is left to train")
    return [name for name in names if name in found]


def trained_text(tensors: int, trained_tensors: int, values: int, trained_values: int) -> str:
    """Say how much of a model is trained, like "12 of 57 tensors, 3.1 of 15.2 M parameters".

    Args:
        tensors: how many the model has.
        trained_tensors: how many of them are trained.
        values: parameters of the model.
        trained_values: those of the trained tensors.
    """
    scale, unit = (1e6, " M") if values >= 1e6 else (1e3, " K")
    shown = f"{trained_values / scale:.1f} of {values / scale:.1f}{unit}"
    return f"{trained_tensors} of {tensors} tensors, {shown} parameters"
