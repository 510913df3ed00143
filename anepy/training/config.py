"""The settings of a training run: one frozen dataclass, checked before anything is allocated.

Imports nothing heavy, so that the command line can show its help texts without numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import ConfigError

SCHEDULES = ("constant", "cosine")


def _setting(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Example:
        >>> TrainConfig(steps=200, lr=1e-3).accum
        10
    """

    steps: int = _setting(1000, "Total number of steps (one step is --batch sequences).")
    batch: int = _setting(1, "Sequences per step; on the CPU side by side, with memory for each.")
    accum: int = _setting(10, "Steps per update; a last, partial accumulation is applied too.")
    seq: int | None = _setting(
        None, "Tokens per sequence. Default: 256, or the model's context if shorter."
    )
    lr: float = _setting(3e-4, "Learning rate (peak, if a schedule is asked for).")
    beta1: float = _setting(0.9, "AdamW: decay of the first moment.")
    beta2: float = _setting(0.999, "AdamW: decay of the second moment.")
    eps: float = _setting(1e-8, "AdamW: added to the root of the second moment.")
    weight_decay: float = _setting(0.0, "AdamW: decay of matrices (never of norm weights).")
    grad_clip: float | None = _setting(None, "Clip gradients to this global norm. Default: off.")
    schedule: str = _setting("constant", "Learning-rate schedule: constant or cosine.")
    warmup: int = _setting(0, "Updates over which the learning rate rises linearly.")
    min_lr_ratio: float = _setting(0.1, "Cosine schedule: final learning rate as a part of --lr.")
    seed: int = _setting(0, "Seed of the data sampler, and of new weights.")
    variant: str = _setting("max", "Set of optimizations, like opt or baseline+simd_adam.")
    device: str = _setting("auto", "Device: auto, cpu, sim or ane.")
    precision: str = _setting("auto", "Precision: auto, fp32, bf16 or fp16.")
    threads: int | None = _setting(None, "CPU threads. Default: as many as the process may use.")
    metal: bool = _setting(False, "Weight gradients on the GPU: switch metal_dw (macOS).")
    held_out: float = _setting(0.0, "Part of the data kept for evaluation, like 0.05.")
    eval_every: int = _setting(0, "Steps between held-out evaluations. 0: at both ends only.")
    eval_windows: int = _setting(16, "Sequences per held-out evaluation.")

    def validate(self) -> None:
        """Check every setting by itself and against the others.

        Raises:
            ConfigError: a setting is out of range or contradicts another one.
        """
        for name in ("steps", "batch", "accum", "eval_windows"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup", "eval_every", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")
        _require(self.seed < 2**63, "seed", self.seed, "below 2**63")
        for name in ("seq", "threads"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, name, value, "finite and not negative")
        _require(math.isfinite(self.eps) and self.eps > 0, "eps", self.eps, "finite and above 0")
        for name in ("beta1", "beta2", "held_out"):
            value = getattr(self, name)
            _require(0 <= value < 1, name, value, "at least 0 and below 1")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "from 0 to 1")
        clip = self.grad_clip
        clip_ok = clip is None or (math.isfinite(clip) and clip > 0)
        _require(clip_ok, "grad_clip", clip, "finite and above 0")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, " or ".join(SCHEDULES))
        if self.eval_every and not self.held_out:
            raise ConfigError("eval_every needs held-out data: set held_out, for example to 0.05")

    @property
    def engine_variant(self) -> str:
        """Name the variant the engine gets: `variant`, with the Metal switch if asked for."""
        return f"{self.variant}+metal_dw" if self.metal else self.variant

    @property
    def updates(self) -> int:
        """Count the updates of an uninterrupted run, the partial last one included."""
        return -(-self.steps // self.accum)

    def learning_rate(self, update: int) -> float:
        """Return the learning rate of an update.

        Args:
            update: index of the update, from 0; nothing else decides the rate, so a resumed
                run sees the same rates as an uninterrupted one.
        """
        if update < self.warmup:
            return self.lr * (update + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        last = max(self.updates - 1, self.warmup + 1)
        progress = min(1.0, (update - self.warmup) / (last - self.warmup))
        cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.lr * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * cosine)


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name} is {value}, it must be {expected}")


def setting_help(name: str) -> str:
    """Return the help text of one setting, its default included.

    Args:
        name: a field of `TrainConfig`.
    """
    for item in fields(TrainConfig):
        if item.name == name:
            text = str(item.metadata["help"])
            told = item.default is None or item.default is False or "Default:" in text
            return text if told else f"{text} Default: {item.default}."
    raise KeyError(name)


def config_from(saved: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    """Build the settings of a run: what was given, else what was saved, else the default.

    Args:
        saved: settings of a checkpoint (or a preset); unknown keys are ignored.
        given: settings the user stated; None means not stated.
    """
    known = {item.name for item in fields(TrainConfig)}
    values = {key: value for key, value in saved.items() if key in known}
    values.update({key: value for key, value in given.items() if value is not None})
    return TrainConfig(**values)
