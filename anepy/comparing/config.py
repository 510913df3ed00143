"""The settings of a comparison, checked before anything is allocated.

Imports nothing heavy, so that the command line can show its help texts without numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..training.settings import LoopConfig, described, require, setting


@described
@dataclass(frozen=True, kw_only=True)
class CompareConfig(LoopConfig):
    """Settings of a comparison: what `anepy train` can be told of a step, and the turns.

    Example:
        >>> CompareConfig(rounds=12).steps
        10
    """

    rounds: int = setting(8, "Timed rounds; in each, every variant has one turn.")
    steps: int = setting(10, "Steps of a turn; an update ends the turn.")
    warmup: int = setting(2, "Steps of the untimed turn before the first round.")
    lr_warmup: int = setting(0, "Updates over which the learning rate rises linearly.")
    ablate: bool = setting(
        False, "Measure every switch: added to baseline, and left out of the fullest variant."
    )

    def validate(self) -> None:
        """Check every setting.

        Raises:
            ConfigError: one is out of range.
        """
        super().validate()
        for name in ("rounds", "steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup", "lr_warmup"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")

    @property
    def updates(self) -> int:
        """Count the updates of all turns, the untimed one included."""
        return -(-self.warmup // self.accum) + self.rounds * -(-self.steps // self.accum)

    @property
    def rising(self) -> int:
        """Count the first updates, over which the learning rate rises: `lr_warmup`."""
        return self.lr_warmup
