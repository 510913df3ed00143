"""Settings as dataclasses whose fields carry their help texts, and those that every loop needs.

Imports nothing heavy, so that the command line can show its help texts without numpy.
"""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from ..errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine", "wsd")
C = TypeVar("C", bound=type)


def setting(default: Any, text: str) -> Any:
    """Return a field with a default and a help text, which may name options as the shell does."""
    return field(default=default, metadata={"help": text})


def setting_help(config: type, name: str) -> str:
    """Return the help text of a setting, its default included.

    Args:
        config: a dataclass of settings.
        name: one of its fields.
    """
    for item in fields(config):
        if item.name == name:
            text = str(item.metadata["help"])
            told = item.default in (None, False, ()) or "Default:" in text
            return text if told else f"{text} Default: {item.default}."
    raise KeyError(name)


def described(config: C) -> C:
    """Add the help texts of a dataclass of settings to its docstring, as its attributes."""
    lines = ["", "Attributes:"]
    for item in fields(config):
        text = re.sub(
            r"--([a-z-]+)",
            lambda option: f"`{option[1].replace('-', '_')}`",
            setting_help(config, item.name),
        )
        indent = {"initial_indent": "    ", "subsequent_indent": "        "}
        lines += textwrap.wrap(f"{item.name}: {text}", 96, **indent)  # type: ignore[arg-type]
    head, *example = re.split(r"(?=\nExample:)", inspect.cleandoc(config.__doc__ or ""))
    config.__doc__ = "\n".join([head.rstrip(), *lines, *example])
    return config


MOST_RATE = 1e30  # the library's, which divides it in float32


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError with what a setting is and must be, unless it is fine."""
    if not ok:
        raise ConfigError(f"{name} is {value}, it must be {expected}")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(ABC):
    """What a loop of steps and updates needs to know, whoever runs it."""

    batch: int = setting(1, "Sequences per step; on the CPU side by side, with memory for each.")
    accum: int = setting(10, "Steps per update; a last, partial accumulation is applied too.")
    seq: int | None = setting(
        None, "Tokens per sequence. Default: 256, or the model's context if shorter."
    )
    lr: float = setting(3e-4, "Learning rate (peak, if a schedule is asked for).")
    beta1: float = setting(0.9, "AdamW: decay of the first moment.")
    beta2: float = setting(0.999, "AdamW: decay of the second moment.")
    eps: float = setting(1e-8, "AdamW: added to the root of the second moment.")
    weight_decay: float = setting(0.0, "AdamW: decay of matrices (not of norms and biases).")
    grad_clip: float | None = setting(None, "Clip gradients to this global norm. Default: off.")
    schedule: str = setting(
        "constant", "Learning-rate schedule: constant, linear, cosine or wsd (falls at the end)."
    )
    min_lr_ratio: float = setting(0.1, "Schedules: final learning rate as a part of --lr.")
    seed: int = setting(0, "Seed of the order of the data, and of new weights.")
    device: str = setting("auto", "Device: auto, cpu, sim or ane.")
    precision: str = setting("auto", "Precision: auto, fp32, bf16 or fp16.")
    threads: int | None = setting(None, "CPU threads. Default: as many as the process may use.")

    @property
    @abstractmethod
    def updates(self) -> int:
        """Count the updates from the first step to the last."""

    @property
    @abstractmethod
    def rising(self) -> int:
        """Count the first updates, over which the learning rate rises."""

    @property
    def falling(self) -> float:
        """Part of the updates after the rise at whose end, with schedule wsd, the rate falls."""
        return 0.2

    def validate(self) -> None:
        """Check every setting by itself.

        Raises:
            ConfigError: one is out of range.
        """
        for name in ("batch", "accum"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("seq", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "not negative and below 2**63")
        require(0 <= self.lr <= MOST_RATE, "lr", self.lr, "from 0 to 1e30")
        decay_ok = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        require(decay_ok, "weight_decay", self.weight_decay, "finite and not negative")
        require(math.isfinite(self.eps) and self.eps > 0, "eps", self.eps, "finite and above 0")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, name, value, "at least 0 and below 1")
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "from 0 to 1")
        clip = self.grad_clip
        clip_ok = clip is None or (math.isfinite(clip) and clip > 0)
        require(clip_ok, "grad_clip", clip, "finite and above 0")
        require(self.schedule in SCHEDULES, "schedule", self.schedule, " or ".join(SCHEDULES))

    def learning_rate(self, update: int) -> float:
        """Return the learning rate of an update.

        Args:
            update: index of the update, from 0; nothing else decides the rate, so a resumed
                run sees the same rates as an uninterrupted one.
        """
        return self.scheduled(self.lr, update)

    def update_options(self, update: int) -> dict[str, Any]:
        """Return the arguments of `Engine.update` for an update, counted from 0."""
        names = ("beta1", "beta2", "eps", "weight_decay", "grad_clip")
        return {"lr": self.learning_rate(update)} | {name: getattr(self, name) for name in names}

    def scheduled(self, peak: float, update: int) -> float:
        """Return a rate at an update, as the schedule lets it rise to its peak and fall.

        After the rise a progress of 0 to 1 goes with the updates, and the rate from its peak to
        `min_lr_ratio` of it: linear, by half a cosine (Loshchilov & Hutter 2017, arXiv 1608.03983),
        or, with wsd (warm-up, stable, decay; Hu et al. 2024, arXiv 2404.06395), linear over the
        last part only.
        """
        if update < self.rising:
            return peak * (update + 1) / self.rising
        if self.schedule == "constant":
            return peak
        last = max(self.updates - 1, self.rising + 1)
        progress = min(1.0, (update - self.rising) / (last - self.rising))
        if self.schedule == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * progress))
        else:
            part = self.falling if self.schedule == "wsd" else 1.0
            left = min(1.0, (1.0 - progress) / part)
        return peak * (self.min_lr_ratio + (1.0 - self.min_lr_ratio) * left)
