"""What a training run tells about itself: per step, and in sum. No arithmetic on tensors."""

from __future__ import annotations

import math
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..engine.stats import PHASES, StepStats, UpdateStats

LOSS_TAIL = 200
# Step times that go to the next process of a run: enough for quartiles, little for a file.
_TIMES_KEPT = 4096
# Losses of single sequences are noisy: first and last loss are means over up to this many steps.
_LOSS_WINDOW = 10


@dataclass(frozen=True)
class Traffic:
    """What the ranks of a job communicated for an update, as rank 0 saw it.

    Attributes:
        nbytes: bytes it sent.
        busy_ms: time that this took it, in calls of MPI and additions.
        waited_ms: time that its step waited for it, after the backward pass.
    """

    nbytes: int
    busy_ms: float
    waited_ms: float

    @property
    def hidden(self) -> float:
        """Share of the time that lies behind the backward pass, 0 to 1."""
        return max(0.0, 1.0 - self.waited_ms / self.busy_ms) if self.busy_ms else 0.0


@dataclass(frozen=True)
class StepReport:
    """What one step of a run did.

    Attributes:
        step: number of the step, from 1.
        total: number of the last step of the run; 0 if time ends it.
        stats: what the engine says of the step.
        lr: learning rate of the update this step belongs to.
        ms_per_step: wall time of forward and backward; update and evaluation excluded.
        tokens_per_s: counted targets of this step per second of that time.
        gflops: GFLOP/s of that time, by the formula of `flops_per_step`.
        update: what the engine says of the update that followed; None if there was none.
        updates: updates done so far.
        accumulated: steps waiting for the next update.
        compiles: compilations so far, where weights are baked into programs.
        held_out_loss: mean loss on held-out data after this step; None if not evaluated.
        traffic: what several ranks communicated for the update; None if there was none.
    """

    step: int
    total: int
    stats: StepStats
    lr: float
    ms_per_step: float
    tokens_per_s: float
    gflops: float
    update: UpdateStats | None
    updates: int
    accumulated: int
    compiles: int
    held_out_loss: float | None
    traffic: Traffic | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the counted targets of the step in nats."""
        return self.stats.loss

    @property
    def phases(self) -> Mapping[str, float]:
        """Milliseconds by phase, under the keys of `anepy.engine.stats.PHASES`."""
        return self.stats.phases

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StepReport:
        """Return the report that `dataclasses.asdict` made a record of."""
        update = record["update"]
        nested = {
            "stats": StepStats(**record["stats"]),
            "update": None if update is None else UpdateStats(**update),
        }
        return cls(**{**record, **nested, "traffic": None})


@dataclass(frozen=True)
class Summary:
    """What a run did so far, from its start or resume.

    Attributes:
        step: last step done.
        total: the step the run stops at; 0 if time ends it.
        steps: steps done by this object.
        updates: updates done since the very first step.
        skipped: steps that counted for nothing (half-precision overflow).
        tokens: targets counted in the steps of this object.
        wall_s: seconds from the first step to the end of the last, everything included.
        train_ms: sum of step times.
        update_ms: mean time of an update; None if there was none.
        compile_ms: sum of the times to compile programs for new weights.
        ms_per_step: median step time.
        ms_q1: first quartile of the step times.
        ms_q3: third quartile of the step times.
        tokens_per_s: those per second of steps, updates and compiling together.
        tflops: TFLOP/s at the median step time.
        phases: mean busy time in ms per step, by phase.
        allocations: most allocations any step but the first made.
        compiles: compilations, where weights are baked into programs.
        restarts: how often the run went on in a new process, because one had compiled enough.
        peak_memory: largest resident size of the process in bytes; 0 if unknown.
        first_loss: mean training loss of the first steps; None before the first step.
        last_loss: mean training loss of the last steps.
        held_out_before: held-out loss before the first step; None without held-out data.
        held_out_after: held-out loss after the last evaluation.
        peak: what `utilization` is a share of: `gflops` and `name`; None before `with_peak`.
        utilization: share of the peak at the median step time, 0 to 1; None before `with_peak`.
        ranks: of several processes: `tokens_per_s` of each, one after the other, in steps;
            `nbytes` that rank 0 sent per update; `communicating`, the share of the wall time
            that this took, and `hidden`, the share of that behind backward passes. None: one.
    """

    step: int
    total: int
    steps: int
    updates: int
    skipped: int
    tokens: int
    wall_s: float
    train_ms: float
    update_ms: float | None
    compile_ms: float
    ms_per_step: float
    ms_q1: float
    ms_q3: float
    tokens_per_s: float
    tflops: float
    phases: Mapping[str, float]
    allocations: int
    compiles: int
    restarts: int
    peak_memory: int
    first_loss: float | None
    last_loss: float | None
    held_out_before: float | None
    held_out_after: float | None
    peak: Mapping[str, Any] | None = None
    utilization: float | None = None
    ranks: Mapping[str, Any] | None = None

    def with_peak(self, peak: Mapping[str, Any] | None) -> Summary:
        """Return a summary with `peak`, of `bench.peaks.device_peak`, and `utilization`."""
        if peak is None or not self.steps:
            return self
        return replace(self, peak=peak, utilization=self.tflops * 1e3 / peak["gflops"])


@dataclass
class Sums:
    """What the steps of a run add up to: all that its next process needs to go on adding.

    Attributes:
        held_out_before: held-out loss before the first step; None until known.
        held_out_after: the latest one after it.
        compiles: compilations of earlier processes of this run.
        restarts: how many of them there were.
        started: `time.perf_counter` at the first step, which all processes of a machine share.
        wall_s: seconds from then to the end of the last step.
        step_ms: times of the last steps.
        update_ms: times of the last updates.
        compile_ms: sum of the times to compile programs for new weights.
        phase_ms: sums by phase.
        skipped: steps that counted for nothing.
        allocations: most allocations any step but the first made.
        first_losses: losses of the first steps.
        steps: how many there were.
        tokens: targets counted in them.
        train_ms: sum of their times.
        updating_ms: sum of the times of updates.
        peak_memory: largest resident size of an earlier process, in bytes.
        rank_tokens: targets counted by each of several ranks.
        rank_ms: the time of its steps.
        traffic: bytes, busy and waited milliseconds, and number of their reductions.
    """

    held_out_before: float | None = None
    held_out_after: float | None = None
    compiles: int = 0
    restarts: int = 0
    started: float | None = None
    wall_s: float = 0.0
    step_ms: array[float] = field(default_factory=lambda: array("d"))
    update_ms: array[float] = field(default_factory=lambda: array("d"))
    compile_ms: float = 0.0
    phase_ms: dict[str, float] = field(default_factory=dict)
    skipped: int = 0
    allocations: int = 0
    first_losses: list[float] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    train_ms: float = 0.0
    updating_ms: float = 0.0
    peak_memory: int = 0
    rank_tokens: list[float] = field(default_factory=list)
    rank_ms: list[float] = field(default_factory=list)
    traffic: list[float] = field(default_factory=lambda: [0.0] * 4)


class Measurements:
    """Add up what the steps of one run took.

    Args:
        flops: FLOPs per step.
        losses: last losses before a resume, oldest first.

    Attributes:
        losses: the last losses, oldest first.
        sums: everything else.
    """

    def __init__(self, flops: int, losses: Sequence[float] = ()) -> None:
        self.losses = [float(loss) for loss in losses[-LOSS_TAIL:]]
        self.sums = Sums()
        self._flops = flops
        self._warm = False

    def state(self, compiles: int) -> dict[str, Any]:
        """Return what the next process of this run passes to `restore`, as JSON can hold it.

        Args:
            compiles: compilations of this process.
        """
        sums = self.sums
        return asdict(sums) | {
            "compiles": sums.compiles + compiles,
            "restarts": sums.restarts + 1,
            "step_ms": list(sums.step_ms[-_TIMES_KEPT:]),
            "update_ms": list(sums.update_ms[-_TIMES_KEPT:]),
            "peak_memory": self._largest_memory(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of an earlier process; its clock goes on as well."""
        times = {name: array("d", state[name]) for name in ("step_ms", "update_ms")}
        self.sums = Sums(**{**state, **times})

    def _largest_memory(self) -> int:
        return max(self.sums.peak_memory, peak_memory())

    def start(self) -> None:
        """Start the clock; later calls do nothing."""
        if self.sums.started is None:
            self.sums.started = time.perf_counter()

    def minutes_over(self, minutes: float | None) -> bool:
        """Return whether so many minutes have passed since the first step; None never pass."""
        started = self.sums.started
        return (
            minutes is not None
            and started is not None
            and time.perf_counter() - started >= 60 * minutes
        )

    def add_step(self, ms: float, stats: StepStats) -> None:
        """Add a step that took so long."""
        sums = self.sums
        # The first step of a process allocates on purpose: buffers, worker threads.
        if self._warm:
            sums.allocations = max(sums.allocations, stats.allocations)
        self._warm = True
        sums.steps += 1
        sums.tokens += stats.tokens
        sums.train_ms += ms
        sums.step_ms.append(ms)
        for key, value in stats.phases.items():
            sums.phase_ms[key] = sums.phase_ms.get(key, 0.0) + value
        sums.skipped += stats.skipped
        self.losses.append(stats.loss)
        del self.losses[:-LOSS_TAIL]
        if len(sums.first_losses) < _LOSS_WINDOW:
            sums.first_losses.append(stats.loss)

    def add_ranks(self, tokens: Sequence[float], ms: Sequence[float]) -> None:
        """Add what each rank counted in a step, and the time it took."""
        sums = self.sums
        nothing = [0.0] * len(ms)
        sums.rank_tokens = _added(sums.rank_tokens or nothing, tokens)
        sums.rank_ms = _added(sums.rank_ms or nothing, ms)

    def add_traffic(self, traffic: Traffic) -> None:
        """Add a reduction."""
        figures = (traffic.nbytes, traffic.busy_ms, traffic.waited_ms, 1)
        self.sums.traffic = _added(self.sums.traffic, figures)

    def _ranks(self) -> dict[str, Any] | None:
        sums = self.sums
        if not sums.rank_ms:
            return None
        nbytes, busy, waited, count = sums.traffic
        speeds = zip(sums.rank_tokens, sums.rank_ms, strict=True)
        return {
            "tokens_per_s": [1e3 * n / ms if ms else 0.0 for n, ms in speeds],
            "nbytes": nbytes / max(1, count),
            "communicating": busy / 1e3 / sums.wall_s if sums.wall_s else 0.0,
            "hidden": Traffic(0, busy, waited).hidden,
        }

    def add_update(self, stats: UpdateStats) -> None:
        """Add an update."""
        self.sums.update_ms.append(stats.update_ms)
        self.sums.updating_ms += stats.update_ms
        self.sums.compile_ms += stats.compile_ms

    def stop(self) -> None:
        """Take the time at the end of a step."""
        if self.sums.started is not None:
            self.sums.wall_s = time.perf_counter() - self.sums.started

    def summary(self, step: int, total: int, updates: int, compiles: int) -> Summary:
        """Return what all steps so far come to.

        Args:
            step: last step done.
            total: the step the run stops at.
            updates: updates done since the very first step.
            compiles: compilations of this process.
        """
        sums, steps = self.sums, self.sums.steps
        q1, median, q3 = (
            [float(value) for value in np.percentile(np.frombuffer(sums.step_ms), [25, 50, 75])]
            if steps
            else [0.0] * 3
        )
        busy_s = (sums.train_ms + sums.updating_ms + sums.compile_ms) / 1e3
        few = min(_LOSS_WINDOW, max(1, steps // 2))
        last_losses = self.losses[-few:] if steps else []
        return Summary(
            step=step,
            total=total,
            steps=steps,
            updates=updates,
            skipped=sums.skipped,
            tokens=sums.tokens,
            wall_s=sums.wall_s,
            train_ms=sums.train_ms,
            update_ms=_mean(sums.update_ms),
            compile_ms=sums.compile_ms,
            ms_per_step=median,
            ms_q1=q1,
            ms_q3=q3,
            tokens_per_s=sums.tokens / busy_s if busy_s else 0.0,
            tflops=self._flops / median / 1e9 if median else 0.0,
            phases={
                phase.key: sums.phase_ms.get(phase.key, 0.0) / max(1, steps) for phase in PHASES
            },
            allocations=sums.allocations,
            compiles=sums.compiles + compiles,
            restarts=sums.restarts,
            peak_memory=self._largest_memory(),
            first_loss=_mean(sums.first_losses[:few]),
            last_loss=_mean(last_losses),
            held_out_before=sums.held_out_before,
            held_out_after=sums.held_out_after,
            ranks=self._ranks(),
        )


def peak_memory() -> int:
    """Return the largest resident size of this process in bytes, 0 where nobody tells."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _added(sums: Sequence[float], values: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(sums, values, strict=True)]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
