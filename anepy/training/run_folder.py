"""The folder of a run: the names in it, and what it says of the run.

`run.json` (what it is), `log.jsonl`, `checkpoint.npz` (the last), `checkpoint-previous.npz` (the
one before), `checkpoint-STEP.npz` (the last few), `best.npz` (of the best evaluation) and, at the
end, the model or adapter.
Imports nothing heavy.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, ModelError
from ..system import files
from ..system.version import __version__

if TYPE_CHECKING:
    from ..models.model import ModelConfig

FORMAT = "anepy-run-1"
DESCRIPTION = "run.json"
CHECKPOINT = "checkpoint.npz"
BEST = "best.npz"
LOG = "log.jsonl"
PLOT = "plot.html"
ADAPTER = "adapter"


def best_path(checkpoint: Path | None) -> Path:
    """Return where the best checkpoint is, beside the last."""
    assert checkpoint is not None
    if checkpoint.name == CHECKPOINT:
        return checkpoint.with_name(BEST)
    return checkpoint.with_name(f"{_stem(checkpoint)}-best.npz")


def previous_path(checkpoint: Path) -> Path:
    """Return where the checkpoint is kept that another has replaced."""
    return checkpoint.with_name(f"{_stem(checkpoint)}-previous.npz")


def start_path(checkpoint: Path) -> Path:
    """Return where the start of a run is kept until it has written its first checkpoint."""
    return checkpoint.with_name(f"{_stem(checkpoint)}-start.npz")


def number(checkpoint: Path, step: int, keep: int) -> None:
    """Keep a checkpoint under a name with its step too, and only the last `keep` of these.

    The next one replaces the file by another, so a second name is enough where links exist.
    """
    stem = _stem(checkpoint)
    target = checkpoint.with_name(f"{stem}-{step:08d}.npz")
    with contextlib.suppress(OSError):
        target.unlink()
    try:
        os.link(checkpoint, target)
    except OSError:
        try:
            with files.replacing(target) as file, checkpoint.open("rb") as source:
                shutil.copyfileobj(source, file)
        except OSError as error:
            raise CheckpointError(files.write_failure(target, "checkpoint", error)) from error
    for path in numbered(checkpoint)[:-keep]:
        with contextlib.suppress(OSError):
            path.unlink()


def numbered(checkpoint: Path) -> list[Path]:
    """Return the numbered checkpoints beside one, oldest first."""
    pattern = re.compile(rf"{re.escape(_stem(checkpoint))}-\d{{8}}\.npz")
    found = checkpoint.parent.glob("*.npz")
    return sorted(path for path in found if pattern.fullmatch(path.name))


def _stem(checkpoint: Path) -> str:
    return checkpoint.name.removesuffix(".npz")


# ------------------------------------------------------------------------------- folders of runs


def holds_run(folder: Path) -> bool:
    """Return whether a folder has a run in it."""
    return (folder / DESCRIPTION).exists()


def lacks_model(folder: Path | None) -> bool:
    """Return whether the model or adapter at the end of a run is missing in its folder."""
    if folder is None:
        return False
    return not any((folder / name).exists() for name in ("model.bin", "model", ADAPTER))


def describe(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write what a run is, unless the folder says so already.

    Raises:
        ConfigError: it could not be written.
    """
    path = folder / DESCRIPTION
    if path.exists():
        return
    created = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
    record = {"format": FORMAT, "anepy": __version__, "created": created, **facts}
    try:
        with files.replacing(path) as file:
            file.write(files.dumps(record, indent=1).encode())
    except OSError as error:
        raise ConfigError(files.write_failure(path, "the run", error)) from error


def model_path(folder: Path, config: ModelConfig) -> Path:
    """Return where the model of a run goes: a llama2.c file if that can hold it, else a folder."""
    from ..models import llama2c

    try:
        llama2c.check(config)
    except ModelError:
        return folder / "model"
    return folder / "model.bin"
