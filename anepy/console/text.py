"""The words and figures of the display: formatting only, no terminal."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..system.words import engine_text, milliseconds, perplexity, quantity
from ..training.config import ENDLESS
from ..training.reports import Summary

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-=+*#@"
_OPTIMIZERS = {"adamw": "AdamW", "lion": "Lion", "sgd": "SGD", "muon": "Muon"}
RECOMPUTE = ("recompute", "activations of a layer are computed again from its input")


@dataclass(frozen=True)
class Header:
    """What a run is about to do.

    Attributes:
        model: name of the model.
        shape: `dim`, `hidden_dim`, … of the model.
        parameters: number of weights.
        embedding: number of weights in the embedding.
        trained: what is trained, in words; "" if everything is.
        data: name and size of the data in words.
        settings: effective settings of the run, `seq` filled in.
        engine: device, precision, variant, switches, isa, threads.
        flops: FLOPs per step by part.
        start: steps done before this run; 0 unless it is resumed.
        losses: the last losses up to there, oldest first.
        notes: things to know, one line each.
        outputs: label -> file that will be written.
    """

    model: str
    shape: Mapping[str, Any]
    parameters: int
    embedding: int
    data: str
    settings: Mapping[str, Any]
    engine: Mapping[str, Any]
    flops: Mapping[str, int]
    trained: str = ""
    start: int = 0
    losses: Sequence[float] = ()
    notes: Sequence[str] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)


class History:
    """A bounded record of a long series: when full, neighbours are averaged.

    Args:
        limit: most values kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values: list[float] = []
        self._per_value = 1
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        """Add one value; non-finite ones are left out."""
        if not math.isfinite(value):
            return
        self._sum += value
        self._count += 1
        if self._count == self._per_value:
            self._values.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0
            if len(self._values) >= self._limit:
                pairs = zip(self._values[::2], self._values[1::2], strict=True)
                self._values = [(a + b) / 2 for a, b in pairs]
                self._per_value *= 2

    def values(self) -> list[float]:
        """Return the record, oldest first."""
        pending = [self._sum / self._count] if self._count else []
        return self._values + pending


def sparkline(values: Sequence[float], width: int, ascii_only: bool = False) -> str:
    """Draw a series as one line of bars, the whole series in the given width.

    Args:
        values: finite numbers, oldest first.
        width: most characters to use; a shorter series uses one per value.
        ascii_only: for terminals without block characters.
    """
    if not values or width < 1:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * i // columns for i in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    bars = _ASCII_BARS if ascii_only else _BARS
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    return "".join(bars[round((mean - low) * scale)] for mean in means)


def header_rows(header: Header) -> list[tuple[str, str]]:
    """Put the settings of a run into labelled lines."""
    shape, settings = header.shape, header.settings
    heads = f"{shape['n_heads']} heads"
    if shape["n_kv_heads"] != shape["n_heads"]:
        heads += f" ({shape['n_kv_heads']} KV)"
    rows = [
        ("model", f"{header.model}, {quantity(header.parameters)} parameters"),
        (
            "shape",
            f"{shape['n_layers']} layers, dim {shape['dim']}, hidden {shape['hidden_dim']}, "
            f"{heads}, vocabulary {shape['vocab_size']:,}",
        ),
        ("data", header.data),
        ("engine", engine_text(header.engine)),
        ("variant", variant_text(header.engine)),
        *([RECOMPUTE] if settings.get("recompute") else []),
        ("run", run_text(settings)),
        ("optimizer", f"{optimizer_text(settings)}, lr {settings['lr']:g}"),
    ]
    if header.trained:
        rows.append(("trains", header.trained))
    if header.start:
        rows.append(("resumed", f"at step {header.start:,}"))
    rows.extend(header.outputs.items())
    return rows


def variant_text(engine: Mapping[str, Any]) -> str:
    """Name a variant and its switches, and say so where steps use weights that are not the last."""
    switches = ", ".join(engine["switches"]) or "no switches"
    lag = engine.get("gradients_lag")
    note = " (gradients belong to the weights one update earlier)" if lag else ""
    return f"{engine['variant']}: {switches}{note}"


def run_text(settings: Mapping[str, Any]) -> str:
    """Say how many steps a run has, of what, and how many updates they are."""
    steps, accum = settings["steps"], settings["accum"]
    updates = -(-steps // accum)
    each = "after each" if accum == 1 else f"every {accum}"
    if endless(settings):
        return (
            f"{settings['minutes']:g} minutes of steps{batch_text(settings)} of {settings['seq']} "
            f"tokens, an update {each}"
        )
    return (
        f"{steps:,} step{'s' * (steps != 1)}{batch_text(settings)} of {settings['seq']} tokens, an "
        f"update {each}: {updates:,} update{'s' * (updates != 1)}"
    )


def endless(settings: Mapping[str, Any]) -> bool:
    """Say whether time ends a run, not a number of steps."""
    return bool(settings["steps"] >= ENDLESS)


def batch_text(settings: Mapping[str, Any]) -> str:
    """Say how many sequences a step has, if not one."""
    count = settings.get("batch", 1)
    return "" if count == 1 else f" of {count} sequences"


def optimizer_text(settings: Mapping[str, Any]) -> str:
    """Describe the optimizer's settings that are not at their plainest."""
    optimizer = settings.get("optimizer", "adamw")
    parts = [_OPTIMIZERS.get(optimizer, optimizer)]
    betas = (settings["beta1"], settings["beta2"])
    if optimizer == "muon":
        parts.append(f"matrices lr {settings['matrix_lr']:g}")
    if optimizer in ("sgd", "muon"):
        parts.append(f"momentum {settings['momentum']:g}")
    if settings.get("moments", "f32") != "f32":
        parts.append(f"moments in {settings['moments']}")
    if betas != (0.9, 0.999):
        parts.append("betas {:g} and {:g}".format(*betas))
    if settings["weight_decay"]:
        parts.append(f"weight decay {settings['weight_decay']:g}")
    if settings["grad_clip"] is not None:
        parts.append(f"clip {settings['grad_clip']:g}")
    if settings["warmup"]:
        parts.append(f"warm-up {settings['warmup']} updates")
    parts.append(f"{settings['schedule']} rate")
    return ", ".join(parts)


def summary_rows(summary: Summary, arrow: str) -> list[tuple[str, str]]:
    """Put what a run measured into labelled lines."""
    rows: list[tuple[str, str]] = []
    if summary.first_loss is not None and summary.last_loss is not None:
        rows.append(("loss", f"{summary.first_loss:.4f} {arrow} {summary.last_loss:.4f}"))
    before, after = summary.held_out_before, summary.held_out_after
    if before is not None and after is not None:
        rows.append(
            (
                "held-out",
                f"{before:.4f} {arrow} {after:.4f} (perplexity "
                f"{perplexity(before):,.4g} {arrow} {perplexity(after):,.4g})",
            )
        )
    spread = f"{milliseconds(summary.ms_q1)} to {milliseconds(summary.ms_q3)}"
    rows.append(("step", f"{milliseconds(summary.ms_per_step)} median (quartiles {spread})"))
    if summary.update_ms is not None:
        compiling = f", {milliseconds(summary.compile_ms)} compiling" if summary.compile_ms else ""
        rows.append(("update", f"{milliseconds(summary.update_ms)} mean{compiling}"))
    rows.append(
        (
            "speed",
            f"{summary.tokens_per_s:,.0f} tokens/s, {summary.tflops * 1e3:,.1f} GFLOP/s",
        )
    )
    if summary.ranks is not None:
        each = summary.ranks["tokens_per_s"]
        speeds = f"{min(each):,.0f} to {max(each):,.0f}" if len(each) > 1 else f"{each[0]:,.0f}"
        rows.append(
            (
                "ranks",
                f"{len(each)} of {speeds} tokens/s; communicating "
                f"{summary.ranks['communicating']:.1%} of the time, "
                f"{summary.ranks['hidden']:.0%} of it hidden",
            )
        )
    if summary.peak is not None:
        peak = f"{summary.peak['gflops']:,.0f} GFLOP/s, {summary.peak['name']}"
        rows.append(("utilization", f"{summary.utilization:.1%} of {peak}"))
    phases = {name: ms for name, ms in summary.phases.items() if ms >= 0.0005}
    if phases:
        shown = ", ".join(f"{name} {ms:.2f}" for name, ms in phases.items())
        rows.append(("ms per step", shown))
    if summary.restarts:
        rows.append(("compiles", f"{summary.compiles} in {summary.restarts + 1} processes"))
    memory = f"{summary.peak_memory / 1e6:,.0f} MB at most" if summary.peak_memory else "unknown"
    rows.append(("memory", f"{memory}, {summary.allocations} allocations per step"))
    if summary.skipped:
        rows.append(("skipped", f"{summary.skipped} steps, half-precision overflow"))
    return rows
