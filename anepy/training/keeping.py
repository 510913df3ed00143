"""The checkpoints of a run that goes on: where it began, the last, numbered ones, the best."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError, DivergedError
from ..system import files
from .reports import StepReport
from .run_folder import best_path, number, start_path
from .trainer import Trainer

_PAUSE_S = 600.0  # between two, where nothing else was asked for
_SMALL = 256 << 20  # bytes of a checkpoint that is written at the start without being asked for
_MOST_ROLLBACKS = 3  # in a row that brought the run no further


class Keeper:
    """Write checkpoints of a run that goes on; one that cannot be written does not end it.

    Only weights that give a finite loss are written, so that a run which diverges leaves the last
    good ones. It is a context manager: at its end the checkpoint of the start goes.

    Args:
        path: the checkpoint; None writes nothing.
        every: steps between two; 0 writes one every ten minutes.
        keep: numbered ones to keep beside it.
        best: whether that of the best evaluation is kept too.
        good: a checkpoint of this run that is there already; None if there is none.

    Attributes:
        written: whether the checkpoint has been written.
        told: where the run can be resumed from, in words.
        good: the newest checkpoint that the run can go back to; None if there is none.
    """

    def __init__(
        self, path: Path | None, every: int, keep: int, best: bool, good: Path | None = None
    ) -> None:
        self.path = path
        self.written = False
        self.told = "nothing of this run was saved" if good is None else f"the run is in {good}"
        self.good = good
        self._every = every
        self._keep = keep
        self._best = best
        self._last = 0.0
        self._furthest = self._rollbacks = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, trainer: Trainer, wanted: bool) -> list[str]:
        """Keep the start of the run until a later state is written; return what went wrong.

        Args:
            trainer: before its first step.
            wanted: also if that takes long.

        Raises:
            DivergedError: the weights are not worth keeping as they are.
        """
        if self.path is None:
            return []
        start = start_path(self.path)
        if self.good != start:
            self._forget(start)  # of a run that was killed
        if self.good is not None:
            return []
        if not wanted and trainer.checkpoint_nbytes() > _SMALL:
            return []
        trainer.check()
        try:
            trainer.save_checkpoint(start)
        except CheckpointError as error:
            return [str(error)]
        self._stack.enter_context(files.temporary(os.fspath(start)))
        self._stack.callback(self._forget, start)
        self.good = start
        return []

    def _forget(self, start: Path) -> None:
        with contextlib.suppress(OSError):
            start.unlink()

    def after(self, trainer: Trainer, report: StepReport) -> list[str]:
        """Write what is due after a step; return what went wrong, one line each.

        Raises:
            DivergedError: the weights are not worth keeping.
        """
        if self.path is None:
            return []
        notes = []
        if self._due(trainer, report.step) and not trainer.finished:
            trainer.check()
            notes += self._try(self.save, trainer)
        improved = trainer.best is not None and trainer.best[1] == report.step
        if self._best and report.held_out_loss is not None and improved:
            notes += self._try(lambda t: t.save_checkpoint(best_path(self.path)), trainer)
        return notes

    def _due(self, trainer: Trainer, step: int) -> bool:
        if self._every:
            return step % self._every == 0
        self._last = self._last or trainer.clock()
        return trainer.clock() - self._last > _PAUSE_S

    def _try(self, write: Callable[[Trainer], object], trainer: Trainer) -> list[str]:
        try:
            write(trainer)
        except CheckpointError as error:
            return [f"{error}; training goes on, and tries again"]
        return []

    def save(self, trainer: Trainer) -> int:
        """Write the checkpoint now; return its bytes.

        Raises:
            CheckpointError: it could not be written.
        """
        assert self.path is not None
        self._last = trainer.clock()
        nbytes = trainer.save_checkpoint(self.path, keep=True)
        self.written, self.good = True, self.path
        self.told = f"the run is in {self.path}, as it was after step {trainer.steps_done}"
        if self._keep and (trainer.ranks is None or trainer.ranks.first):
            number(self.path, trainer.steps_done, self._keep)
        return nbytes

    def roll_back(self, trainer: Trainer) -> str:
        """Let a run that diverged go on from its last good checkpoint with other data.

        Returns:
            What was done, in words; empty if nothing was, as it has not helped before.

        Raises:
            CheckpointError: the checkpoint cannot be read.
        """
        if self.good is None:
            return ""
        at = trainer.steps_done
        self._rollbacks = self._rollbacks + 1 if at <= self._furthest else 1
        self._furthest = max(self._furthest, at)
        if self._rollbacks > _MOST_ROLLBACKS:
            return ""
        trainer.roll_back(self.good)
        return f"back to step {trainer.steps_done}, and on with other data"

    def give_up(self, trainer: Trainer) -> str:
        """Leave the last good state of a run that has diverged; say where it is.

        Raises:
            DivergedError: there is none.
            CheckpointError: it could not be written.
        """
        assert self.path is not None
        if self.good == self.path:
            return f"the last checkpoint is in {self.path}"
        then = "was then"
        try:
            trainer.engine.discard()
            trainer.check()
        except DivergedError:
            if self.good is None:
                raise
            trainer.roll_back(self.good)
            then = "began"
        trainer.save_checkpoint(self.path, drop_gradients=then != "began", keep=True)
        return f"the run as it {then} is in {self.path}"
