"""`anepy compare --submit`: a Mac's Neural Engine figures in the form the public tables read.

Two collections of training times on the Neural Engine exist: one JSON per machine (its schema 1,
with `system`, `benchmarks` and `summary`) and one list of machines (`training_results`). A file
holds both forms, so either can take it. Whatever was not measured is null or an empty list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..engine.flops import ANE_PEAK_TFLOPS, flops_per_step
from ..errors import ConfigError
from ..models.model import PRESETS
from .result import Comparison, Measured

SCHEMA_VERSION = 1
_SHAPE, _SEQ = PRESETS["stories110M"], 256
_ROWS = {"training_cpu_classifier": "cpu", "training_ane_classifier": "ane"}


def check(engine: Mapping[str, Any], machine: Mapping[str, Any], shape: Mapping[str, Any]) -> None:
    """Refuse what does not belong into tables of Neural Engine training.

    Args:
        engine: of a `Comparison`.
        machine: likewise.
        shape: of its model.

    Raises:
        ConfigError: another device, another system, or another model than they are about.
    """
    if engine["device"] != "ane" or "macos" not in machine:
        raise ConfigError(
            f"the public tables are of the Neural Engine, this run is on device {engine['device']} "
            "and has no figure for them: leave out --submit, --json keeps every number"
        )
    wanted = vars(_SHAPE)
    names = [name for name in wanted if name != "seq_len" and shape.get(name) != wanted[name]]
    if names or engine["seq"] != _SEQ:
        raise ConfigError(
            f"the public tables are of stories110M with {_SEQ} tokens: leave out --submit, or "
            f"compare on that shape with --seq {_SEQ}"
        )


def submission(comparison: Comparison) -> dict[str, Any]:
    """Return the record of a comparison for the public tables.

    TFLOPS of the engine are its FLOPs of a step (twice the forward products and attention
    backward, and the classifier where it runs there) over the time of the whole step, and
    utilization is their share of 15.8 TFLOPS: as everybody else in these tables counts.

    Raises:
        ConfigError: see `check`; or no variant was measured.
    """
    check(comparison.engine, comparison.machine, comparison.model["shape"])
    found = [
        (label, comparison.runs(label)[0].switches, comparison.summary(label))
        for label in comparison.columns
        if comparison.runs(label) and comparison.summary(label).step is not None
    ]
    if not found:
        raise ConfigError("no variant was measured: there is nothing to submit")
    machine = comparison.machine
    best: dict[str, dict[str, Any]] = {}
    for _, switches, measured in found:
        place = "training_ane_classifier" if "offload_classifier" in switches else None
        row = _training(switches, measured)
        kept = best.setdefault(place or "training_cpu_classifier", row)
        if row["ms_per_step"] < kept["ms_per_step"]:
            best[place or "training_cpu_classifier"] = row
    times = {
        f"training_ms_per_step_{where}": best[name]["ms_per_step"] if name in best else None
        for name, where in _ROWS.items()
    }
    fastest = min(best.values(), key=lambda row: float(row["ms_per_step"]))
    return {
        "schema_version": SCHEMA_VERSION,
        "timestamp": comparison.created,
        "system": {
            "chip": machine["processor"],
            "machine": machine.get("model") or None,
            "macos_version": machine["macos"],
            "macos_build": machine.get("macos_build") or None,
            "cpu_cores": machine["cpus"],
            "memory_gb": round(machine["memory"] / 2**30),
            "neural_engine_cores": None,
        },
        "benchmarks": {
            "sram_probe": [],
            "inmem_peak": [],
            **{name: best.get(name) for name in _ROWS},
        },
        "summary": {
            "peak_tflops": None,
            **times,
            "training_ane_tflops": fastest["ane_tflops_sustained"],
            "training_ane_util_pct": fastest["ane_util_pct"],
        },
        "report_date": comparison.created[:10],
        "source": f"anepy {comparison.anepy}, library {comparison.library['build_id']}",
        "model": "Stories110M (12-layer transformer, 109M params)",
        "config": {
            "dim": _SHAPE.dim,
            "hidden": _SHAPE.hidden_dim,
            "heads": _SHAPE.n_heads,
            "seq": _SEQ,
            "vocab": _SHAPE.vocab_size,
            "layers": _SHAPE.n_layers,
        },
        "training_results": [
            _result(comparison, label, switches, measured) for label, switches, measured in found
        ],
    }


def _ane_flops(switches: list[str]) -> float:
    flops = flops_per_step(_SHAPE, _SEQ)
    on_engine = flops["fwd"] + flops["bwd_dx"] + flops["sdpa_bwd"]
    # Forward is one of the classifier's three products.
    return on_engine + (flops["classifier"] / 3 if "offload_classifier" in switches else 0.0)


def _training(switches: list[str], measured: Measured) -> dict[str, Any]:
    assert measured.step is not None
    ms = measured.step.median
    tflops = _ane_flops(switches) / ms / 1e9
    whole = measured.compile_share + measured.update_share + ms
    return {
        "ms_per_step": round(ms, 3),
        "ane_tflops_sustained": round(tflops, 3),
        "ane_util_pct": round(100 * tflops / ANE_PEAK_TFLOPS, 2),
        "total_tflops": round(measured.tflops, 3) if measured.tflops else None,
        "compile_pct": round(100 * measured.compile_share / whole, 1),
        "train_pct": round(100 * ms / whole, 1),
    }


def _result(
    comparison: Comparison, label: str, switches: list[str], measured: Measured
) -> dict[str, Any]:
    """Return a row of the list of machines; its pairs are quartiles."""
    assert measured.step is not None
    span = [measured.step.q1, measured.step.q3]
    tflops = [_ane_flops(switches) / ms / 1e9 for ms in reversed(span)]
    machine = comparison.machine
    compiled = measured.compile
    return {
        "chip": re.sub(r"^Apple ", "", machine["processor"]),
        "cores": f"{machine['cpus']} CPUs",
        "ram_gb": round(machine["memory"] / 2**30),
        "macos": machine["macos"],
        "ms_per_step": [round(ms, 2) for ms in span],
        "ane_ms": None,
        "compile_ms": [round(ms) for ms in (compiled.q1, compiled.q3)] if compiled else None,
        "ane_tflops": [round(value, 3) for value in tflops],
        "ane_util_pct": [round(100 * value / ANE_PEAK_TFLOPS, 2) for value in tflops],
        "notes": f"anepy, variant {label}: {', '.join(switches) or 'no switches'}; quartiles of "
        f"{measured.step.count} steps",
    }
