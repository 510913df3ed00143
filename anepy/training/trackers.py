"""The records of a run in TensorBoard and Weights & Biases, by their own packages.

Each takes the records that the log writes (docs/formats.md#log). Neither package is imported
unless it was asked for.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError

# By the type of a record: field -> name there.
_SCALARS: Mapping[str, Mapping[str, str]] = {
    "step": {"loss": "train/loss", "lr": "train/lr", "tokens_per_s": "speed/tokens_per_s",
             "ms": "speed/ms_per_step"},
    "batch": {"grad_norm": "train/grad_norm"},
    "eval": {"loss": "held_out/loss"},
}  # fmt: skip


class Tracker(Protocol):
    """What shows a run elsewhere."""

    name: str

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record of the log."""

    def close(self) -> None:
        """End in good order."""


def _package(name: str, extra: str, option: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"{option} needs the package {extra}; pip install 'anepy[{extra}]'"
        ) from None


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what can be drawn of a record, by name."""
    names = _SCALARS.get(str(record["type"]), {})
    found = {name: record.get(key) for key, name in names.items()}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


class TensorBoard:
    """Write a folder that `tensorboard --logdir` shows (extra `tensorboard`).

    Args:
        folder: is made; what is there stays, and a resumed run goes on in it.

    Raises:
        ConfigError: the package is missing, or the folder cannot be written.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        base = "tensorboard.compat.proto"
        writer = _package(
            "tensorboard.summary.writer.event_file_writer", "tensorboard", "--tensorboard"
        )
        self._event = _package(f"{base}.event_pb2", "tensorboard", "--tensorboard").Event
        self._summary = _package(f"{base}.summary_pb2", "tensorboard", "--tensorboard").Summary
        try:
            self._writer = writer.EventFileWriter(str(folder))
        except OSError as error:
            raise ConfigError(f"cannot write {folder} for TensorBoard: {error.strerror}") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record of the log."""
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in scalars(record).items()
        ]
        if record["type"] == "sample":
            values.append(self._text("sample", str(record["text"])))
        if values:
            event = self._event(wall_time=time.time(), step=int(record["step"]))
            event.summary.CopyFrom(self._summary(value=values))
            self._writer.add_event(event)

    def _text(self, tag: str, text: str) -> Any:
        value = self._summary.Value(tag=tag)
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = 7  # DT_STRING
        value.tensor.string_val.append(text.encode(errors="replace"))
        value.tensor.tensor_shape.dim.add(size=1)
        return value

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class WandB:
    """Send a run to Weights & Biases (extra `wandb`); `WANDB_MODE=offline` keeps it here.

    Args:
        project: its name there.
        run: name of the run; None lets the package choose.
        folder: where the package keeps its files.

    Raises:
        ConfigError: the package is missing, or cannot begin, as without a login.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, run: str | None, folder: Path) -> None:
        package = _package("wandb", "wandb", "--wandb")
        try:
            settings = package.Settings(silent=True)
            self._run = package.init(project=project, name=run, dir=str(folder), settings=settings)
        except Exception as error:  # of the package's many kinds
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"Weights & Biases cannot begin: {reason}; log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from None
        self._step = 0
        self._waiting: dict[str, Any] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record of the log; those of one step go together."""
        if record["type"] == "run":
            self._run.config.update(
                {key: record[key] for key in ("model", "config", "data", "settings", "engine")},
                allow_val_change=True,
            )
            return
        values: dict[str, Any] = dict(scalars(record))
        if record["type"] == "sample":
            values["sample"] = str(record["text"])
        if not values:
            return
        step = int(record["step"])
        if step != self._step:
            self._flush()
            self._step = step
        self._waiting |= values

    def _flush(self) -> None:
        if self._waiting:
            self._run.log(self._waiting, step=self._step)
            self._waiting = {}

    def close(self) -> None:
        """Send what is left."""
        self._flush()
        self._run.finish()
