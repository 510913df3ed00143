"""The settings of a comparison, checked before anything is allocated.

Imports nothing heavy, so that the command line can show its help texts without numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class CompareConfig:
    """Settings of a comparison.

    Example:
        >>> CompareConfig(rounds=12).steps
        10
    """

    rounds: int = _setting(8, "Timed rounds; in each, every variant has one turn.")
    steps: int = _setting(10, "Steps of a turn, one sequence each; an update ends the turn.")
    warmup: int = _setting(2, "Steps of the untimed turn before the first round.")
    accum: int = _setting(10, "Steps per update.")
    seq: int | None = _setting(
        None, "Tokens per sequence. Default: 256, or the model's context if shorter."
    )
    lr: float = _setting(3e-4, "Learning rate.")
    seed: int = _setting(0, "Seed of data order, of random weights and of the resampling.")
    device: str = _setting("auto", "Device: auto, cpu, sim or ane.")
    precision: str = _setting("auto", "Precision: auto, fp32, bf16 or fp16.")
    threads: int | None = _setting(None, "CPU threads. Default: as many as the process may use.")
    ablate: bool = _setting(
        False, "Measure every switch: added to baseline, and left out of the fullest variant."
    )

    def validate(self) -> None:
        """Check every setting.

        Raises:
            ConfigError: one is out of range.
        """
        for name in ("rounds", "steps", "accum", "seq", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, it must be at least 1")
        if self.warmup < 0:
            raise ConfigError(f"warmup is {self.warmup}, it must be not negative")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}, it must be not negative and below 2**63")
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ConfigError(f"lr is {self.lr}, it must be finite and not negative")


def compare_help(name: str) -> str:
    """Return the help text of a field of `CompareConfig`, its default included."""
    for item in fields(CompareConfig):
        if item.name == name:
            text = str(item.metadata["help"])
            told = item.default is None or item.default is False or "Default:" in text
            return text if told else f"{text} Default: {item.default}."
    raise KeyError(name)
