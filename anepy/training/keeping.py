"""The checkpoints of a run that goes on: the last, numbered ones, the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import CheckpointError
from .reports import StepReport
from .run_folder import best_path, number
from .trainer import Trainer


class Keeper:
    """Write checkpoints of a run that goes on; one that cannot be written does not end it.

    Args:
        path: the checkpoint; None writes nothing.
        every: steps between two; 0 writes none before the end.
        keep: numbered ones to keep beside it.
        best: whether that of the best evaluation is kept too.

    Attributes:
        written: whether the checkpoint has been written.
    """

    def __init__(self, path: Path | None, every: int, keep: int, best: bool) -> None:
        self.path = path
        self.written = False
        self._every = every
        self._keep = keep
        self._best = best

    def after(self, trainer: Trainer, report: StepReport) -> list[str]:
        """Write what is due after a step; return what went wrong, one line each."""
        if self.path is None:
            return []
        notes = []
        if self._every and report.step % self._every == 0 and not trainer.finished:
            notes += self._try(self.save, trainer)
        improved = trainer.best is not None and trainer.best[1] == report.step
        if self._best and report.held_out_loss is not None and improved:
            notes += self._try(lambda t: t.save_checkpoint(best_path(self.path)), trainer)
        return notes

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
        nbytes = trainer.save_checkpoint(self.path, keep=True)
        self.written = True
        if self._keep:
            number(self.path, trainer.steps_done, self._keep)
        return nbytes
