"""The loop of one rank among others: its share of the windows, and updates that all make alike."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.engine import Engine
from ..engine.shared import SharedEngine
from ..engine.stats import StepStats, UpdateStats
from ..models.views import Array, Tensors
from ..text.data import Sampler, TokenData
from .config import TrainConfig
from .exchange import Exchange, Sum
from .loop import Loop
from .ranks import Job, Ranks
from .reports import Traffic


@dataclass(frozen=True)
class _Early:
    """A reduction that began before its last step; with what that left out of the embedding."""

    job: Job[Sum]
    scale: float
    ids: npt.NDArray[np.int32] | None


class ParallelLoop(Loop):
    """Steps and updates of all ranks as one.

    A step is `batch` windows on every rank. They are those that one process would draw with as many
    times the `batch`, in this order; so is the state of the sampler that a checkpoint keeps.

    Attributes:
        signal: number of the signal that asked some rank to stop; 0: none did.
        minutes_over: whether rank 0 found that time is over.
        clock: its `time.monotonic` at the end of the last step; 0 before the first.
        traffic: of the last reduction; None before the first.
        shares: of the last step, targets counted by each rank and the milliseconds it took.
    """

    def __init__(
        self, engine: SharedEngine, sampler: Sampler, config: TrainConfig, ranks: Ranks
    ) -> None:
        super().__init__(engine, sampler, config)
        self.ranks = ranks
        self.shared = engine
        self.exchange = Exchange(ranks, engine, config.wire, config.shard)
        self._accumulated = 0
        self._early: _Early | None = None
        self.signal = 0
        self.minutes_over, self.clock = False, 0.0
        self.traffic: Traffic | None = None
        self.shares: tuple[list[float], list[float]] = [], []
        self.asked: Callable[[], int] = lambda: 0
        self.late: Callable[[], bool] = lambda: False
        self._total = config.steps

    @property
    def accumulated(self) -> int:
        """Steps since the last update, of the rank that skipped the fewest."""
        return self._accumulated

    def step(self) -> tuple[StepStats, float]:
        """Make the share of this rank in a step; the figures are those of all.

        Raises:
            DivergedError: a loss is not finite on some rank; raised on all.
            NativeError: the step was not done here; the job cannot go on.
        """
        config, engine, ranks = self.config, self.shared, self.ranks
        self.sampler.skip(ranks.rank * config.batch)
        tokens, targets, *starts = self._batch()
        self.sampler.skip((ranks.size - 1 - ranks.rank) * config.batch)
        counted = int(np.count_nonzero(targets >= 0))
        last = self.accumulated + 1 >= config.accum or self.steps + 1 >= self._total
        self._early = self._begin(counted, tokens) if last else None
        began = time.perf_counter()
        stats = engine.step(tokens, targets, *starts)
        wall_ms = (time.perf_counter() - began) * 1e3
        bad = 0.0
        if not math.isfinite(stats.loss):
            bad = 1.0
        elif stats.skipped and stats.loss_scale <= 1:
            bad = 2.0
        told = ranks.gather(
            "step",
            [stats.tokens, 0.0 if bad else stats.loss * stats.tokens, stats.skipped, bad,
             self.asked(), self.late(), engine.accumulated, wall_ms, time.monotonic()],
        )  # fmt: skip
        total, loss, skipped, worst, signals, late, accumulated, times, clocks = told.T[:9]
        self.clock = float(clocks[0])
        self.signal, self.minutes_over = int(signals.max()), bool(late[0])
        self._accumulated = int(accumulated.max())
        self.shares = total.tolist(), times.tolist()
        if worst.any():
            at = int(np.argmax(worst > 0))
            raise self.diverged(
                f"{'loss' if worst[at] == 1 else 'gradient'} of {ranks.name(at)}", self.steps + 1
            )
        self.steps += 1
        mean = math.fsum(loss.tolist()) / float(total.sum())
        return replace(
            stats, loss=mean, tokens=int(total.sum()), skipped=bool(skipped.any())
        ), wall_ms

    def _begin(self, counted: int, tokens: npt.NDArray[np.int32]) -> _Early | None:
        """Start the reduction before the step that ends an accumulation, where that is possible."""
        engine = self.shared
        if engine.precision == "fp16" or (engine.accumulated and not engine.counted):
            return None  # whether a step is skipped is known at its end only
        scale = engine.loss_scale / (engine.unit if engine.counted else counted)
        held = self.exchange.holds(*tokens.shape)
        job = self.exchange.begin(engine.counted + counted, scale, engine.ready.steps, held)
        return _Early(job, scale, tokens.reshape(-1)[-held:] if held else None)

    def update(self, last: bool) -> tuple[UpdateStats, float] | None:
        """Sum the gradients of all ranks and update the weights, as `Loop.update` says.

        Returns:
            None also where all ranks skip the update, because the steps of one were skipped.

        Raises:
            DivergedError: a gradient is not finite; the weights are those of the last update.
        """
        config, engine, exchange = self.config, self.shared, self.exchange
        if not self.accumulated or (self.accumulated < config.accum and not last):
            return None
        began = time.perf_counter()
        if self._early is not None:
            early, self._early = self._early, None
            total = early.job.wait()
            if early.ids is not None:
                exchange.add_held(total, early.ids, early.scale)
        else:
            scale = engine.gradient_scale if engine.counted or engine.precision == "fp16" else 0.0
            lost = engine.precision == "fp16" and not engine.counted
            told = self.ranks.gather("update", [lost, scale])
            if told[:, 0].any():
                engine.join(0, float(min(told[:, 1])), reduced=False)
                engine.update(**config.update_options(engine.updates))
                self._accumulated = 0
                return None
            total = exchange.begin(engine.counted, scale, None).wait()
        squares = exchange.settle(total)
        waited = time.perf_counter() - began
        engine.join(total.counted, total.scale, reduced=True)
        stats = engine.update_joined(config.update_options(engine.updates), squares)
        if stats.skipped:
            raise self.diverged("gradient", self.steps)
        self._accumulated = 0
        if exchange.shard:
            gathering = time.perf_counter()
            total.nbytes += exchange.gather_weights()
            waited += time.perf_counter() - gathering
            total.busy += time.perf_counter() - gathering
        self.traffic = Traffic(total.nbytes, total.busy * 1e3, waited * 1e3)
        return stats, (time.perf_counter() - began) * 1e3

    # For checkpoints

    def all_moments(self) -> tuple[Tensors, Tensors]:
        """Return where to load both moments to: with `shard`, memory for all of them."""
        m, v = self.shared.moment_arenas
        if self.exchange.shard:
            m, v = np.zeros_like(m), np.zeros_like(v)
        return self._named(m, v)

    def restored(self, accumulated: int, m: Tensors, v: Tensors) -> None:
        """Go on after the engine was restored, on all ranks, with what a checkpoint holds.

        Gradients that had been accumulated are those of all ranks: rank 0 keeps them.

        Args:
            accumulated: steps they are of.
            m: both moments, as `all_moments` returned them.
            v: the second.
        """
        engine = self.shared
        self._accumulated = accumulated
        if self.exchange.shard:
            self.exchange.take_moments(m, v)
        if accumulated and not self.ranks.first:
            scaling = engine.loss_scale, engine.clean_steps
            engine.restore(0, engine.updates, *scaling, unit=engine.unit)
            engine.arena.fill(0.0)

    def _named(self, m: Array, v: Array) -> tuple[Tensors, Tensors]:
        engine = self.shared
        return engine.named(m, engine.adam_m), engine.named(v, engine.adam_v)

    def moments(self) -> tuple[Tensors, Tensors]:
        """Return both moments of all ranks, on rank 0."""
        m, v = self.exchange.gather_moments()
        return self._named(m, v)

    def gathered(self) -> tuple[int, float, Tensors]:
        """Return the gradients that wait for an update, of all ranks, on rank 0.

        Returns:
            The targets they are the sum over, the `unit` they have, and they.
        """
        engine = self.shared
        scale = engine.gradient_scale if engine.counted else 0.0
        job = self.ranks.post(self.exchange.copies(engine.counted, scale))
        counted, joint, gradients = job.wait()
        return counted, engine.loss_scale / joint, engine.named(gradients, engine.adam_m)


def alike(
    engine: Engine, held_out: TokenData | None, settings: Mapping[str, Any]
) -> dict[str, str]:
    """Return what all ranks must have alike, each as a short text.

    Args:
        engine: that of this rank.
        held_out: what it evaluates on.
        settings: of its run.
    """
    own = ("threads", "isa", "switches")  # may be another one on each
    found = {name: str(value) for name, value in settings.items() if name not in own}
    data = settings["data"]
    found["data"] = f"{data['tokens']} tokens, CRC {data['crc32']}"
    weights = zlib.crc32(engine.model.arena.data)
    if engine.lora is not None:
        weights = zlib.crc32(engine.lora.arena.data, weights)
    found["weights"] = f"CRC {weights:08x}"
    if held_out is not None:
        crc = zlib.crc32(np.ascontiguousarray(held_out.tokens).data.cast("B"))
        found["held-out data"] = f"{len(held_out)} tokens, CRC {crc:08x}"
    return found
