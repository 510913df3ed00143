"""What `anepy train` does when its process cannot compile programs for the new weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AnepyError, CompileBudgetError, NativeError
from ..hardware.programs import write_layer
from ..system import restart

if TYPE_CHECKING:
    from ..console.train import Reporter
    from ..system.interrupts import StopRequest
    from ..training.run_log import RunLog
    from ..training.trainer import Trainer
    from .plan import Plan


def go_on_elsewhere(
    plan: Plan,
    trainer: Trainer,
    reporter: Reporter,
    log: RunLog,
    failure: NativeError,
    stop: StopRequest,
) -> None:
    """Replace this process, which cannot compile for the weights; return only if it is stopped.

    Raises:
        CompileBudgetError, NativeError: earlier restarts brought no step.
    """
    following = restart.following(
        plan.restarted, trainer.steps_done, plan.checkpoint if plan.save_at_end else None
    )
    if following.futile >= restart.MOST_FUTILE:
        following.discard()
        raise _given_up(plan, trainer, failure)
    try:
        trainer.save_checkpoint(following.checkpoint, restarting=True)
        text = f"restart step {trainer.steps_done}, {trainer.engine.compiles} compiles"
        if not isinstance(failure, CompileBudgetError):
            text += f", {failure.detail}"
        text += ", going on in a new process"
        if stop.signal is not None:
            return
        reporter.restart(text)
        log.restart(trainer.steps_done, trainer.engine.compiles, failure.detail)
        restart.replace_process(following, stop)
    finally:
        following.discard()


def _given_up(plan: Plan, trainer: Trainer, failure: NativeError) -> NativeError:
    """Save what there is, with the programs that do not compile, and say where."""
    text = f"{failure.detail}; a new process did not help either"
    folder = Path(f"{(plan.checkpoint or Path('anepy')).stem}.mil")
    with contextlib.suppress(AnepyError, OSError):
        write_layer(trainer.model, trainer.seq, folder)
        text += f"; the MIL of the first layer's programs is in {folder}"
        text += ": please send it with `anepy info --json`"
    if plan.checkpoint is not None:
        trainer.save_checkpoint(plan.checkpoint)
        text += f"; the run is in {plan.checkpoint}"
    return type(failure)(failure.code, failure.name, text)
