"""What a resumed run may change, and what it says of changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checkpoint import Meta
from .config import TrainConfig

# Settings that change what is computed, so a resume that changes them is worth a note.
_MATHEMATICAL = (
    "batch", "accum", "seq", "lr", "beta1", "beta2", "eps", "weight_decay", "grad_clip", "schedule",
    "warmup", "min_lr_ratio", "held_out", "momentum", "matrix_lr", "decay",
)  # fmt: skip


def check_moments(config: TrainConfig, meta: Meta, path: str | Path) -> None:
    """Refuse moments that the optimizer of this run cannot go on with.

    Raises:
        CheckpointError: they are of another optimizer, or stored in another way.
    """
    optimizer = meta.settings.get("optimizer", "adamw")
    if optimizer != config.optimizer:
        raise CheckpointError(
            f"{path} has the moments of optimizer {optimizer}, this run is to use "
            f"{config.optimizer}: resume with the same one, or train its model anew"
        )
    moments = meta.settings.get("moments", "f32")
    if moments != config.moments:
        raise CheckpointError(
            f"{path} has its moments in {moments}, this run is to have them in "
            f"{config.moments}: resume with --moments {moments}"
        )


def differences(
    config: TrainConfig, seq: int, data: Mapping[str, Any], engine: Mapping[str, Any], meta: Meta
) -> list[str]:
    """Tell in one line each what a resumed run does differently from the saved one.

    Args:
        config: settings of the resumed run.
        seq: tokens of its sequences.
        data: `tokens` and `crc32` of its data.
        engine: what it runs on.
        meta: what the checkpoint says.
    """
    notes = []
    now = asdict(config) | {"seq": seq}
    for name in _MATHEMATICAL:
        if name in meta.settings and meta.settings[name] != now[name]:
            notes.append(f"{name} is {now[name]}, the checkpoint had {meta.settings[name]}")
    seed = meta.sampler.get("seed")
    if seed != config.seed:
        notes.append(f"seed {config.seed} is ignored, the data order of {seed} continues")
    steps = meta.settings.get("steps")
    if config.schedule != "constant" and steps != config.steps:
        notes.append(f"the {config.schedule} now ends at step {config.steps}, it was {steps}")
    same = {name: data[name] for name in ("tokens", "crc32")}
    if any(meta.source.get(name, value) != value for name, value in same.items()):
        notes.append("the data is not the checkpoint's: other sequences will be drawn")
    for name, value in engine.items():
        if name in meta.engine and meta.engine[name] != value and name != "switches":
            notes.append(
                f"{name} is {value}, the checkpoint had {meta.engine[name]}: "
                "losses agree, but not bit for bit"
            )
    return notes
