"""Time one training step of anepy and of PyTorch side by side: same weights, same tokens.

Run it from the checkout, with the extra `peers` installed:

    python tests/peers/step.py                             stories110M, 256 tokens, fp32, eager
    python tests/peers/step.py --precision all --torch eager --torch compile --json a.json
    python tests/peers/step.py --memory                    only the peak memory of anepy

All programs live in this process and take turns, never at once; who begins changes every round.
All gradients are held against float64 before anything is timed, losses are compared in every
round: numbers of a wrong program are not printed. README.md beside this file says what is timed.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from typing import Any

from common import (
    COLUMNS,
    SETTLE_SECONDS,
    WARM_UP_ROUNDS,
    add_common,
    check_common,
    describe_machine,
    header,
    measured_peaks,
    parameter_count,
    peak_bytes,
    progress,
    random_tokens,
    ratio,
    summary,
    timed,
    tolerances,
    write_json,
)
from sides import (
    PRECISIONS,
    TORCH_MODES,
    AnepySide,
    Side,
    TorchSide,
    check,
    float64_gradients,
    without_torch,
)

MEMORY_ALLOWANCE = 600e6  # bytes beside the four arenas
ADAM_BYTES = 28.0  # per parameter: p, g, m, v are read, p, m, v written, in fp32


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.add_argument("--seq", type=int, default=256, help="tokens per step (%(default)s)")
    parser.add_argument("--variant", default="max", help="of anepy (%(default)s)")
    parser.add_argument(
        "--precision", choices=(*PRECISIONS, "all"), default="fp32", help="of both (%(default)s)"
    )
    parser.add_argument(
        "--torch",
        choices=(*TORCH_MODES, "none"),
        action="append",
        help="how PyTorch runs; may be repeated (eager)",
    )
    parser.add_argument(
        "--adam", choices=("fused", "foreach"), default="fused", help="PyTorch's (%(default)s)"
    )
    parser.add_argument(
        "--peak", type=float, metavar="GFLOPS", help="fp32 FMA peak (default: measured here)"
    )
    parser.add_argument("--memory", action="store_true", help="only anepy's peak memory")
    options = parser.parse_args()
    check_common(parser, options)
    options.torch = list(dict.fromkeys(options.torch or ["eager"]))
    options.precisions = list(PRECISIONS) if options.precision == "all" else [options.precision]
    return options


# ------------------------------------------------------------------------------------ measurement


def make_sides(weights: Any, options: argparse.Namespace) -> list[Side]:
    """Make every program that was asked for, each with its own copy of the weights."""
    tokens, targets = random_tokens(weights.config, options.seq, options.seed)
    sides: list[Side] = [
        AnepySide(weights, tokens, targets, options, precision) for precision in options.precisions
    ]
    for mode in options.torch:
        if mode != "none":
            sides += [
                TorchSide(weights, tokens, targets, options, precision, mode)
                for precision in options.precisions
            ]
    return sides


def check_all(
    sides: list[Side], weights: Any, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Hold every program against float64, and do its first update."""
    progress("float64 gradients")
    exact = float64_gradients(weights, *random_tokens(weights.config, options.seq, options.seed))
    found = {}
    for side in sides:
        progress(f"checking {side.name}")
        found[side.name] = check(side, exact)
    del exact
    gc.collect()
    return found


def compare_losses(losses: dict[str, tuple[str, float]], when: str) -> float:
    """Stop unless all losses agree; from the second step on this also checks the updates."""
    worst = 0.0
    first = next(iter(losses.values()))[1]
    for name, (precision, loss) in losses.items():
        largest = tolerances.PEER_BF16_LOSS if precision == "bf16" else tolerances.PEER_LOSS
        if not abs(loss - first) <= largest:
            raise SystemExit(f"losses differ {when}: {losses}, at {name}")
        worst = max(worst, abs(loss - first))
    return worst


def measure(sides: list[Side], rounds: int) -> tuple[dict[str, dict[str, list[float]]], float]:
    """Let the programs take turns.

    Returns:
        program -> "step" | "update" | "loss" -> one value per timed round; and the largest
        difference of their losses.
    """
    results: dict[str, dict[str, list[float]]] = {
        side.name: {"step": [], "update": [], "loss": []} for side in sides
    }
    worst = 0.0
    for turn in range(-WARM_UP_ROUNDS, rounds):
        losses = {}
        first = turn % len(sides)
        for side in sides[first:] + sides[:first]:
            progress(f"round {turn + 1} of {rounds}, {side.name}")
            time.sleep(SETTLE_SECONDS)
            side.prepare()
            step_ms, loss = timed(side.step)
            update_ms, _ = timed(side.update)
            losses[side.name] = (side.precision, loss)
            if turn >= 0:
                results[side.name]["step"].append(step_ms)
                results[side.name]["update"].append(update_ms)
                results[side.name]["loss"].append(loss)
        ordered = dict(sorted(losses.items(), key=lambda item: item[1][0], reverse=True))
        worst = max(worst, compare_losses(ordered, f"in round {turn}"))
    progress("")
    return results, worst


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Take two steps and updates with anepy alone in this process, and read the peak."""
    from anepy.engine import Engine
    from anepy.models.model import PRESETS, Model

    model = Model.init(PRESETS[options.preset], seed=options.seed)
    tokens, targets = random_tokens(model.config, options.seq, options.seed)
    precision, threads = options.precisions[0], options.threads
    with Engine(model, options.variant, "cpu", precision, options.seq, threads) as engine:
        for _ in range(2):
            engine.step(tokens, targets)
            engine.update(lr=1e-4)
    arenas = 4 * 4 * parameter_count(model)
    return {
        "peak_bytes": peak_bytes(),
        "arena_bytes": arenas,
        "bound_bytes": arenas + MEMORY_ALLOWANCE,
    }


def measure_memory_apart(options: argparse.Namespace, precision: str) -> dict[str, float]:
    """Run `--memory` in a process that never loads PyTorch."""
    command = [sys.executable, __file__, "--memory", "--json", "-", "--precision", precision]
    for name in ("preset", "seq", "threads", "variant", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"the memory run failed:\n{finished.stderr}")
    result: dict[str, float] = json.loads(finished.stdout)["memory"]
    return result


# ---------------------------------------------------------------------------------------- report


def summarize(sides: list[Side], times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Reduce the rounds; ratios are anepy / PyTorch of the same precision, within a round."""
    report: dict[str, Any] = {"programs": {}, "ratios": []}
    for side in sides:
        report["programs"][side.name] = {
            "precision": side.precision,
            "step_ms": summary(times[side.name]["step"]),
            "update_ms": summary(times[side.name]["update"]),
        }
    for ours in (side for side in sides if isinstance(side, AnepySide)):
        for theirs in (side for side in sides if isinstance(side, TorchSide)):
            if ours.precision == theirs.precision:
                report["ratios"].append(
                    {
                        "of": ours.name,
                        "to": theirs.name,
                        "step": ratio(times[ours.name]["step"], times[theirs.name]["step"]),
                        "update": ratio(times[ours.name]["update"], times[theirs.name]["update"]),
                    }
                )
    return report


def print_table(result: dict[str, Any]) -> None:
    """Print the comparison."""
    s, peaks = result["settings"], result["peaks"]
    print(f"\n{s['preset']}: {s['seq']} tokens, {s['threads']} threads, {s['rounds']} rounds")
    print(describe_machine(result))
    print(f"{s['versions']}; variant {s['variant']} ({s['switches'] or 'no switches'})")
    bf16 = f", bf16 {peaks['bf16']:.0f}" if peaks["bf16"] else ""
    print(
        f"measured peak: fp32 {peaks['fp32']:.0f}{bf16} GFLOP/s; memory reads {peaks['read']:.1f}, "
        f"a += b {peaks['triad']:.1f} GB/s\n"
    )
    print(f"{'':42}" + "".join(f"{c:>9}" for c in COLUMNS))
    for what, label in (("step", "forward+backward"), ("update", "AdamW")):
        for name, row in result["programs"].items():
            values = "".join(f"{row[f'{what}_ms'][c]:9.1f}" for c in COLUMNS)
            print(f"{label + ' ms, ' + name:42}{values}")
        for row in result["ratios"]:
            label2 = f"  {row['of']} / {row['to']}"
            print(f"{label2:42}" + "".join(f"{row[what][c]:9.3f}" for c in COLUMNS))
    flops = result["flops"]["total"]
    print(f"\n{flops / 1e9:.1f} GFLOP per step (forward attention not counted):")
    for name, row in result["programs"].items():
        rate = flops / row["step_ms"]["median"] / 1e6
        peak = peaks[row["precision"]]
        share = f", {rate / peak:.0%} of the {row['precision']} peak" if peak else ""
        moved = ADAM_BYTES * result["parameters"] / row["update_ms"]["median"] / 1e6
        tokens = s["seq"] / row["step_ms"]["median"] * 1e3
        print(
            f"  {name:22}{rate:8.1f} GFLOP/s{share}; {tokens:,.0f} tokens/s; "
            f"AdamW {moved:.1f} GB/s, {moved / peaks['triad']:.0%} of a += b"
        )
    for precision, memory in result["memory"].items():
        print_memory(memory, precision)
    for name, found in result["check"].items():
        print(
            f"checked {name}: gradients within {found['gradient_error']:.1e} of float64, "
            f"cosine {found['cosine']:.6f}"
        )
    print(f"losses of all rounds within {result['loss_difference']:.1e}")
    print(f"command: {result['command']}")


def print_memory(memory: dict[str, float], precision: str) -> None:
    """Print anepy's peak memory beside its four arenas."""
    print(
        f"peak memory of anepy {precision} alone: {memory['peak_bytes'] / 1e6:.0f} MB "
        f"(four arenas {memory['arena_bytes'] / 1e6:.0f} MB, "
        f"bound {memory['bound_bytes'] / 1e6:.0f} MB)"
    )


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure memory apart, check, and time all programs."""
    from anepy.engine.flops import flops_per_step
    from anepy.models.model import PRESETS, Model

    result: dict[str, Any] = header("step")
    result["memory"] = {p: measure_memory_apart(options, p) for p in options.precisions}
    measured_peaks(options.threads)
    weights = Model.init(PRESETS[options.preset], seed=options.seed)
    sides = make_sides(weights, options)
    result["check"] = check_all(sides, weights, options)
    engine = next(side.engine for side in sides if isinstance(side, AnepySide))
    result["settings"] = {
        **{k: getattr(options, k) for k in ("preset", "seq", "rounds", "threads", "seed", "adam")},
        "variant": engine.variant,
        "switches": " ".join(engine.switches),
        "isa": engine.isa,
        "versions": f"Python {result['python']}, torch {__import__('torch').__version__}",
    }
    result["parameters"] = parameter_count(weights)
    result["flops"] = flops_per_step(weights.config, options.seq)
    times, result["loss_difference"] = measure(sides, options.rounds)
    result["peaks"] = measured_peaks(options.threads)
    if options.peak:
        result["peaks"]["fp32"] = options.peak
    return {**result, **summarize(sides, times), "rounds": times}


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.memory:
        result: dict[str, Any] = {"memory": measure_memory(options)}
        if options.json != "-":
            print_memory(result["memory"], options.precisions[0])
    else:
        if reason := without_torch():
            raise SystemExit(f"{reason}: pip install 'anepy[peers]' (it also checks gradients)")
        result = compare(options)
        if options.json != "-":
            print_table(result)
    write_json(result, options.json)


if __name__ == "__main__":
    main()
