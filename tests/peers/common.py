"""What the peer scripts share: the machine, random tokens, clocks, spreads, result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
# At the end, so that an installed anepy is preferred to the checkout around this file.
sys.path += [str(TESTS), str(TESTS / "helpers"), str(TESTS.parent)]

import tolerances  # noqa: E402, F401 (for the other scripts: here the path is known)

# After its last task a thread pool spins for a few ms; the other program must not pay for that.
SETTLE_SECONDS = 0.05
WARM_UP_ROUNDS = 2
VERSION = 1
COLUMNS = ("median", "q1", "q3", "min", "max")


def usable_cpus() -> int:
    """Count the CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def add_common(parser: argparse.ArgumentParser, preset: str = "stories110M") -> None:
    """Add the options all scripts take."""
    parser.add_argument("--preset", default=preset, help="model shape (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="for all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="weights and tokens (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results; - for stdout, no table")


def check_common(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse what cannot be measured."""
    from anepy.models.model import PRESETS

    if options.preset not in PRESETS:
        parser.error(f"unknown preset {options.preset}: use one of {', '.join(PRESETS)}")
    for name in ("rounds", "threads", "seq"):
        if getattr(options, name, 1) < 1:
            parser.error(f"--{name} starts at 1")


def random_tokens(config: Any, seq: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one sequence and its targets, int32, each of length `seq`."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, seq + 1, dtype=np.int32)
    return ids[:-1].copy(), ids[1:].copy()


def parameter_count(model: Any) -> int:
    """Count the parameters of an anepy model."""
    return sum(w.size for w in model.weights.values())


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the milliseconds a call takes, and its result."""
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


def summary(values: list[float]) -> dict[str, float]:
    """Reduce a list to median, quartiles and extremes."""
    q1, _, q3 = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    return {
        "median": statistics.median(values),
        "q1": q1,
        "q3": q3,
        "min": min(values),
        "max": max(values),
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Summarize ours / theirs, taken within each round."""
    return summary([a / b for a, b in zip(ours, theirs, strict=True)])


def peak_bytes() -> int:
    """Return the peak resident memory of this process.

    Linux counts `ru_maxrss` on from the parent that started the process; VmHWM starts anew.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def header(kind: str) -> dict[str, Any]:
    """Begin a result: what it is, how to get it again, and the machine."""
    from anepy.native.info import library_info
    from anepy.system import machine

    return {
        "format": f"anepy-peers-{kind}",
        "version": VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "environment": {
            k: v
            for k, v in sorted(os.environ.items())
            if k.startswith("ANEPY_") or k in LIMIT_TORCH
        },
        "machine": {
            "cpu": machine.processor(),
            "cpus": usable_cpus(),
            "system": machine.system(),
            "memory": machine.memory(),
            "load_before": [round(x, 2) for x in os.getloadavg()],
        },
        "library": library_info(),
        "python": platform.python_version(),
    }


# What holds PyTorch and its libraries to AVX2 when anepy is held to it.
LIMIT_TORCH = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def measured_peaks(threads: int) -> dict[str, float | None]:
    """Measure what this machine can do with the instruction set in use; the best so far."""
    from anepy.bench import peaks

    found = peaks.peaks(threads=threads, again=True)
    return {
        "fp32": found.fp32_gflops,
        "bf16": found.bf16_gflops,
        "read": found.read_gbs,
        "copy": found.copy_gbs,
        "triad": found.triad_gbs,
    }


def read_speed(threads: int) -> float:
    """Measure how fast this machine reads memory just now, in GB/s."""
    from anepy.bench import peaks

    return peaks._measure_peaks(None, threads).read_gbs


def describe_machine(result: dict[str, Any]) -> str:
    """Put machine and library into a line."""
    m, library = result["machine"], result["library"]
    return (
        f"{m['cpu']}, {m['cpus']} CPUs, anepy uses {library['isa']} (library "
        f"{library['build_id']}); load before {m['load_before'][0]}"
    )


def write_json(result: dict[str, Any], target: str | None) -> None:
    """Write the results where `--json` says."""
    text = json.dumps(result, indent=1)
    if target == "-":
        print(text)
    elif target:
        Path(target).write_text(text + "\n")


def report(
    result: dict[str, Any], target: str | None, print_table: Callable[[dict[str, Any]], None]
) -> None:
    """Print the results as a table, unless they go to stdout as JSON, and write them."""
    if target != "-":
        print_table(result)
    write_json(result, target)


def progress(text: str) -> None:
    """Say on a terminal how far it is."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
