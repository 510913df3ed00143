"""Show where the time of a step goes: each phase with its share of what the machine can do.

    python tests/peers/breakdown.py --precision bf16      stories110M, 256 tokens

The first table is the step as it measured itself (StepStats): its rows add up to the step, what no
phase claims being a row of its own, and the script fails if that is more than 3 %. The second one
takes each part by itself (`anepy bench`), times its calls per step: what the step costs beyond the
sum of its parts is cold memory, hand-overs between threads and what is no part of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from common import (
    SETTLE_SECONDS,
    WARM_UP_ROUNDS,
    add_common,
    check_common,
    describe_machine,
    header,
    measured_peaks,
    parameter_count,
    progress,
    random_tokens,
    timed,
    write_json,
)

UNEXPLAINED = 0.03  # of a step, at most
PARTS = (
    ("layers: forward products", ("qkv_forward", "wo_forward", "w13_forward", "w2_forward")),
    ("layers: dX products", ("qkv_dx", "wo_dx", "w13_dx", "w2_dx")),
    ("layers: dW products", ("qkv_dw", "wo_dw", "w13_dw", "w2_dw")),
    ("classifier forward", ("classifier_forward",)),
    ("classifier dX", ("classifier_dx",)),
    ("classifier dW", ("classifier_dw",)),
    ("attention forward", ("attention_forward",)),
    ("attention backward", ("attention_backward",)),
    ("norms", ("rmsnorm", "rmsnorm_backward")),
    ("gate", ("swiglu", "swiglu_backward")),
    ("soft-max and loss", ("softmax_loss",)),
)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.set_defaults(rounds=20)
    parser.add_argument("--seq", type=int, default=256, help="tokens per step (%(default)s)")
    parser.add_argument("--variant", default="max", help="(%(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-parts", action="store_true", help="only the first table")
    options = parser.parse_args()
    check_common(parser, options)
    return options


def work_of_phases(config: Any, seq: int, switches: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Count what each phase computes or moves: {"operations": n} or {"bytes": n}.

    Attention counts the products that are needed, keys up to the query: two forward, five backward
    (scores are computed again). Phases whose traffic stays in the caches or depends on switches
    have no limit to be compared with.
    """
    from anepy.engine.flops import flops_per_step

    flops = flops_per_step(config, seq)
    attention = 7.0 * config.n_layers * config.dim * seq * (seq + 1.0)
    work = {
        "device": {"operations": flops["fwd"] + flops["bwd_dx"] + attention},
        "dw_wait": {"operations": float(flops["bwd_dw"])},
        "classifier": {"operations": float(flops["classifier"])},
        "softmax": {"bytes": 12.0 * config.vocab_size * seq},
    }
    if any(name.startswith("offload_") for name in switches):
        # What was moved between phases can no longer be told apart.
        return {"dw_wait": work["dw_wait"]}
    return work


LABELS = {
    "device": "programs: forward, dX, attention",
    "dw_wait": "dW, waited for",
    "classifier": "classifier: forward, dX, dW",
    "softmax": "soft-max and loss",
    "norm": "norms outside programs",
    "elementwise": "embedding, residuals",
    "io": "to and from surfaces",
}


def share(work: dict[str, float], ms: float, precision: str, peaks: dict[str, Any]) -> str:
    """Write how near a row comes to its limit."""
    if ms <= 0.0 or not work:
        return ""
    if "operations" in work and peaks[precision]:
        rate = work["operations"] / ms / 1e6
        return f"{rate:7,.0f} GFLOP/s {rate / peaks[precision]:5.0%} of {precision}"
    if "bytes" in work:
        rate = work["bytes"] / ms / 1e6
        return f"{rate:7,.1f} GB/s    {rate / peaks['triad']:5.0%} of a += b"
    return ""


def measure_step(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Time steps and updates; phases are means over the middle half of the steps."""
    from anepy.engine import Engine
    from anepy.engine.stats import HALF, PHASES

    tokens, targets = random_tokens(model.config, options.seq, options.seed)
    rows, updates = [], []
    with Engine(
        model, options.variant, "cpu", options.precision, options.seq, options.threads
    ) as engine:
        for turn in range(-WARM_UP_ROUNDS, options.rounds):
            progress(f"step {turn + 1} of {options.rounds}")
            time.sleep(SETTLE_SECONDS)
            stats = engine.step(tokens, targets)
            update_ms, _ = timed(lambda: engine.update(lr=1e-4, weight_decay=0.1))
            if turn >= 0:
                phases = {
                    phase.key: getattr(stats, phase.field)
                    for phase in PHASES
                    if phase.kind != HALF  # what the others add up to
                }
                rows.append({"step": stats.step_ms, **phases})
                updates.append(update_ms)
        switches = engine.switches
    progress("")
    rows.sort(key=lambda row: row["step"])
    middle = rows[len(rows) // 4 : max(len(rows) // 4 + 1, -(-3 * len(rows) // 4))]
    means = {name: statistics.fmean(row[name] for row in middle) for name in rows[0]}
    busy = means.pop("dw", 0.0)  # of all threads, not of the step
    step_ms = means.pop("step")
    return {
        "step_ms": step_ms,
        "phases": means,
        "dw_busy_ms": busy,
        "unexplained_ms": step_ms - sum(means.values()),
        "update_ms": statistics.median(updates),
        "switches": list(switches),
    }


def measure_parts(options: argparse.Namespace, model: Any) -> list[dict[str, Any]]:
    """Time every part by itself, checked against the scalar kernels first."""
    from anepy.bench import cases as bench
    from anepy.native.info import library_info

    isa = library_info()["isa"]
    settings = bench.Settings(seq=options.seq, rounds=7)
    found = []
    for label, names in PARTS:
        row = {"part": label, "ms": 0.0, "operations": 0.0, "bytes": 0.0, "limit": ""}
        for name in names:
            progress(f"{label}: {name}")
            job = bench.Job(name, isa, options.precision, options.threads)
            if (
                options.precision
                not in bench.describe(model.table, job_fp32(job), options.seq).forms
            ):
                job = job_fp32(job)
            result = bench.measure(model.table, job, settings)
            row["ms"] += result.quartiles[1] * 1e3 * result.calls
            row["operations"] += result.operations * result.calls
            row["bytes"] += result.bytes * result.calls
            row["limit"] = result.limit
        found.append(row)
    progress("")
    return found


def job_fp32(job: Any) -> Any:
    """Return the same job in fp32, which every part of a step has."""
    from dataclasses import replace

    return replace(job, precision="fp32")


def print_tables(result: dict[str, Any]) -> None:
    """Print both tables."""
    s, peaks, step = result["settings"], result["peaks"], result["step"]
    precision, total = s["precision"], step["step_ms"]
    print(
        f"\n{s['preset']}: {s['seq']} tokens, {precision}, {s['threads']} threads, "
        f"{s['rounds']} rounds, variant {s['variant']}"
    )
    print(describe_machine(result))
    bf16 = f", bf16 {peaks['bf16']:.0f}" if peaks["bf16"] else ""
    print(
        f"measured peak: fp32 {peaks['fp32']:.0f}{bf16} GFLOP/s; memory reads {peaks['read']:.1f}, "
        f"a += b {peaks['triad']:.1f} GB/s\n"
    )
    print(f"{'phase':36}{'ms':>9}{'of step':>9}")
    for name, ms in sorted(step["phases"].items(), key=lambda item: -item[1]):
        # dW runs beside other phases too: its speed is that of the threads while they are at it.
        busy = step["dw_busy_ms"] / s["threads"] if name == "dw_wait" else ms
        limit = share(result["work"].get(name, {}), busy, precision, peaks)
        if name == "dw_wait" and limit:
            limit += " while at it"
        print(f"{LABELS.get(name, name):36}{ms:9.2f}{ms / total:9.1%}  {limit}")
    unexplained = step["unexplained_ms"]
    print(f"{'between the phases':36}{unexplained:9.2f}{unexplained / total:9.1%}")
    whole = share({"operations": result["flops"]["total"]}, total, precision, peaks)
    print(f"{'step':36}{total:9.2f}{1:9.1%}  {whole}")
    moved = {"bytes": 28.0 * result["parameters"]}
    adam = share(moved, step["update_ms"], precision, peaks)
    print(f"{'AdamW, once per update':36}{step['update_ms']:9.2f}{'':9}  {adam}")
    print(
        f"(dW kept the threads busy for {step['dw_busy_ms']:.1f} ms in all, partly beside others)\n"
    )
    if result["parts"]:
        print(f"{'part by itself, times its calls':36}{'ms':>9}{'of step':>9}")
        for row in result["parts"]:
            kind = "operations" if row["limit"] in ("fp32", "bf16") else "bytes"
            of = row["limit"] if kind == "operations" else precision
            limit = share({kind: row[kind]}, row["ms"], of, peaks)
            print(f"{row['part']:36}{row['ms']:9.2f}{row['ms'] / total:9.1%}  {limit}")
        parts = sum(row["ms"] for row in result["parts"])
        print(f"{'all parts':36}{parts:9.2f}{parts / total:9.1%}\n")
    print(f"command: {result['command']}")


def main() -> None:
    """Measure and print."""
    from anepy.engine.flops import flops_per_step
    from anepy.models.model import PRESETS, Model

    options = parse_arguments()
    result: dict[str, Any] = header("breakdown")
    measured_peaks(options.threads)
    model = Model.init(PRESETS[options.preset], seed=options.seed)
    result["step"] = measure_step(options, model)
    result["parts"] = [] if options.no_parts else measure_parts(options, model)
    result["peaks"] = measured_peaks(options.threads)
    names = ("preset", "seq", "rounds", "threads", "seed", "variant", "precision")
    result["settings"] = {k: getattr(options, k) for k in names}
    result["parameters"] = parameter_count(model)
    result["flops"] = flops_per_step(model.config, options.seq)
    switches = tuple(result["step"]["switches"])
    result["work"] = work_of_phases(model.config, options.seq, switches)
    if options.json != "-":
        print_tables(result)
    write_json(result, options.json)
    step = result["step"]
    if not abs(step["unexplained_ms"]) <= UNEXPLAINED * step["step_ms"]:
        sys.exit(f"the phases leave {step['unexplained_ms']:.2f} ms of the step unexplained")


if __name__ == "__main__":
    main()
