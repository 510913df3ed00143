"""Time one training step of anepy and of PyTorch side by side: fp32, same weights, same tokens.

Run it from the checkout, with the extra `peers` installed:

    python tests/peers/step.py                          the shape of stories110M, 256 tokens
    python tests/peers/step.py --compile --json a.json  against torch.compile, results kept
    python tests/peers/step.py --memory                 only the peak memory of anepy

Both programs live in this process and take turns, never at once; who begins changes every round.
Losses are compared in every round and all gradients before the first: numbers of a wrong program
are not printed. README.md beside this file says what exactly is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
# At the end, so that an installed anepy is preferred to the checkout around this file.
sys.path += [str(TESTS), str(TESTS.parent)]

import tolerances  # noqa: E402

# After its last task a thread pool spins for a few ms; the other program must not pay for that.
SETTLE_SECONDS = 0.05
WARM_UP_ROUNDS = 2
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.1
MEMORY_ALLOWANCE = 600e6  # bytes beside the four arenas


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="stories110M", help="model shape (%(default)s)")
    parser.add_argument("--seq", type=int, default=256, help="tokens per step (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="for both (%(default)s)")
    parser.add_argument("--variant", default="max", help="of anepy (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="PyTorch through torch.compile")
    parser.add_argument(
        "--adam", choices=("fused", "foreach"), default="fused", help="PyTorch's (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="weights and tokens (%(default)s)")
    parser.add_argument(
        "--peak", type=float, metavar="GFLOPS", help="measured FMA peak, to print shares of it"
    )
    parser.add_argument("--memory", action="store_true", help="only anepy's peak memory")
    parser.add_argument("--json", metavar="FILE", help="write the results; - for stdout, no table")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.threads < 1 or arguments.seq < 1:
        parser.error("--rounds, --threads and --seq start at 1")
    return arguments


def usable_cpus() -> int:
    """Count the CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def flops_per_step(config: Any, seq: int) -> dict[str, float]:
    """Count a step's floating-point operations as the ANE research programs do.

    Products forward, twice that backward, the attention products of the backward pass only, and
    the classifier three times: 174.2 GFLOP for stories110M at 256 tokens.
    """
    d, hidden, layers, s = config.dim, config.hidden_dim, config.n_layers, seq
    head_dim = d // config.n_heads
    kv = head_dim * config.n_kv_heads
    forward = layers * 2 * s * (2 * d * d + 2 * d * kv + 3 * d * hidden)
    attention_backward = layers * 2 * config.n_heads * 5 * s * s * head_dim
    classifier = 3 * 2 * config.vocab_size * d * s
    return {
        "forward": forward,
        "attention_backward": attention_backward,
        "classifier": classifier,
        "total": 3.0 * forward + attention_backward + classifier,
    }


def parameter_count(model: Any) -> int:
    """Count the parameters of an anepy model."""
    return sum(w.size for w in model.weights.values())


def random_tokens(config: Any, seq: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one sequence and its targets, int32, each of length `seq`."""
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, seq + 1, dtype=np.int32)
    return ids[:-1].copy(), ids[1:].copy()


# ----------------------------------------------------------------------------------- the programs


class AnepySide:
    """anepy's engine behind the two calls that are timed."""

    name = "anepy"

    def __init__(self, model: Any, tokens: np.ndarray, targets: np.ndarray, options: Any) -> None:
        from anepy.engine import Engine

        self.engine = Engine(
            model,
            variant=options.variant,
            device="cpu",
            precision="fp32",
            seq_len=options.seq,
            threads=options.threads,
        )
        self.tokens, self.targets = tokens, targets

    def prepare(self) -> None:
        """Do nothing: the first step after an update overwrites the gradients."""

    def step(self) -> float:
        """Run forward and backward; return the loss."""
        return float(self.engine.step(self.tokens, self.targets).loss)

    def update(self) -> None:
        """Apply AdamW; no view of the gradients is alive, so there is nothing to clear."""
        self.engine.update(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


class TorchSide:
    """The same in PyTorch."""

    name = "torch"

    def __init__(self, model: Any, tokens: np.ndarray, targets: np.ndarray, options: Any) -> None:
        import torch
        import torch_llama

        self.version = torch.__version__
        torch.set_num_threads(options.threads)
        self.model = torch_llama.build(model.config, model.weights)
        self.loss = (
            torch.compile(self.model.loss, dynamic=False) if options.compile else self.model.loss
        )
        self.optimizer = torch_llama.adamw(
            self.model, LEARNING_RATE, WEIGHT_DECAY, **{options.adam: True}
        )
        self.tokens = torch.from_numpy(tokens.astype(np.int64))[None]
        self.targets = torch.from_numpy(targets.astype(np.int64))[None]

    def prepare(self) -> None:
        """Drop the gradients, which is PyTorch's fastest way to clear them; not timed."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Run forward and backward; return the loss."""
        loss = self.loss(self.tokens, self.targets)
        loss.backward()
        return float(loss.item())

    def update(self) -> None:
        """Apply AdamW."""
        self.optimizer.step()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the milliseconds a call takes, and its result."""
    start = time.perf_counter()
    result = call()
    return (time.perf_counter() - start) * 1e3, result


# ------------------------------------------------------------------------------------ measurement


def check_gradients(anepy_side: AnepySide, torch_side: TorchSide) -> dict[str, float]:
    """Run one step of each, compare loss and gradients, and apply the first update.

    Returns:
        loss_difference, and gradient_error, the largest relative error of a tensor.
    """
    import torch_llama

    torch_side.prepare()
    losses = anepy_side.step(), torch_side.step()
    compare_losses(*losses, "before timing")
    actual, expected = anepy_side.engine.gradients, torch_llama.gradients(torch_side.model)
    tolerances.assert_tensors_close(actual, expected, tolerances.PEER_GRADIENT)
    worst = max(tolerances.relative_error(actual[name], expected[name]) for name in expected)
    anepy_side.update()
    torch_side.update()
    return {"loss_difference": abs(losses[0] - losses[1]), "gradient_error": worst}


def compare_losses(anepy_loss: float, torch_loss: float, when: str) -> None:
    """Stop unless both losses agree; from the second step on this also checks the updates."""
    if not abs(anepy_loss - torch_loss) <= tolerances.PEER_LOSS:
        raise SystemExit(f"losses differ {when}: anepy {anepy_loss:.6f}, torch {torch_loss:.6f}")


def measure(sides: tuple[AnepySide, TorchSide], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Let the programs take turns.

    Returns:
        program -> "step" | "update" | "loss" -> one value per timed round.
    """
    results: dict[str, dict[str, list[float]]] = {
        side.name: {"step": [], "update": [], "loss": []} for side in sides
    }
    for turn in range(-WARM_UP_ROUNDS, rounds):
        losses = {}
        for side in sides if turn % 2 == 0 else reversed(sides):
            time.sleep(SETTLE_SECONDS)
            side.prepare()
            step_ms, losses[side.name] = timed(side.step)
            update_ms, _ = timed(side.update)
            if turn >= 0:
                results[side.name]["step"].append(step_ms)
                results[side.name]["update"].append(update_ms)
                results[side.name]["loss"].append(losses[side.name])
        compare_losses(losses["anepy"], losses["torch"], f"in round {turn}")
        if sys.stderr.isatty():
            print(f"\rround {turn + 1} of {rounds} ", end="", file=sys.stderr, flush=True)
    return results


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


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Take two steps and updates with anepy alone in this process, and read the peak."""
    from anepy.model import PRESETS, Model

    model = Model.init(PRESETS[options.preset], seed=options.seed)
    tokens, targets = random_tokens(model.config, options.seq, options.seed)
    side = AnepySide(model, tokens, targets, options)
    for _ in range(2):
        side.step()
        side.update()
    arenas = 4 * 4 * parameter_count(model)
    return {
        "peak_bytes": peak_bytes(),
        "arena_bytes": arenas,
        "bound_bytes": arenas + MEMORY_ALLOWANCE,
    }


def measure_memory_apart(options: argparse.Namespace) -> dict[str, float]:
    """Run `--memory` in a process that never loads PyTorch."""
    command = [sys.executable, __file__, "--memory", "--json", "-"]
    for name in ("preset", "seq", "threads", "variant", "seed"):
        command += [f"--{name}", str(getattr(options, name))]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"the memory run failed:\n{finished.stderr}")
    result: dict[str, float] = json.loads(finished.stdout)["memory"]
    return result


# ---------------------------------------------------------------------------------------- report


def machine() -> dict[str, Any]:
    """Describe the machine."""
    model = platform.processor() or platform.machine()
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        model = subprocess.run(query, capture_output=True, text=True).stdout.strip() or model
    elif Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "system": platform.platform(),
        "load_before": [round(x, 2) for x in os.getloadavg()],
    }


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


def summarize(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Reduce the measured rounds; ratios are anepy / torch within the same round."""
    report: dict[str, Any] = {}
    for what in ("step", "update"):
        anepy_ms, torch_ms = times["anepy"][what], times["torch"][what]
        report[what] = {
            "anepy_ms": summary(anepy_ms),
            "torch_ms": summary(torch_ms),
            "ratio": summary([a / t for a, t in zip(anepy_ms, torch_ms, strict=True)]),
        }
    report["loss_difference"] = max(
        abs(a - t) for a, t in zip(times["anepy"]["loss"], times["torch"]["loss"], strict=True)
    )
    return report


def print_table(result: dict[str, Any]) -> None:
    """Print the comparison."""
    m, s, check = result["machine"], result["settings"], result["check"]
    flops = result["flops"]["total"]
    bytes_moved = 28.0 * result["parameters"]  # AdamW reads p, g, m, v and writes p, m, v in fp32
    print(f"\n{s['preset']}: {s['seq']} tokens, fp32, {s['threads']} threads, {s['rounds']} rounds")
    print(f"{m['cpu']}, {m['cpus']} CPUs, anepy uses {s['isa']}; load before {m['load_before'][0]}")
    print(f"{s['versions']}; variant {s['variant']} ({s['switches'] or 'no switches'})\n")
    print(f"{'':32}{'median':>9}{'q1':>9}{'q3':>9}{'min':>9}{'max':>9}")
    labels = {
        "step": ("forward+backward", s["torch_step"]),
        "update": ("AdamW", s["torch_update"]),
    }
    for what, (label, torch_label) in labels.items():
        row = result[what]
        for title, key in (("anepy", "anepy_ms"), (torch_label, "torch_ms")):
            print(f"{label + ' ms, ' + title:32}" + "".join(f"{row[key][c]:9.1f}" for c in COLUMNS))
        print(f"{label + ', anepy/torch':32}" + "".join(f"{row['ratio'][c]:9.3f}" for c in COLUMNS))
    print(f"\n{flops / 1e9:.1f} GFLOP per step (forward attention not counted):")
    for title, key in (("anepy", "anepy_ms"), ("torch", "torch_ms")):
        rate = flops / result["step"][key]["median"] / 1e6
        share = f", {rate / s['peak_gflops']:.0%} of the FMA peak" if s["peak_gflops"] else ""
        bandwidth = bytes_moved / result["update"][key]["median"] / 1e6
        print(f"  {title:6}{rate:8.1f} GFLOP/s{share}; AdamW moves {bandwidth:.1f} GB/s")
    print_memory(result["memory"])
    print(
        f"checked: gradients within {check['gradient_error']:.1e} of torch's, "
        f"losses of all rounds within {result['loss_difference']:.1e}"
    )
    print(f"command: {result['command']}")


COLUMNS = ("median", "q1", "q3", "min", "max")


def print_memory(memory: dict[str, float]) -> None:
    """Print anepy's peak memory beside its four arenas."""
    print(
        f"peak memory of anepy alone: {memory['peak_bytes'] / 1e6:.0f} MB "
        f"(four arenas {memory['arena_bytes'] / 1e6:.0f} MB, "
        f"bound {memory['bound_bytes'] / 1e6:.0f} MB)"
    )


def write_json(result: dict[str, Any], target: str | None) -> None:
    """Write the results where `--json` says."""
    if target == "-":
        print(json.dumps(result, indent=1))
    elif target:
        Path(target).write_text(json.dumps(result, indent=1) + "\n")


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure memory apart, check, and time both programs."""
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "memory": measure_memory_apart(options),
    }
    from anepy.model import PRESETS, Model

    model = Model.init(PRESETS[options.preset], seed=options.seed)
    tokens, targets = random_tokens(model.config, options.seq, options.seed)
    torch_side = TorchSide(model, tokens, targets, options)  # copies the untrained weights
    anepy_side = AnepySide(model, tokens, targets, options)
    engine = anepy_side.engine
    result["settings"] = {
        **{k: getattr(options, k) for k in ("preset", "seq", "rounds", "threads", "seed")},
        "variant": engine.variant,
        "switches": " ".join(engine.switches),
        "isa": engine.isa,
        "peak_gflops": options.peak,
        "torch_step": "torch.compile" if options.compile else "torch eager",
        "torch_update": f"torch {options.adam}",
        "versions": f"Python {platform.python_version()}, torch {torch_side.version}",
    }
    result["parameters"] = parameter_count(model)
    result["flops"] = flops_per_step(model.config, options.seq)
    result["check"] = check_gradients(anepy_side, torch_side)
    times = measure((anepy_side, torch_side), options.rounds)
    return {**result, **summarize(times), "rounds": times}


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.memory:
        result: dict[str, Any] = {"memory": measure_memory(options)}
        if options.json != "-":
            print_memory(result["memory"])
    else:
        result = compare(options)
        if options.json != "-":
            print_table(result)
    write_json(result, options.json)


if __name__ == "__main__":
    main()
