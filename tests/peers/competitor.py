"""Time training steps beside a process that keeps one CPU busy, and without it (Linux).

    python tests/peers/competitor.py                  stories15M, 256 tokens, fp32, PyTorch eager

Whoever divides a step evenly over its threads waits for the one that shares its CPU: with a fair
scheduler the step takes twice as long, however many CPUs there are. Whoever hands out small pieces
loses only what the competitor got: of n CPUs n - 1/2 are left. That is the ideal printed here,
from the CPU time the competitor really had.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import (
    COLUMNS,
    SETTLE_SECONDS,
    add_common,
    check_common,
    describe_machine,
    header,
    progress,
    random_tokens,
    ratio,
    report,
    summary,
)
from sides import AnepySide, Side, TorchSide, check, float64_gradients, without_torch

# Ends by itself with the process that started it.
BURN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10000))"
STATES = ("alone", "beside")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser, "stories15M")
    parser.add_argument("--seq", type=int, default=256, help="tokens per step (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="per turn (%(default)s)")
    parser.add_argument("--variant", default="max", help="of anepy (%(default)s)")
    options = parser.parse_args()
    check_common(parser, options)
    if options.steps < 1:
        parser.error("--steps starts at 1")
    if not hasattr(os, "sched_setaffinity"):
        parser.error("this system cannot tie a process to a CPU; only Linux can")
    options.adam = "fused"
    return options


class Competitor:
    """A process that computes without pause on one CPU, when it may."""

    def __init__(self, cpu: int) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", BURN])
        os.sched_setaffinity(self.process.pid, {cpu})
        self.process.send_signal(signal.SIGSTOP)

    def seconds(self) -> float:
        """Return the CPU time it has had."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let it compute for a while."""
        self.process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGSTOP)

    def end(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


def turn(side: Side, steps: int) -> float:
    """Return ms per step; one step before wakes the threads up."""
    for step in range(-1, steps):
        if step == 0:
            start = time.perf_counter()
        side.prepare()
        side.step()
    return (time.perf_counter() - start) * 1e3 / steps


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Let the programs take turns, with and without the competitor."""
    from anepy.models.model import PRESETS, Model

    result: dict[str, Any] = header("competitor")
    weights = Model.init(PRESETS[options.preset], seed=options.seed)
    tokens, targets = random_tokens(weights.config, options.seq, options.seed)
    sides: list[Side] = [AnepySide(weights, tokens, targets, options, "fp32")]
    missing = without_torch()
    if missing is None:
        sides.append(TorchSide(weights, tokens, targets, options, "fp32", "eager"))
        exact = float64_gradients(weights, tokens, targets)
        for side in sides:
            check(side, exact)
    times = {side.name: {state: [] for state in STATES} for side in sides}
    had = {side.name: 0.0 for side in sides}
    passed = dict(had)
    competitor = Competitor(max(os.sched_getaffinity(0)))
    try:
        for number in range(options.rounds):
            for state in STATES[:: 1 if number % 2 else -1]:
                for side in sides[:: 1 if number % 2 else -1]:
                    progress(f"round {number + 1} of {options.rounds}, {side.name}, {state}")
                    time.sleep(SETTLE_SECONDS)
                    if state == "alone":
                        ms = turn(side, options.steps)
                    else:
                        with competitor.running():
                            begin, before = time.perf_counter(), competitor.seconds()
                            ms = turn(side, options.steps)
                            had[side.name] += competitor.seconds() - before
                            passed[side.name] += time.perf_counter() - begin
                    times[side.name][state].append(ms)
    finally:
        competitor.end()
    progress("")
    result["settings"] = {
        k: getattr(options, k)
        for k in ("preset", "seq", "steps", "rounds", "threads", "variant", "seed")
    }
    result["missing"] = missing
    result["sides"] = {
        name: {
            **{state: summary(of[state]) for state in STATES},
            "slower": ratio(of["beside"], of["alone"]),
            "competitor_share": had[name] / passed[name],
            "ideal": options.threads / max(options.threads - had[name] / passed[name], 0.1),
        }
        for name, of in times.items()
    }
    result["rounds"] = times
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the comparison."""
    s = result["settings"]
    print(
        f"\n{s['preset']}: {s['seq']} tokens, fp32, {s['threads']} threads, {s['rounds']} rounds "
        f"of {s['steps']} steps"
    )
    print(describe_machine(result))
    print(f"\n{'':32}" + "".join(f"{c:>9}" for c in COLUMNS))
    for name, row in result["sides"].items():
        for label, key in (("ms", "alone"), ("ms beside the other", "beside"), ("ratio", "slower")):
            values = "".join(f"{row[key][c]:9.2f}" for c in COLUMNS)
            print(f"{f'{name}, {label}':32}{values}")
        print(
            f"{'':4}the other had {row['competitor_share']:.0%} of a CPU; ideal {row['ideal']:.2f}"
        )
    if result["missing"]:
        print(f"PyTorch: {result['missing']}")
    print(f"command: {result['command']}")


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    result = measure(options)
    report(result, options.json, print_table)


if __name__ == "__main__":
    main()
