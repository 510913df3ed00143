"""Comparisons whose numbers are written, not measured, for tests of what is made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from anepy.comparing.result import Ablation, Comparison, Group, Run

ROUNDS, STEPS = 6, 4
# Shares of a step by phase; they leave 0.02 to "other".
PHASES = {
    "device_ms": 0.5,
    "io_ms": 0.08,
    "classifier_ms": 0.2,
    "softmax_ms": 0.05,
    "norm_ms": 0.04,
    "elementwise_ms": 0.03,
    "dw_wait_ms": 0.08,
}


def make_run(
    label: str,
    step_ms: float,
    update_ms: float = 50.0,
    *,
    scatter: float = 0.02,
    losses: Sequence[float] | None = None,
    rounds: int = ROUNDS,
    **changes: Any,
) -> Run:
    """Return a run whose times wobble around `step_ms` in a way that repeats."""
    run = Run(label, label, ["prealloc"], 2_100_000_000, rounds=rounds, **changes)
    for number in range(rounds):
        for step in range(STEPS):
            at = number * STEPS + step
            ms = step_ms * (1 + scatter * math.sin(7 * at))
            loss = losses[at] if losses is not None else 10.4 * math.exp(-at / 40)
            row = {"round": number, "wall_ms": ms, "step_ms": ms, "loss": loss, "flops": 1.7e11}
            row |= {name: share * ms for name, share in PHASES.items()}
            row |= {"dw_ms": 0.3 * ms, "allocations": 132, "skipped": 0, "loss_scale": 1}
            for name, value in row.items():
                run.steps.setdefault(name, []).append(float(value))
        update = {"round": number, "wall_ms": update_ms, "compile_ms": 0.0, "grad_norm": 1.5}
        for name, value in update.items():
            run.updates.setdefault(name, []).append(float(value))
    return run


def make_comparison(
    times: Mapping[str, float] | None = None, *, ablate: bool = False, **changes: Any
) -> Comparison:
    """Return a comparison of variants with these step times in ms."""
    times = times if times is not None else {"baseline": 500.0, "opt": 440.0}
    runs = [make_run(label, ms) for label, ms in times.items()]
    ablation = []
    if ablate:
        runs.append(make_run("baseline+simd_adam", 500.0, 20.0))
        runs.append(make_run("baseline+prealloc", 470.0))
        ablation = [
            Ablation("simd_adam", "add", "baseline", "baseline+simd_adam"),
            Ablation("prealloc", "add", "baseline", "baseline+prealloc"),
            Ablation("metal_dw", "add", "baseline", "", "switch metal_dw means nothing here"),
        ]
    values: dict[str, Any] = {
        "created": "2026-01-31T12:00:00Z",
        "command": ["anepy", "compare", "baseline", "opt"],
        "anepy": "0.1.0",
        "machine": {
            "system": "Linux 6 x86_64",
            "processor": "AMD EPYC",
            "cpus": 2,
            "memory": 25_000_000_000,
        },
        "library": {"isa": "avx512", "build_id": "a68fdd138eb9586f", "sha256": "0" * 64},
        "engine": {
            "device": "cpu",
            "precision": "fp32",
            "isa": "avx512",
            "threads": 2,
            "seq": 256,
        },
        "model": {
            "name": "stories110M shape, random weights",
            "parameters": 109_529_856,
            "shape": {"dim": 768, "n_layers": 12, "vocab_size": 32000},
        },
        "data": {"name": "synthetic tokens", "tokens": 262144},
        "settings": {
            "rounds": ROUNDS,
            "steps": STEPS,
            "warmup": 0,
            "accum": 10,
            "seq": 256,
            "lr": 3e-4,
            "seed": 0,
            "device": "cpu",
            "precision": "fp32",
            "threads": None,
            "ablate": ablate,
        },
        "peak": {"gflops": 480.0, "name": "measured FMA peak"},
        "columns": list(times),
        "groups": [Group(runs, [list(range(len(runs)))] * ROUNDS)],
        "ablation": ablation,
    }
    return Comparison(**(values | changes))
