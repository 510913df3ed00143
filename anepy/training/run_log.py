"""The log of a run: one JSON object per line (docs/formats.md#log).

Times of a step have the keys of the research programs, and `t_elem` includes soft-max and loss as
it does there; `t_softmax` is that part alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TextIO

from ..engine.stats import UpdateStats
from ..errors import ConfigError
from ..system.files import dumps, parsed
from ..system.mac import ANE_PEAK_TFLOPS
from .reports import StepReport, Summary
from .trackers import Tracker

_LONGEST_LINE = 1 << 16


class RunLog:
    """Write the log of a run, a line as soon as it is known.

    A log that can no longer be written must not end the training: the first failure is kept in
    `failure` and nothing is written after it.

    Args:
        path: the file; None writes nothing.
        after: go on with the file behind this step, dropping what a run that was killed had written
            beyond its checkpoint, a half line included; None replaces the file.
        trackers: take every record too; one that fails is left out from then on, and `lost` says
            why.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(
        self, path: str | Path | None, after: int | None = None, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.failure: OSError | None = None
        self.lost: list[str] = []
        self._trackers = list(trackers)
        self._file: TextIO | None = None
        self._batch_ms: list[float] = []
        self._device = ""
        if path is not None:
            mode: Literal["w", "a"] = "w" if after is None else "a"
            self._file = open(path, mode, encoding="utf-8", errors="replace", buffering=1)
            if after is not None and os.path.isfile(path):
                os.truncate(path, _end_of(Path(path), after))

    def close(self) -> None:
        """Close the file and the trackers; may be called twice."""
        self._tell(lambda tracker: tracker.close())
        self._trackers.clear()
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                self.failure = self.failure or error

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, facts: Mapping[str, Any], device: str) -> None:
        """Write what the run is."""
        self._device = device
        self._write({"type": "run", **facts})

    def step(self, report: StepReport) -> None:
        """Write a step, and its update and evaluation if it had them."""
        if self._file is None and not self._trackers:
            return
        stats = report.stats.logged()
        stats["t_elem"] += stats["t_softmax"]
        self._write(
            {
                "type": "step",
                "step": report.step,
                **stats,
                "compiles": report.compiles,
                "ms": report.ms_per_step,
                "tokens_per_s": report.tokens_per_s,
                "gflops": report.gflops,
                "lr": report.lr,
            }
        )
        self._batch_ms.append(report.ms_per_step)
        if report.update is not None:
            self._update(report, report.update)
        if report.held_out_loss is not None:
            self._write({"type": "eval", "step": report.step, "loss": report.held_out_loss})

    def _update(self, report: StepReport, update: UpdateStats) -> None:
        steps, train_ms = len(self._batch_ms), sum(self._batch_ms)
        self._batch_ms.clear()
        self._write(
            {
                "type": "batch",
                "batch": steps,
                **asdict(update),
                "train_ms": train_ms,
                "ms_per_step": train_ms / steps,
                "step": report.step,
                "update": report.updates,
                "lr": report.lr,
            }
        )
        if report.traffic is not None:
            hidden = report.traffic.hidden
            self._write(
                {"type": "ranks", "step": report.step, **asdict(report.traffic), "hidden": hidden}
            )
        tflops = report.gflops / 1e3
        ane_tflops = tflops if self._device == "ane" else 0.0
        self._write(
            {
                "type": "perf",
                "ane_tflops": ane_tflops,
                "ane_util_pct": 100 * ane_tflops / ANE_PEAK_TFLOPS,
                "tflops": tflops,
                "step": report.step,
            }
        )

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Write text that the model made."""
        self._write({"type": "sample", "step": step, "prompt": prompt, "text": text})

    def restart(self, step: int, compiles: int, reason: str) -> None:
        """Write that the run goes on in a new process."""
        self._write({"type": "restart", "step": step, "compiles": compiles, "reason": reason})

    def rollback(self, step: int, reason: str) -> None:
        """Write that a run which diverged went back to an earlier step."""
        self._batch_ms.clear()
        self._write({"type": "rollback", "step": step, "reason": reason})

    def summary(self, summary: Summary) -> None:
        """Write how the run went."""
        self._write({"type": "summary", **asdict(summary)})

    def _tell(self, do: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                do(tracker)
            except Exception as error:  # of other programs; the run is worth more
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split())[:200]
                self.lost.append(f"{tracker.name} ends early: {reason or type(error).__name__}")

    def _write(self, record: Mapping[str, Any]) -> None:
        self._tell(lambda tracker: tracker.write(record))
        if self._file is None:
            return
        try:
            self._file.write(dumps(record) + "\n")
        except OSError as error:
            self.failure = error
            self.close()


def check_log(path: str | Path) -> None:
    """Refuse to write a log over a file that is none.

    Raises:
        ConfigError: the file is there, not empty, and does not begin as a log does.
    """
    try:
        with open(path, "rb") as file:
            first = file.readline(_LONGEST_LINE)
    except OSError:
        return  # not there, or a device; opening it will tell
    try:
        is_log = isinstance(parsed(first)["type"], str)
    except (ValueError, TypeError, KeyError):
        is_log = False
    if first and not is_log:
        raise ConfigError(f"{path} is there and is no log of anepy: name another file for the log")


def _end_of(path: Path, step: int) -> int:
    """Return where the records of a log end that are of no later step, in bytes."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = parsed(line)
                if not line.endswith(b"\n") or int(record.get("step", 0)) > step:
                    break
            except (ValueError, TypeError, AttributeError):
                break
            end += len(line)
    return end
