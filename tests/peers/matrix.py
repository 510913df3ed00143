"""How the comparison of `step.py` changes along one axis: shape, tokens, threads, instruction set.

    python tests/peers/matrix.py --axis seq --json seq.json        64, 128, 256, 512, 1024 tokens
    python tests/peers/matrix.py --axis preset                     stories15M, 42M, 110M
    python tests/peers/matrix.py --axis threads                    1, 2, ... threads
    python tests/peers/matrix.py --axis isa                        all of it, and both held to AVX2

Every point is a process of its own that runs `step.py` with all its checks; a point that fails is
a line of the table with its reason, and the exit code says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import LIMIT_TORCH, add_common, check_common, describe_machine, header, write_json

SEQUENCES = (64, 128, 256, 512, 1024)
SHAPES = ("stories15M", "stories42M", "stories110M")
# PyTorch at its best: torch.compile gains much in bf16, and gained nothing in fp32 (1566 ms against
# 1551 to 1580 on two cores of Zen 4).
BEST_TORCH = {"fp32": "eager", "bf16": "compile"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.set_defaults(rounds=5)
    parser.add_argument("--axis", choices=("seq", "preset", "threads", "isa"), required=True)
    parser.add_argument("--seq", type=int, default=256, help="tokens per step (%(default)s)")
    parser.add_argument("--values", help="points instead of the usual ones, with commas between")
    parser.add_argument("--precision", choices=("fp32", "bf16", "all"), default="all")
    parser.add_argument(
        "--torch", choices=("best", "eager", "none"), default="best", help="(%(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=580.0, help="seconds per point")
    options = parser.parse_args()
    check_common(parser, options)
    return options


def points(options: argparse.Namespace) -> list[tuple[str, dict[str, str], dict[str, str]]]:
    """List the points: label, options of `step.py`, environment."""
    fixed = {
        "preset": options.preset,
        "seq": str(options.seq),
        "threads": str(options.threads),
        "rounds": str(options.rounds),
        "seed": str(options.seed),
    }
    usual: dict[str, list[str]] = {
        "seq": [str(s) for s in SEQUENCES],
        "preset": list(SHAPES),
        "threads": [str(n) for n in range(1, options.threads + 1)],
        "isa": ["", "avx2"],
    }
    values = options.values.split(",") if options.values else usual[options.axis]
    if options.axis != "isa":
        return [(value, {**fixed, options.axis: value}, {}) for value in values]
    found = []
    for value in values:
        environment = {"ANEPY_CPU_MASK": value} if value else {}
        if value == "avx2":
            environment |= LIMIT_TORCH
        found.append((value or "all", fixed, environment))
    return found


def run(
    words: dict[str, str], environment: dict[str, str], precision: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Run one point; return its result, or {"error": reason}."""
    torch = BEST_TORCH[precision] if options.torch == "best" else options.torch
    command = [sys.executable, str(Path(__file__).with_name("step.py")), "--json", "-"]
    command += ["--precision", precision, "--torch", torch]
    for name, value in words.items():
        command += [f"--{name}", value]
    try:
        finished = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=options.timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {options.timeout:g} s"}
    if finished.returncode:
        lines = finished.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {finished.returncode}"}
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


def line(label: str, precision: str, result: dict[str, Any]) -> str:
    """Write a point as a line of the table."""
    if "error" in result:
        return f"{label:>12} {precision:5} {result['error']}"
    ours = next(row for name, row in result["programs"].items() if name.startswith("anepy"))
    step, peak = ours["step_ms"], result["peaks"][precision]
    rate = result["flops"]["total"] / step["median"] / 1e6
    share = f"{rate / peak:6.0%}" if peak else "     -"
    text = (
        f"{label:>12} {precision:5}{step['median']:9.1f}{rate:9.0f}{share}"
        f"{result['settings']['seq'] / step['median'] * 1e3:10,.0f}"
        f"{ours['update_ms']['median']:9.1f}"
    )
    for row in result["ratios"]:
        theirs = result["programs"][row["to"]]["step_ms"]["median"]
        spread = row["step"]
        text += (
            f"{theirs:10.1f}{spread['median']:8.3f} ({spread['q1']:.3f} to {spread['q3']:.3f})"
            f"{row['update']['median']:8.2f}"
        )
    return text


def main() -> None:
    """Run all points and print them as they come."""
    options = parse_arguments()
    result: dict[str, Any] = header("matrix")
    result["axis"], result["points"] = options.axis, []
    if options.json != "-":
        print(f"{describe_machine(result)}; {options.rounds} rounds each")
        print(
            f"{options.axis:>12} {'':5}{'ms':>9}{'GFLOP/s':>9}{'share':>6}{'tokens/s':>10}"
            f"{'AdamW':>9}{'torch':>10}{'ratio':>8} {'(quartiles)':16}{'AdamW':>8}"
        )
    failed = False
    precisions = ("fp32", "bf16") if options.precision == "all" else (options.precision,)
    for label, words, environment in points(options):
        for precision in precisions:
            if precision == "bf16" and "ANEPY_CPU_MASK" in environment:
                continue  # only the best instruction set has it
            found = run(words, environment, precision, options)
            failed |= "error" in found
            result["points"].append({"value": label, "precision": precision, "result": found})
            if options.json != "-":
                print(line(label, precision, found), flush=True)
            write_json(result, options.json if options.json != "-" else None)
    if options.json == "-":
        write_json(result, "-")
    else:
        print(f"command: {result['command']}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
