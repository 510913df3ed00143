"""Steps and updates of one engine in the order a run makes them.

`anepy train` runs this loop and `anepy compare` measures it: what is measured is what trains.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.engine import Engine
from ..engine.evaluation import mean_loss, sequence_losses
from ..engine.stats import StepStats, UpdateStats
from ..errors import DivergedError, NativeError
from ..models.soundness import largest, unsound
from ..text.data import Sampler
from .settings import LoopConfig


class Loop:
    """Draw batches, step, and update when it is time.

    Args:
        engine: trains the model; stays the caller's.
        sampler: draws the sequences.
        config: how many of them, when to update and how.

    Attributes:
        steps: steps done; a run that is resumed sets it.
    """

    def __init__(self, engine: Engine, sampler: Sampler, config: LoopConfig) -> None:
        self.engine = engine
        self.sampler = sampler
        self.config = config
        self.steps = 0

    def step(self) -> tuple[StepStats, float]:
        """Draw the next batch and run forward and backward on it.

        Returns:
            What the engine says of it, and its wall time in milliseconds, without drawing.

        Raises:
            DivergedError: the loss is not finite, or a gradient where nothing can be done about it;
                the weights are those of the last update.
            NativeError: the step was not done; the next one draws the same batch.
        """
        position = self.sampler.state()
        # Of packed documents a window says also where they begin.
        tokens, targets, *starts = self._batch()
        began = time.perf_counter()
        try:
            stats = self.engine.step(tokens, targets, *starts)
        except NativeError:
            self.sampler.restore(position)
            raise
        wall_ms = (time.perf_counter() - began) * 1e3
        if not math.isfinite(stats.loss):
            raise self.diverged("loss", self.steps + 1)
        # fp16 skips such a step and lowers its scale; at scale 1 there is nothing to lower.
        if stats.skipped and stats.loss_scale <= 1:
            raise self.diverged("gradient", self.steps + 1)
        self.steps += 1
        return stats, wall_ms

    def _batch(self) -> list[npt.NDArray[Any]]:
        """Draw the sequences of a step, each into its row."""
        window = self.sampler.next()
        rows = [np.empty((self.config.batch, *part.shape), part.dtype) for part in window]
        for row in range(self.config.batch):
            if row:
                window = self.sampler.next()
            for part, values in zip(rows, window, strict=True):
                part[row] = values
        return rows

    @property
    def accumulated(self) -> int:
        """Steps since the last update."""
        return self.engine.accumulated

    def learning_rate(self) -> float:
        """Return the learning rate of the next update."""
        return self.config.learning_rate(self.engine.updates)

    def update(self, last: bool) -> tuple[UpdateStats, float] | None:
        """Update the weights if `accum` steps have accumulated, or any before an end.

        Args:
            last: no step follows, so that what has accumulated is used now.

        Returns:
            What the engine says of it, and its wall time in milliseconds; None if it is not time.

        Raises:
            DivergedError: a gradient is not finite; the weights are those of the last update.
        """
        config, engine = self.config, self.engine
        accumulated = engine.accumulated
        if accumulated < config.accum and not (last and accumulated):
            return None
        began = time.perf_counter()
        stats = engine.update(**config.update_options(engine.updates))
        wall_ms = (time.perf_counter() - began) * 1e3
        if stats.skipped:
            raise self.diverged("gradient", self.steps)
        return stats, wall_ms

    def check(self, window: tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]) -> None:
        """Raise unless weights, loss and gradient are finite, as `Trainer.check` says.

        Args:
            window: tokens and targets to compute a loss and a gradient of.
        """
        engine = self.engine
        if unsound(engine.trained):
            raise self.diverged("weights", self.steps)
        if engine.stale:
            return
        loss = mean_loss(sequence_losses(engine, [window]))
        if not math.isfinite(loss):
            raise self.diverged("loss", self.steps)
        if self.accumulated or engine.precision == "fp16" or window[1].max() < 0:
            return
        unit = engine.unit
        try:
            engine.step(*window)
            if unsound(engine.gradients):
                raise self.diverged("gradient", self.steps)
        finally:
            engine.discard()
            engine.restore(0, engine.updates, unit=unit)

    def diverged(self, what: str, step: int) -> DivergedError:
        """Return the error that says what is not finite, in which tensor, and what to do.

        Args:
            what: is not finite, in a word.
            step: which one found it.
        """
        engine = self.engine
        weights = engine.trained
        bad = unsound(weights)
        where = f"weight {bad}" if bad else ""
        if not bad and (bad := unsound(engine.gradients)):
            where = f"gradient of {bad}"
        size, name = largest(weights)
        facts = [f"first in the {where}"] * bool(where)
        facts += [f"the largest weight is {size:.2g}, in {name}"] * math.isfinite(size)
        return DivergedError(
            f"step {step}: the {what} is not finite ({'; '.join(facts)}); the weights are as after "
            f"update {engine.updates}: lower the learning rate or set grad_clip"
        )
