"""The settings of a training run: one frozen dataclass, checked before anything is allocated.

Imports nothing heavy, so that the command line can show its help texts without numpy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError
from ..models.freezing import patterns
from ..models.storages import MOMENTS, STORAGES
from ..models.targets import TARGETS, chosen_targets
from .settings import MOST_RATE, LoopConfig, described, require, setting

ENDLESS = 1 << 53  # steps of a run that something else ends; JSON can hold it
WIRES = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "lion", "sgd", "muon")  # as libsrc/train/update.c has them


@described
@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Settings of a training run.

    Example:
        >>> TrainConfig(steps=200, lr=1e-3).accum
        10
    """

    steps: int = setting(
        None,
        "Total number of steps (one step is --batch sequences). Default: 1000, or with --minutes "
        "as many as fit.",
    )
    optimizer: str = setting("adamw", "Optimizer: adamw, lion, sgd or muon.")
    moments: str = setting("f32", "Moments of the optimizer in memory: f32, or bf16, half of it.")
    momentum: float = setting(0.95, "Momentum of sgd, and of muon's matrices.")
    matrix_lr: float = setting(
        0.02, "Muon: learning rate of the layers' matrices; follows the schedule of --lr."
    )
    warmup: int = setting(0, "Updates over which the learning rate rises linearly.")
    decay: float = setting(
        0.2, "Schedule wsd: part of the updates after the warm-up over which the rate falls."
    )
    variant: str = setting("max", "Set of optimizations, like opt or baseline+simd_adam.")
    freeze: tuple[str, ...] = setting(
        (), "Leave tensors with such names as they are, like 'layers.0.*'; may be repeated."
    )
    recompute: bool = setting(
        False, "Compute activations again in the backward pass: same bits, less memory."
    )
    lora: bool = setting(False, "Train a low-rank adapter; the model stays as it is.")
    rank: int = setting(8, "LoRA: rank of the adapter.")
    alpha: float = setting(16.0, "LoRA: the adapter is multiplied by --alpha / --rank.")
    targets: tuple[str, ...] = setting(
        TARGETS, "LoRA: projections with an adapter, like wq,wv. Default: wq,wk,wv,wo,w1,w2,w3."
    )
    base: str | None = setting(
        None, "LoRA: matrices of the model in memory: f32, bf16 or q8. Default: f32."
    )
    metal: bool = setting(False, "Weight gradients on the GPU: switch metal_dw (macOS).")
    pack: bool = setting(False, "Put several whole documents into a window, kept apart (cpu).")
    dtype: str = setting("auto", "Type of the ids in data of other programs, like uint32.")
    held_out: float = setting(0.0, "Part of the data kept for evaluation, like 0.05.")
    eval_every: int = setting(0, "Steps between held-out evaluations. 0: at both ends only.")
    eval_windows: int = setting(16, "Sequences per held-out evaluation.")
    patience: int = setting(0, "Stop after so many evaluations without a better loss. 0: never.")
    minutes: float | None = setting(None, "Stop after so many minutes, or after --steps.")
    shard: bool = setting(
        False, "MPI: each rank updates, and has the moments of, its part of the weights only."
    )
    wire: str = setting("fp32", "MPI: how gradients travel: fp32, or rounded to bf16.")

    def __post_init__(self) -> None:
        """Take one name for several, the lists of files for tuples, and the default of steps."""
        if self.steps is None:
            object.__setattr__(self, "steps", 1000 if self.minutes is None else ENDLESS)
        object.__setattr__(self, "freeze", patterns(self.freeze))
        object.__setattr__(self, "targets", chosen_targets(self.targets))

    def validate(self) -> None:
        """Check every setting by itself and against the others.

        Raises:
            ConfigError: a setting is out of range or contradicts another one.
        """
        super().validate()
        for name in ("steps", "eval_windows"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup", "eval_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")
        require(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, " or ".join(OPTIMIZERS))
        require(self.moments in MOMENTS, "moments", self.moments, " or ".join(MOMENTS))
        require(0 <= self.momentum < 1, "momentum", self.momentum, "at least 0 and below 1")
        require(0 <= self.matrix_lr <= MOST_RATE, "matrix_lr", self.matrix_lr, "from 0 to 1e30")
        require(0 < self.decay <= 1, "decay", self.decay, "above 0 and at most 1")
        require(0 <= self.held_out < 1, "held_out", self.held_out, "at least 0 and below 1")
        if self.base is not None:
            require(self.base in STORAGES, "base", self.base, " or ".join(STORAGES))
        require(self.patience >= 0, "patience", self.patience, "not negative")
        minutes = self.minutes
        time_ok = minutes is None or (math.isfinite(minutes) and minutes > 0)
        require(time_ok, "minutes", minutes, "finite and above 0")
        if self.endless and minutes is None:
            raise ConfigError("the run has no end: set steps or minutes")
        if self.endless and self.schedule != "constant":
            raise ConfigError(
                f"the schedule {self.schedule} falls towards the last step: set steps beside "
                "minutes, or leave the schedule constant"
            )
        require(self.wire in WIRES, "wire", self.wire, " or ".join(WIRES))
        if self.shard and self.optimizer == "muon":
            raise ConfigError("shard: muon needs whole matrices; use adamw, lion or sgd")
        if self.patience and not self.eval_every:
            raise ConfigError("patience counts evaluations: set eval_every, for example to 100")

    def update_options(self, update: int) -> dict[str, Any]:
        """Return the arguments of `Engine.update` for an update, counted from 0."""
        matrix_lr = self.scheduled(self.matrix_lr, update)
        return super().update_options(update) | {"momentum": self.momentum, "matrix_lr": matrix_lr}

    @property
    def engine_variant(self) -> str:
        """Name the variant the engine gets: `variant`, with the Metal switch if asked for."""
        return f"{self.variant}+metal_dw" if self.metal else self.variant

    @property
    def endless(self) -> bool:
        """Whether time ends the run, not a number of steps."""
        return self.steps >= ENDLESS

    @property
    def updates(self) -> int:
        """Count the updates of an uninterrupted run, the partial last one included."""
        return -(-self.steps // self.accum)

    @property
    def rising(self) -> int:
        """Count the first updates, over which the learning rate rises: `warmup`."""
        return self.warmup

    @property
    def falling(self) -> float:
        """Part of the updates at whose end, with schedule wsd, the rate falls: `decay`."""
        return self.decay


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
