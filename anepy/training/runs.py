"""Runs as their logs tell them: for lists, comparisons and pictures. Reads JSON lines only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..system.files import parsed
from .config import ENDLESS
from .run_folder import LOG

_LONGEST_LINE = 1 << 20


@dataclass
class Run:
    """A run.

    Attributes:
        name: of its folder or log.
        path: the log.
        facts: the last record of type `run`: model, data, settings, engine.
        losses: step -> training loss; a step that was done again counts once, as it was last.
        rates: step -> learning rate.
        speeds: step -> tokens per second.
        tokens: step -> counted targets.
        held_out: step -> loss on held-out data.
        seconds: sum of the times of its steps.
        summary: the last record of type `summary`; empty if the run was not ended in good order.
    """

    name: str
    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)
    rates: dict[int, float] = field(default_factory=dict)
    speeds: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """The last step done."""
        return max(self.losses, default=0)

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best evaluation; None without any."""
        if not self.held_out:
            return None
        step = min(self.held_out, key=lambda at: (self.held_out[at], at))
        return step, self.held_out[step]

    @property
    def loss(self) -> float | None:
        """Mean loss over the last tenth of the steps, 200 at most; None before the first."""
        steps = sorted(self.losses)
        few = steps[-max(1, min(200, len(steps) // 10)) :]
        return math.fsum(self.losses[s] for s in few) / len(few) if steps else None

    @property
    def total(self) -> int:
        """Steps the run was to have; 0 if time was to end it."""
        steps = int(self.facts.get("settings", {}).get("steps", 0))
        return 0 if steps >= ENDLESS else steps


def read(path: str | Path) -> Run:
    """Read a run.

    Args:
        path: its folder, or its log.

    Raises:
        DataError: there is none, or it is no log of anepy.
    """
    path = Path(path)
    log = path / LOG if path.is_dir() else path
    run = Run(path.resolve().name if path.is_dir() else path.stem, log)
    try:
        with log.open("rb") as file:
            for record in _records(file):
                _take(run, record)
    except OSError as error:
        what = f"{path} holds no run" if path.is_dir() else f"cannot read log {path}"
        raise DataError(f"{what}: {error.strerror}; `anepy train --run FOLDER` makes one") from None
    if not run.facts:
        raise DataError(f"{log} is no log of a run of anepy; `anepy train --run FOLDER` makes one")
    return run


def _records(file: Any) -> Iterator[dict[str, Any]]:
    """Yield the records of a log; a line that a killed process left half is passed over."""
    while line := file.readline(_LONGEST_LINE):
        try:
            record = parsed(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def _take(run: Run, record: dict[str, Any]) -> None:
    kind = record.get("type")
    if kind == "run" and isinstance(record.get("settings"), dict):
        run.facts, run.summary = record, {}
    elif kind == "summary":
        run.summary = record
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        return
    if kind == "eval":
        _put(run.held_out, step, record.get("loss"))
    if kind != "step":
        return
    _put(run.losses, step, record.get("loss"))
    _put(run.rates, step, record.get("lr"))
    _put(run.speeds, step, record.get("tokens_per_s"))
    if isinstance(record.get("tokens"), int):
        run.tokens[step] = record["tokens"]
    if isinstance(record.get("ms"), (int, float)):
        run.seconds += record["ms"] / 1e3


def _put(series: dict[int, float], step: int, value: object) -> None:
    if isinstance(value, (int, float)) and math.isfinite(value):
        series[step] = float(value)


def found_in(folder: Path) -> list[Path]:
    """Return the folders of runs in a folder, by name."""
    return sorted(path.parent for path in folder.glob(f"*/{LOG}"))
