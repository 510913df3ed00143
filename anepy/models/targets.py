"""Which projections an adapter is added to: their names."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def chosen_targets(targets: Sequence[str] | str) -> tuple[str, ...]:
    """Return targets in the order of `TARGETS`, each once.

    Args:
        targets: a sequence of names, or one text with commas.

    Raises:
        ConfigError: one is unknown, or there is none.
    """
    given = targets.split(",") if isinstance(targets, str) else list(targets)
    wanted = [each.strip() if isinstance(each, str) else each for each in given]
    for each in wanted:
        if each not in TARGETS:
            raise ConfigError(f"targets: there is no {each!r}, choose among {', '.join(TARGETS)}")
    if not wanted:
        raise ConfigError(f"targets are none: choose among {', '.join(TARGETS)}")
    return tuple(name for name in TARGETS if name in wanted)
