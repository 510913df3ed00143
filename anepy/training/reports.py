"""What a training run tells about itself: per step, and in sum. No arithmetic on tensors."""

from __future__ import annotations

import math
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..engine.engine import StepStats

# Attributes of the engine's StepStats, in milliseconds, under the names reports use.
PHASES = {
    "forward": "forward_ms",
    "backward": "backward_ms",
    "device": "device_ms",
    "io": "io_ms",
    "classifier": "classifier_ms",
    "softmax": "softmax_ms",
    "norm": "norm_ms",
    "elementwise": "elementwise_ms",
    "dw": "dw_ms",
    "dw_wait": "dw_wait_ms",
}
LOSS_TAIL = 200


# Step times that go to the next process of a run: enough for quartiles, little for a file.
_TIMES_KEPT = 4096
# Losses of single sequences are noisy: first and last loss are means over up to this many steps.
_LOSS_WINDOW = 10


@dataclass(frozen=True)
class StepReport:
    """What one step did.

    Attributes:
        step: number of the step, from 1; `total` is the last one of the run.
        total: see `step`.
        loss: mean cross-entropy of this sequence, in nats per token.
        lr: learning rate of the update this step belongs to.
        ms_per_step: wall time of forward and backward; update and evaluation excluded.
        tokens_per_s: tokens of this step per second of that time.
        gflops: GFLOP/s of that time, by the formula of `flops_per_step`.
        updated: whether the weights were updated after this step.
        updates: updates done so far.
        accumulated: steps waiting for the next update.
        skipped: whether half-precision gradients overflowed and this step counts for nothing.
        loss_scale: factor on the gradients, 1 unless half precision needs one.
        grad_norm: global norm of the mean gradient; None unless an update computed it.
        update_ms: wall time of the update; 0 if there was none.
        compile_ms: wall time to compile programs for the new weights, not in `update_ms`.
        compiles: compilations so far, where weights are baked into programs.
        allocations: allocations of the step engine during this step.
        phases: busy time in ms by phase (keys of `PHASES`).
        held_out_loss: mean loss on held-out data after this step; None if not evaluated.
    """

    step: int
    total: int
    loss: float
    lr: float
    ms_per_step: float
    tokens_per_s: float
    gflops: float
    updated: bool
    updates: int
    accumulated: int
    skipped: bool
    loss_scale: float
    grad_norm: float | None
    update_ms: float
    compile_ms: float
    compiles: int
    allocations: int
    phases: Mapping[str, float]
    held_out_loss: float | None


@dataclass(frozen=True)
class Summary:
    """What a run did so far, from its start or resume.

    Attributes:
        step: last step done; `total` is the one the run stops at.
        total: see `step`.
        steps: steps done by this object.
        updates: updates done since the very first step.
        skipped: steps that counted for nothing (half-precision overflow).
        tokens: tokens trained on by this object.
        wall_s: seconds from the first step to the end of the last, everything included.
        train_ms: sum of step times.
        update_ms: mean time of an update; None if there was none.
        compile_ms: sum of the times to compile programs for new weights.
        ms_per_step: median step time; q1 and q3 are its quartiles.
        ms_q1: see `ms_per_step`.
        ms_q3: see `ms_per_step`.
        tokens_per_s: tokens per second of steps, updates and compiling together.
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
        peak: what `utilization` is a share of: `gflops` and `name`; None unless asked for
            (`with_peak`).
        utilization: share of the peak at the median step time, likewise.
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

    def with_peak(self, peak: Mapping[str, Any] | None) -> Summary:
        """Return the same with the peak of what the run was on (`bench.peaks.device_peak`)."""
        if peak is None or not self.steps:
            return self
        return replace(self, peak=peak, utilization=self.tflops * 1e3 / peak["gflops"])


class Measurements:
    """Add up what the steps of one run took.

    Args:
        tokens: tokens per step.
        flops: FLOPs per step.
        losses: last losses before a resume, oldest first.

    Attributes:
        losses: the last losses, oldest first.
        held_out_before: held-out loss before the first step, None until known.
        held_out_after: the latest one after it.
        compiles: compilations of earlier processes of this run.
        restarts: see `Summary`.
    """

    def __init__(self, tokens: int, flops: int, losses: Sequence[float] = ()) -> None:
        self.losses = [float(loss) for loss in losses[-LOSS_TAIL:]]
        self.held_out_before: float | None = None
        self.held_out_after: float | None = None
        self.compiles = 0
        self.restarts = 0
        self._tokens = tokens
        self._flops = flops
        self._started: float | None = None
        self._wall_s = 0.0
        self._step_ms = array("d")
        self._update_ms = array("d")
        self._compile_ms = 0.0
        self._phase_ms = dict.fromkeys(PHASES, 0.0)
        self._skipped = 0
        self._allocations = 0
        self._first_losses: list[float] = []
        self._warm = False
        self._steps = 0
        self._train_ms = 0.0
        self._updating_ms = 0.0
        self._peak_memory = 0

    def state(self, compiles: int) -> dict[str, Any]:
        """Return what the next process of this run needs to go on adding up.

        Args:
            compiles: compilations of this process.
        """
        return {
            "held_out_before": self.held_out_before,
            "held_out_after": self.held_out_after,
            "compiles": self.compiles + compiles,
            "restarts": self.restarts + 1,
            "started": self._started,
            "wall_s": self._wall_s,
            "step_ms": list(self._step_ms[-_TIMES_KEPT:]),
            "update_ms": list(self._update_ms[-_TIMES_KEPT:]),
            "compile_ms": self._compile_ms,
            "phase_ms": self._phase_ms,
            "skipped": self._skipped,
            "allocations": self._allocations,
            "first_losses": self._first_losses,
            "steps": self._steps,
            "train_ms": self._train_ms,
            "updating_ms": self._updating_ms,
            "peak_memory": self._largest_memory(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of an earlier process; its clock goes on as well."""
        self.held_out_before = state["held_out_before"]
        self.held_out_after = state["held_out_after"]
        self.compiles, self.restarts = state["compiles"], state["restarts"]
        self._started, self._wall_s = state["started"], state["wall_s"]
        self._step_ms = array("d", state["step_ms"])
        self._update_ms = array("d", state["update_ms"])
        self._compile_ms = state["compile_ms"]
        self._phase_ms = dict.fromkeys(PHASES, 0.0) | dict(state["phase_ms"])
        self._skipped, self._allocations = state["skipped"], state["allocations"]
        self._first_losses = list(state["first_losses"])
        self._steps, self._train_ms = state["steps"], state["train_ms"]
        self._updating_ms = state["updating_ms"]
        self._peak_memory = state["peak_memory"]

    def _largest_memory(self) -> int:
        return max(self._peak_memory, peak_memory())

    def start(self) -> None:
        """Start the clock; later calls do nothing."""
        if self._started is None:
            self._started = time.perf_counter()

    def step(self, ms: float, stats: StepStats) -> dict[str, float]:
        """Add a step and return its times by phase."""
        # The first step of a process allocates on purpose: buffers, worker threads.
        if self._warm:
            self._allocations = max(self._allocations, int(stats.allocations))
        self._warm = True
        self._steps += 1
        self._train_ms += ms
        self._step_ms.append(ms)
        phases = {name: float(getattr(stats, key)) for name, key in PHASES.items()}
        for name, value in phases.items():
            self._phase_ms[name] += value
        self._skipped += bool(stats.skipped)
        self.losses.append(float(stats.loss))
        del self.losses[:-LOSS_TAIL]
        if len(self._first_losses) < _LOSS_WINDOW:
            self._first_losses.append(float(stats.loss))
        return phases

    def update(self, ms: float, compile_ms: float) -> None:
        """Add an update."""
        self._update_ms.append(ms)
        self._updating_ms += ms
        self._compile_ms += compile_ms

    def stop(self) -> None:
        """Take the time at the end of a step."""
        if self._started is not None:
            self._wall_s = time.perf_counter() - self._started

    def summary(self, step: int, total: int, updates: int, compiles: int) -> Summary:
        """Return it all.

        Args:
            step: last step done; `total` is the one the run stops at.
            total: see `step`.
            updates: updates done since the very first step.
            compiles: compilations of this process.
        """
        steps = self._steps
        q1, median, q3 = (
            [float(value) for value in np.percentile(np.frombuffer(self._step_ms), [25, 50, 75])]
            if steps
            else [0.0] * 3
        )
        train_ms = self._train_ms
        busy_s = (train_ms + self._updating_ms + self._compile_ms) / 1e3
        few = min(_LOSS_WINDOW, max(1, steps // 2))
        last_losses = self.losses[-few:] if steps else []
        return Summary(
            step=step,
            total=total,
            steps=steps,
            updates=updates,
            skipped=self._skipped,
            tokens=steps * self._tokens,
            wall_s=self._wall_s,
            train_ms=train_ms,
            update_ms=_mean(self._update_ms),
            compile_ms=self._compile_ms,
            ms_per_step=median,
            ms_q1=q1,
            ms_q3=q3,
            tokens_per_s=steps * self._tokens / busy_s if busy_s else 0.0,
            tflops=self._flops / median / 1e9 if median else 0.0,
            phases={name: ms / max(1, steps) for name, ms in self._phase_ms.items()},
            allocations=self._allocations,
            compiles=self.compiles + compiles,
            restarts=self.restarts,
            peak_memory=self._largest_memory(),
            first_loss=_mean(self._first_losses[:few]),
            last_loss=_mean(last_losses),
            held_out_before=self.held_out_before,
            held_out_after=self.held_out_after,
        )


def peak_memory() -> int:
    """Return the largest resident size of this process in bytes, 0 where nobody tells."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
