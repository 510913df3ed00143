"""Time trainers that live in other programs or packages, where they are installed, beside anepy.

    python tests/peers/others.py --llm-c /path/to/llm.c/train_gpt2 --mlx

llm.c trains GPT-2 124M on 4 x 64 tokens, so only speeds are compared: 6 operations per parameter
and token. Its program is run in its own folder, where it finds its data. MLX runs the very model of
`--preset`, its loss held against anepy's. What is not there is reported as not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from common import (
    SETTLE_SECONDS,
    add_common,
    check_common,
    describe_machine,
    header,
    measured_peaks,
    progress,
    random_tokens,
    ratio,
    summary,
    timed,
    tolerances,
    write_json,
)

GPT2_PARAMETERS = 124_439_808
GPT2_TOKENS = 4 * 64


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.set_defaults(rounds=3)
    parser.add_argument("--seq", type=int, default=256, help="tokens per step (%(default)s)")
    parser.add_argument("--llm-c", type=Path, metavar="PATH", help="its compiled train_gpt2")
    parser.add_argument("--mlx", action="store_true", help="MLX, on its default device")
    parser.add_argument("--timeout", type=float, default=500.0, help="seconds for llm.c")
    options = parser.parse_args()
    check_common(parser, options)
    return options


def anepy_steps(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Make an engine, and a function that does a step and an update and returns the loss."""
    from anepy.engine import Engine
    from anepy.models.model import PRESETS, Model

    model = Model.init(PRESETS[options.preset], seed=options.seed)
    tokens, targets = random_tokens(model.config, options.seq, options.seed)
    engine = Engine(
        model, device="cpu", precision="fp32", seq_len=options.seq, threads=options.threads
    )

    def step() -> float:
        loss = engine.step(tokens, targets).loss
        engine.update(lr=1e-4, weight_decay=0.1)
        return float(loss)

    return model, engine, step


def llm_c(options: argparse.Namespace) -> dict[str, Any]:
    """Run llm.c's trainer to its end, and anepy in the shape of `--preset` behind it."""
    if options.llm_c is None or not options.llm_c.is_file():
        return {"reason": "not installed: --llm-c PATH names its train_gpt2"}
    progress("llm.c")
    try:
        finished = subprocess.run(
            [str(options.llm_c.resolve())],
            cwd=options.llm_c.resolve().parent,
            env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=options.timeout,
            check=False,
        )
        output = finished.stdout
    except subprocess.TimeoutExpired as error:  # what it did until then counts
        output = (error.stdout or b"").decode(errors="replace")
    steps = [float(ms) for ms in re.findall(r"\(took ([\d.]+) ms", output)][1:]
    if not steps:
        return {"reason": f"{options.llm_c} printed no times of steps"}
    return {"step_ms": summary(steps), "operations": 6.0 * GPT2_PARAMETERS * GPT2_TOKENS}


def mlx(options: argparse.Namespace) -> dict[str, Any]:
    """Let MLX and anepy take turns: a step with its update each."""
    if not options.mlx or importlib.util.find_spec("mlx") is None:
        return {"reason": "not installed" if options.mlx else "not asked for: --mlx"}
    import mlx_llama

    model, engine, ours = anepy_steps(options)
    tokens, targets = random_tokens(model.config, options.seq, options.seed)
    theirs = mlx_llama.trainer(model.config, model.weights, tokens, targets, 1e-4, 0.1)
    times: dict[str, list[float]] = {"anepy": [], "mlx": []}
    for turn in range(-1, options.rounds):
        losses = {}
        for name, call in (("anepy", ours), ("mlx", theirs)):
            progress(f"round {turn + 1} of {options.rounds}, {name}")
            time.sleep(SETTLE_SECONDS)
            ms, losses[name] = timed(call)
            if turn >= 0:
                times[name].append(ms)
        if not abs(losses["anepy"] - losses["mlx"]) <= tolerances.PEER_LOSS:
            raise SystemExit(f"losses differ in round {turn}: {losses}")
    engine.close()
    return {
        "device": mlx_llama.device(),
        "step_ms": {name: summary(values) for name, values in times.items()},
        "ratio": ratio(times["anepy"], times["mlx"]),
        "rounds": times,
    }


def main() -> None:
    """Measure what there is and print it."""
    from anepy.engine.flops import flops_per_step

    options = parse_arguments()
    result: dict[str, Any] = header("others")
    measured_peaks(options.threads)
    result["llm.c"], result["mlx"] = llm_c(options), mlx(options)
    model, engine, step = anepy_steps(options)
    step()
    result["anepy_ms"] = summary([timed(step)[0] for _ in range(max(3, options.rounds))])
    engine.close()
    result["peaks"] = measured_peaks(options.threads)
    result["flops"] = flops_per_step(model.config, options.seq)["total"]
    progress("")
    if options.json != "-":
        print(describe_machine(result))
        peak, anepy_ms = result["peaks"]["fp32"], result["anepy_ms"]["median"]
        rate = result["flops"] / anepy_ms / 1e6
        print(
            f"anepy, {options.preset}, {options.seq} tokens, step with update: {anepy_ms:.1f} ms, "
            f"{rate:.0f} GFLOP/s, {rate / peak:.0%} of the peak"
        )
        found = result["llm.c"]
        if "reason" in found:
            print(f"llm.c: {found['reason']}")
        else:
            ms = found["step_ms"]["median"]
            theirs = found["operations"] / ms / 1e6
            print(
                f"llm.c, GPT-2 124M, 4 x 64 tokens: {ms:.1f} ms, {theirs:.0f} GFLOP/s, "
                f"{theirs / peak:.0%} of the peak; anepy computes {rate / theirs:.1f} times as fast"
            )
        found = result["mlx"]
        if "reason" in found:
            print(f"MLX: {found['reason']}")
        else:
            spread, ms = found["ratio"], found["step_ms"]["mlx"]["median"]
            print(
                f"MLX on {found['device']}, the same model: {ms:.1f} ms; "
                f"anepy / MLX {spread['median']:.4f} ({spread['q1']:.4f} to {spread['q3']:.4f})"
            )
        print(f"command: {result['command']}")
    write_json(result, options.json)


if __name__ == "__main__":
    main()
