"""What `anepy compare` measured, and what follows from it: plain data, no engine, no terminal.

A `Comparison` holds every raw sample; medians, ratios, intervals and agreement are computed from
them when asked for, so a file that was read back says exactly what the first run said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..engine.stats import PART, PHASES
from .config import CompareConfig
from .estimates import (
    LOSS_TOLERANCE,
    LOSS_WINDOW,
    Agreement,
    Ratio,
    Spread,
    agreement,
    paired_ratio,
    spread,
    unpaired_ratio,
)

# Settings that change what is computed; where and how fast is told by the others.
_MATHEMATICAL = sorted(
    set(CompareConfig.__dataclass_fields__)
    - {"rounds", "seq", "device", "precision", "threads", "ablate"}
)


@dataclass
class Run:
    """One variant in one group: every sample of it.

    Attributes:
        label: unique within a comparison, except for the reference of several groups.
        variant: as it was asked for.
        switches: what that stands for here.
        memory: bytes of weights, gradients, moments and engine; 0 if it never started.
        steps: column -> values, one per step. `round` (-1 in the warm-up), `wall_ms` of the call,
            and every number of `StepStats`.
        updates: column -> values, one per update: `round`, `wall_ms` of the call, and every number
            of `UpdateStats`.
        rounds: timed rounds completed.
        error: why it ended early, empty if it did not.
    """

    label: str
    variant: str
    switches: list[str] = field(default_factory=list)
    memory: int = 0
    steps: dict[str, list[float]] = field(default_factory=dict)
    updates: dict[str, list[float]] = field(default_factory=dict)
    rounds: int = 0
    error: str = ""

    def timed(self, name: str) -> list[float]:
        """Return a column of `steps` without the warm-up and an incomplete last round."""
        return _within(self.steps, name, self.rounds)

    def timed_updates(self, name: str) -> list[float]:
        """Return a column of `updates` without the warm-up and an incomplete last round."""
        return _within(self.updates, name, self.rounds)

    def by_round(self, what: str) -> list[float]:
        """Return one figure per completed round, in ms.

        Args:
            what: "per_step", updates and compiling included; "step", the median of forward and
                backward; or "update", the mean of an update without compiling.
        """
        steps, walls = self._rounds(self.steps, "step_ms"), self._rounds(self.steps, "wall_ms")
        if what == "step":
            return [statistics.median(values) for values in steps]
        updates = self._rounds(self.updates, "wall_ms")
        if what == "update":
            compiling = self._rounds(self.updates, "compile_ms")
            pairs = zip(updates, compiling, strict=True)
            return [(sum(wall) - sum(ms)) / len(wall) for wall, ms in pairs if wall]
        pairs = zip(walls, updates, strict=True)
        return [(sum(wall) + sum(update)) / len(wall) for wall, update in pairs]

    def _rounds(self, table: Mapping[str, Sequence[float]], name: str) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in range(self.rounds)]
        for number, value in zip(table.get("round", ()), table.get(name, ()), strict=True):
            if 0 <= number < self.rounds:
                found[int(number)].append(value)
        return found


def _within(table: Mapping[str, Sequence[float]], name: str, rounds: int) -> list[float]:
    if name not in table:
        return []
    pairs = zip(table["round"], table[name], strict=True)
    return [value for number, value in pairs if 0 <= number < rounds]


@dataclass
class Group:
    """Variants that took turns; the first is what the others are compared with.

    Attributes:
        runs: the reference, then the others.
        orders: for every round begun, the runs in the order of their turns.
    """

    runs: list[Run]
    orders: list[list[int]] = field(default_factory=list)


@dataclass
class Ablation:
    """A switch by itself.

    Attributes:
        switch: its name.
        form: "add" (to the baseline) or "leave out" (of the fullest variant).
        reference: label of the run it is compared with.
        label: of the run with or without the switch; empty if there is none.
        reason: why there is none.
    """

    switch: str
    form: str
    reference: str
    label: str
    reason: str = ""


@dataclass
class Comparison:
    """A whole comparison.

    Attributes:
        created: when it began, UTC, like 2026-01-31T12:00:00+00:00.
        command: the exact command, empty from Python.
        anepy: version.
        machine: system, processor, cpus, memory; on a Mac also macos, macos_build, model.
        library: `anepy.native.info.library_facts()`.
        engine: device, precision, isa, threads, seq.
        model: name, parameters, shape.
        data: name, tokens.
        settings: of `CompareConfig`.
        peak: GFLOP/s that utilization refers to and its name; None where there is none.
        columns: labels of the variants asked for, in that order.
        refused: variant -> why it cannot run on this device.
        groups: what was measured.
        ablation: a row for every switch, two where it is both added and left out.
        notes: things to know, one line each.
        interrupted: stopped before its end.
    """

    created: str
    command: list[str]
    anepy: str
    machine: dict[str, Any]
    library: dict[str, Any]
    engine: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    settings: dict[str, Any]
    peak: dict[str, Any] | None
    columns: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)
    ablation: list[Ablation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    def runs(self, label: str) -> list[Run]:
        """Return what was measured under a label: several runs for a reference of groups."""
        return [run for group in self.groups for run in group.runs if run.label == label]

    def ratio(self, label: str, reference: str, what: str = "per_step") -> Ratio | None:
        """Return a time relative to the reference's: "per_step", "step" or "update".

        From rounds they shared if they were in one group, else from all their rounds.
        """
        for group in self.groups:
            of = {run.label: run for run in group.runs}
            if label in of and reference in of:
                sides = of[reference].by_round(what), of[label].by_round(what)
                return paired_ratio(*sides, self.settings["seed"])
        sides = self._by_round(reference, what), self._by_round(label, what)
        return unpaired_ratio(*sides, self.settings["seed"])

    def _by_round(self, label: str, what: str) -> list[float]:
        return [ms for run in self.runs(label) for ms in run.by_round(what)]

    def setting(self, name: str) -> Any:
        """Return a setting; its default where the file is of a time that did not have it."""
        return self.settings.get(name, getattr(CompareConfig, name))

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return int(self.setting("batch") * self.engine["seq"])

    def tolerance(self) -> float:
        """Return how far loss curves may be apart in this precision."""
        return LOSS_TOLERANCE[self.engine["precision"]]

    def summary(self, label: str) -> Measured:
        """Return what the samples of a label say: of the first group, if it was in several."""
        run = next(iter(self.runs(label)), None)
        return Measured.of(run or Run(label, label), self.peak, self.tokens)

    def failures(self) -> Iterator[Run]:
        """Yield the runs that ended early."""
        return (run for group in self.groups for run in group.runs if run.error)


@dataclass(frozen=True)
class Measured:
    """What the timed samples of one variant say; times in ms.

    Attributes:
        per_step: time per step with updates and compiling, over rounds.
        step: forward and backward, over steps.
        phases: time of each phase over steps, by its title in `anepy.PHASES`.
        means: mean time per step of the phases that are parts of it, and of "other", the rest;
            together the mean time of a step.
        update: time of an update, without compiling, over updates.
        compile: time to compile programs after an update, over updates; None if none was.
        update_share: mean time of updates per step, without compiling.
        compile_share: mean time of compiling per step.
        tokens_per_s: tokens per second at the median time per step; None without one.
        tflops: 10^12 operations per second at the median step, counted as in
            docs/neural-engine.md#flops.
        utilization: share of the peak at the median step; None without a peak.
        allocations: most heap operations of a timed step.
        memory: bytes.
        losses: of every step, the warm-up first.
        final_loss: mean of the last ten of complete rounds.
        skipped: steps whose gradients overflowed.
        rounds: completed.
    """

    per_step: Spread | None
    step: Spread | None
    phases: Mapping[str, Spread]
    means: Mapping[str, float]
    update: Spread | None
    compile: Spread | None
    update_share: float
    compile_share: float
    tokens_per_s: float | None
    tflops: float | None
    utilization: float | None
    allocations: int | None
    memory: int
    losses: Sequence[float]
    final_loss: float | None
    skipped: int
    rounds: int

    @classmethod
    def of(cls, run: Run, peak: Mapping[str, Any] | None, tokens: int) -> Measured:
        """Sum up the samples of a run.

        Args:
            run: the samples.
            peak: what utilization refers to, if anything.
            tokens: of a step.
        """
        column = run.timed
        phases = [(phase.title, spread(column(phase.field))) for phase in PHASES]
        step_ms = column("step_ms")
        count = max(1, len(step_ms))
        step = spread(step_ms)
        means = {
            phase.title: math.fsum(column(phase.field)) / count
            for phase in PHASES
            if phase.kind == PART and column(phase.field)
        }
        if step is not None:
            means["other"] = max(0.0, math.fsum(step_ms) / count - math.fsum(means.values()))
        # A device that reads weights in place takes a microsecond to find that out.
        compiles = [ms if ms >= 0.05 else 0.0 for ms in run.timed_updates("compile_ms")]
        walls = run.timed_updates("wall_ms")
        updates = [wall - ms for wall, ms in zip(walls, compiles, strict=True)]
        flops = column("flops")
        tflops = flops[0] / step.median / 1e9 if step and flops else None
        utilization = tflops * 1e3 / peak["gflops"] if tflops and peak else None
        allocations = column("allocations")
        losses = list(run.steps.get("loss", ()))
        last = column("loss")[-LOSS_WINDOW:]
        per_step = spread(run.by_round("per_step"))
        return cls(
            per_step=per_step,
            step=step,
            phases={title: found for title, found in phases if found is not None},
            means=means,
            update=spread(updates),
            compile=spread(compiles) if any(compiles) else None,
            update_share=math.fsum(updates) / count,
            compile_share=math.fsum(compiles) / count,
            tokens_per_s=tokens / per_step.median * 1e3 if per_step else None,
            tflops=tflops,
            utilization=utilization,
            allocations=int(max(allocations)) if allocations else None,
            memory=run.memory,
            losses=losses,
            final_loss=float(np.mean(last)) if last else None,
            skipped=int(sum(run.steps.get("skipped", ()))),
            rounds=run.rounds,
        )


@dataclass(frozen=True)
class Column:
    """One variant of one comparison, as tables and charts show it.

    Attributes:
        title: what it is called there.
        comparison: where it was measured.
        label: its name there.
        measured: what its samples say.
    """

    title: str
    comparison: Comparison
    label: str
    measured: Measured

    def ratio(self, reference: Column, what: str = "per_step") -> Ratio | None:
        """Return a time relative to another column's; None if the two had other work to do."""
        here, there = self.comparison, reference.comparison
        if here is there:
            return here.ratio(self.label, reference.label, what)
        if not same_load(here, there):
            return None
        sides = there._by_round(reference.label, what), here._by_round(self.label, what)
        return unpaired_ratio(*sides, here.settings["seed"])

    def agreement(self, reference: Column) -> Agreement | None:
        """Return whether the losses agree; None if they are of different work."""
        if not same_work(reference.comparison, self.comparison):
            return None
        tolerance = max(reference.comparison.tolerance(), self.comparison.tolerance())
        return agreement(reference.measured.losses, self.measured.losses, tolerance)


def same_load(a: Comparison, b: Comparison) -> bool:
    """Say whether two comparisons ask the same of a machine: model shape, tokens, updates."""
    return (
        a.model["shape"] == b.model["shape"]
        and a.engine["seq"] == b.engine["seq"]
        and all(a.setting(key) == b.setting(key) for key in ("steps", "batch", "accum"))
    )


def same_work(a: Comparison, b: Comparison) -> bool:
    """Say whether two comparisons trained the same model on the same data in the same way."""
    # A schedule ends with the last round.
    ends = a.setting("schedule") == "constant" or a.setting("rounds") == b.setting("rounds")
    return (
        same_load(a, b)
        and ends
        and all(a.setting(key) == b.setting(key) for key in _MATHEMATICAL)
        and a.model == b.model
        and a.data == b.data
    )


def columns(named: Sequence[tuple[str, Comparison]]) -> list[Column]:
    """List the variants of one comparison, or of several under their names."""
    return [
        Column(
            title=label if len(named) == 1 else f"{name}: {label}",
            comparison=comparison,
            label=label,
            measured=comparison.summary(label),
        )
        for name, comparison in named
        for label in comparison.columns
    ]
