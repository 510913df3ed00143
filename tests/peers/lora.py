"""Time one LoRA training step of anepy and of PyTorch with PEFT side by side: same weights, tokens.

Run it from the checkout, with the extra `peers` installed:

    python tests/peers/lora.py                                SmolLM2-135M's shape, 512 tokens, fp32
    python tests/peers/lora.py --precision bf16 --base bf16   against autocast
    python tests/peers/lora.py --model model.gguf             a real model
    python tests/peers/lora.py --memory-only --base bf16 --recompute --seq 2048
    python tests/peers/lora.py --alone --shape tinyllama --base q8 --recompute --seq 1024 --rounds 2

Both train all seven projections of a layer with one sequence per step and AdamW on the adapter.
They take turns in this process; gradients of A and B and losses are compared before anything is
timed, losses in every round. Peak memory is that of two processes of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    COLUMNS,
    SETTLE_SECONDS,
    WARM_UP_ROUNDS,
    describe_machine,
    header,
    peak_bytes,
    progress,
    random_tokens,
    ratio,
    report,
    summary,
    timed,
    usable_cpus,
)

# Of their config.json; the context is what is trained on, not what they know.
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "dim": 576, "hidden_dim": 1536, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3,
        "vocab_size": 49152, "rope_theta": 100000.0, "tied": True,
    },
    "tinyllama": {
        "dim": 2048, "hidden_dim": 5632, "n_layers": 22, "n_heads": 32, "n_kv_heads": 4,
        "vocab_size": 32000, "tied": False,
    },
}  # fmt: skip
LEARNING_RATE = 1e-5
# Largest relative error, least cosine. On random tokens a real model's gradients are badly
# conditioned: in fp32 PEFT's own are 1e-3 from those in float64. test_peft.py is strict.
GRADIENTS = {"fp32": (5e-3, 0.9999), "bf16": (0.2, 0.98)}
LOSSES = {"fp32": 1e-4, "bf16": 3e-2}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="(%(default)s)")
    parser.add_argument("--model", type=Path, help="instead of random weights of that shape")
    parser.add_argument("--seq", type=int, default=512, help="tokens per step (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of both")
    parser.add_argument("--base", default="f32", help="how anepy stores the base: f32, bf16, q8")
    parser.add_argument("--recompute", action="store_true", help="anepy computes again")
    parser.add_argument(
        "--attention", default="sdpa", help="of transformers: sdpa, its faster one, or eager"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="of both (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="weights, tokens (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results; - for stdout, no table")
    parser.add_argument("--memory-only", action="store_true", help="no times")
    parser.add_argument("--alone", action="store_true", help="anepy without PEFT: memory, time")
    parser.add_argument("--side", choices=("anepy", "peft"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def load(options: argparse.Namespace, storage: str = "f32") -> Any:
    """Return the model that is adapted, in anepy."""
    from anepy.models.model import Model, ModelConfig

    if options.folder is not None:
        return Model.load(options.folder / "base", storage=storage)
    if options.model is not None:
        return Model.load(options.model, storage=storage)
    config = ModelConfig(**SHAPES[options.shape], seq_len=options.seq)
    return Model.init(config, seed=options.seed, storage=storage)


def write_models(options: argparse.Namespace, folder: Path) -> None:
    """Write base and adapter where both sides read them; B is not zero, so that A has gradients."""
    from anepy.models.lora import Lora

    model = load(options)
    model.save(folder / "base")
    lora = Lora(rank=options.rank, alpha=2 * options.rank, seed=options.seed)
    lora.attach(model.config)
    random = np.random.default_rng(options.seed)
    for name, values in lora.weights.items():
        if name.endswith("lora_b"):
            values[...] = random.normal(0.0, 0.02, values.shape)
    lora.save(folder / "adapter")


class AnepySide:
    """anepy's engine with an adapter."""

    def __init__(self, options: argparse.Namespace) -> None:
        from anepy.engine.engine import Engine
        from anepy.models.lora import Lora

        base = "" if options.base == "f32" else f", base {options.base}"
        again = ", recompute" if options.recompute else ""
        self.name = f"anepy {options.precision}{base}{again}"
        self.lora = Lora(options.rank, 2 * options.rank, seed=options.seed)
        if options.folder is not None:
            self.lora = Lora.load(options.folder / "adapter")
        self.engine = Engine(
            load(options, options.base),
            device="cpu",
            precision=options.precision,
            seq_len=options.seq,
            threads=options.threads,
            lora=self.lora,
            recompute=options.recompute,
        )
        config = self.engine.model.config
        self.tokens, self.targets = random_tokens(config, options.seq, options.seed)

    def prepare(self) -> None:
        """Do nothing: after `update` the next step overwrites the gradients."""

    def step(self) -> float:
        """Run forward and backward; return the loss."""
        return float(self.engine.step(self.tokens, self.targets).loss)

    def update(self) -> None:
        """Apply AdamW to the adapter."""
        self.engine.update(lr=LEARNING_RATE)

    def gradients(self) -> dict[str, np.ndarray]:
        """Copy the gradients of A and B."""
        return {name: np.array(value) for name, value in self.engine.gradients.items()}


class PeftSide:
    """The same in PyTorch, transformers and PEFT."""

    def __init__(self, options: argparse.Namespace) -> None:
        import peft
        import torch
        import transformers

        torch.set_num_threads(options.threads)
        self.torch, self.precision = torch, options.precision
        self.name = f"peft {options.precision} {options.attention}"
        base = transformers.AutoModelForCausalLM.from_pretrained(
            options.folder / "base", dtype=torch.float32, attn_implementation=options.attention
        )
        base.config.use_cache = False
        self.model = peft.PeftModel.from_pretrained(
            base, options.folder / "adapter", is_trainable=True
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
        tokens, targets = random_tokens(base.config, options.seq, options.seed)
        self.tokens = torch.from_numpy(tokens.astype(np.int64))[None]
        self.targets = torch.from_numpy(targets.astype(np.int64))

    def prepare(self) -> None:
        """Drop the gradients, which is PyTorch's fastest way to clear them; not timed."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Run forward and backward; return the loss. bf16 is autocast, PyTorch's own recipe."""
        torch = self.torch
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.model(input_ids=self.tokens).logits[0]
            loss = torch.nn.functional.cross_entropy(logits.float(), self.targets)
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        """Apply AdamW to the adapter."""
        self.optimizer.step()

    def gradients(self) -> dict[str, np.ndarray]:
        """Return the gradients of A and B under anepy's names, rows in its order."""
        from anepy.models import tensors
        from anepy.models.lora import Lora

        config = load_config(self.model)
        lora = Lora(rank=1)
        lora.attach(config)
        named = dict(self.model.named_parameters())
        found = {}
        for tensor in tensors.tensors(config):
            for letter in "AB":
                theirs = tensor.hugging_face.removesuffix("weight")
                key = f"base_model.model.{theirs}lora_{letter}.default.weight"
                if key not in named:
                    continue
                values = named[key].grad.numpy()
                if letter == "B" and tensor.heads:
                    values = tensors.from_half_split(values, tensor.heads)
                stem = tensor.name.removesuffix("weight")
                found[f"{stem}lora_{letter.lower()}"] = values
        return found


def load_config(model: Any) -> Any:
    """Return the dimensions of a model of transformers."""
    from anepy.models import hf_config

    with tempfile.TemporaryDirectory() as folder:
        model.base_model.model.config.save_pretrained(folder)
        return hf_config.read(Path(folder) / "config.json")


SIDES = {"anepy": AnepySide, "peft": PeftSide}


def check(sides: list[Any], precision: str) -> dict[str, float]:
    """Compare losses and gradients of one step; stop if they differ."""
    losses, gradients = [], []
    for side in sides:
        progress(f"checking {side.name}")
        side.prepare()
        losses.append(side.step())
        gradients.append(side.gradients())
        side.update()
    if not abs(losses[0] - losses[1]) <= LOSSES[precision]:
        raise SystemExit(f"losses differ: {losses}")
    ours, theirs = gradients
    if set(ours) != set(theirs):
        raise SystemExit(f"other tensors are trained: {sorted(set(ours) ^ set(theirs))[:4]}")
    error = cosine = 0.0
    least = 1.0
    for name, expected in theirs.items():
        a, b = ours[name].ravel().astype(float), expected.ravel().astype(float)
        error = max(error, float(np.linalg.norm(a - b) / np.linalg.norm(b)))
        cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        least = min(least, cosine)
    largest, smallest = GRADIENTS[precision]
    if not (error <= largest and least >= smallest):
        raise SystemExit(f"gradients differ: {error:.2e}, cosine {least:.6f}")
    return {"gradient_error": error, "cosine": least, "loss_difference": abs(losses[0] - losses[1])}


def measure(sides: list[Any], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Let both take turns; program -> "step" | "update" -> milliseconds of each timed round."""
    times: dict[str, dict[str, list[float]]] = {s.name: {"step": [], "update": []} for s in sides}
    for turn in range(-WARM_UP_ROUNDS, options.rounds):
        losses = []
        for side in sides if turn % 2 else sides[::-1]:
            progress(f"round {turn + 1} of {options.rounds}, {side.name}")
            time.sleep(SETTLE_SECONDS)
            side.prepare()
            step_ms, loss = timed(side.step)
            update_ms, _ = timed(side.update)
            losses.append(loss)
            if turn >= 0:
                times[side.name]["step"].append(step_ms)
                times[side.name]["update"].append(update_ms)
        if not abs(losses[0] - losses[1]) <= LOSSES[options.precision]:
            raise SystemExit(f"losses differ in round {turn}: {losses}")
    progress("")
    return times


def memory_of(options: argparse.Namespace, side: str, folder: Path) -> float:
    """Return the peak memory of a process that takes two steps and updates."""
    words = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    for name in ("seq", "precision", "base", "attention", "threads", "seed"):
        words += [f"--{name}", str(getattr(options, name))]
    words += ["--recompute"] if options.recompute else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the memory run of {side} failed:\n{done.stderr}")
    return float(json.loads(done.stdout))


def run_alone(options: argparse.Namespace) -> None:
    """Take two steps and updates with one side, and print the peak memory."""
    side = SIDES[options.side](options)
    for _ in range(2):
        side.prepare()
        side.step()
        side.update()
    print(json.dumps(peak_bytes()))


def measure_alone(options: argparse.Namespace) -> None:
    """Take steps with anepy alone; print the peak memory, that of the model included."""
    side = AnepySide(options)
    times = []
    for _ in range(options.rounds):
        times.append(timed(side.step)[0])
        side.update()
    count = side.engine.model.n_parameters
    print(
        f"{side.name}: {count / 1e6:.0f} M parameters, {options.seq} tokens, "
        f"{summary(times)['median']:.0f} ms a step, peak memory {peak_bytes() / 1e6:.0f} MB"
    )


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Write the models, measure memory apart, check, and time both."""
    result: dict[str, Any] = header("lora")
    names = (
        "seed",
        "seq",
        "rank",
        "precision",
        "base",
        "recompute",
        "attention",
        "threads",
        "rounds",
    )
    result["settings"] = {name: getattr(options, name) for name in names}
    result["settings"]["model"] = str(options.model or f"random weights, {options.shape}")
    with tempfile.TemporaryDirectory(prefix="anepy-lora-") as name:
        write_models(options, Path(name))
        options.folder = Path(name)
        progress("peak memory")
        result["memory"] = {side: memory_of(options, side, options.folder) for side in SIDES}
        if options.memory_only:
            return result
        sides = [make(options) for make in SIDES.values()]
        result["check"] = check(sides, options.precision)
        times = measure(sides, options)
    ours, theirs = (times[side.name] for side in sides)
    result["programs"] = {
        name: {what: summary(values) for what, values in each.items()}
        for name, each in times.items()
    }
    result["ratio"] = {what: ratio(ours[what], theirs[what]) for what in ("step", "update")}
    together = [
        [a + b for a, b in zip(t["step"], t["update"], strict=True)] for t in (ours, theirs)
    ]
    result["ratio"]["together"] = ratio(*together)
    result["rounds"] = times
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the comparison."""
    s, memory = result["settings"], result["memory"]
    print(f"\n{s['model']}: LoRA of rank {s['rank']}, {s['seq']} tokens, {s['threads']} threads")
    print(describe_machine(result))
    if "programs" in result:
        print(f"\n{'':42}" + "".join(f"{c:>9}" for c in COLUMNS))
        for what, label in (("step", "forward+backward"), ("update", "AdamW")):
            for name, row in result["programs"].items():
                print(
                    f"{label + ' ms, ' + name:42}"
                    + "".join(f"{row[what][c]:9.1f}" for c in COLUMNS)
                )
        for what, row in result["ratio"].items():
            print(f"{'anepy / peft, ' + what:42}" + "".join(f"{row[c]:9.3f}" for c in COLUMNS))
        found = result["check"]
        print(
            f"gradients of A and B within {found['gradient_error']:.1e} of PEFT's, cosine "
            f"{found['cosine']:.6f}"
        )
    print(
        f"peak memory: anepy {memory['anepy'] / 1e6:.0f} MB, peft {memory['peft'] / 1e6:.0f} MB: "
        f"{memory['anepy'] / memory['peft']:.3f}"
    )
    print(f"command: {result['command']}")


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.alone:
        measure_alone(options)
        return
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{name} is not installed: pip install 'anepy[peers]'")
    if options.side:
        run_alone(options)
        return
    result = compare(options)
    report(result, options.json, print_table)


if __name__ == "__main__":
    main()
