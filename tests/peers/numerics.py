"""What the arithmetic of the Neural Engine costs: each variant on the simulator, against float64.

    python tests/peers/numerics.py stories260K.bin tok512.bin story.txt
    python tests/peers/numerics.py stories260K.bin tok512.bin story.txt --steps 200
    python tests/peers/numerics.py --wide             2 layers of 768 channels, random weights

The first form prints, of one step, the largest relative error and the smallest cosine of any
gradient tensor; with --steps, of so many AdamW updates, how far the losses are from those of the
float64 model trained on the same windows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common  # noqa: F401 (from here on the path of what follows is known)
import numpy as np
from reference import llama64
from reference.adamw64 import adamw
from tolerances import relative_error

from anepy.engine import Engine
from anepy.models.model import Model, ModelConfig
from anepy.text.tokenizer import Tokenizer

WIDE = ModelConfig(768, 2048, 2, 12, 12, 1000, 256)
VARIANTS = ("baseline", "ane", "dynamic", "resident", "max")
NUMERICS = ("exact", "float", "flush", "fixed")
Array = np.ndarray[Any, np.dtype[Any]]


def cosine(found: Array, wanted: Array) -> float:
    x, y = found.ravel().astype(np.float64), wanted.ravel()
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), 1e-300))


def doubles(model: Model) -> dict[str, Array]:
    return {name: value.astype(np.float64) for name, value in model.weights.items()}


def gradients(make: Any, tokens: Array, targets: Array, variants: list[str]) -> None:
    """Print errors of one step."""
    model = make()
    _, wanted = llama64.loss_and_gradients(doubles(model), model.config, tokens, targets)
    print("variant    numerics  largest error  smallest cosine  tensor")
    for variant in variants:
        for numerics in NUMERICS:
            with Engine(make(), variant, f"sim:m4,numerics={numerics}", seq_len=256) as engine:
                stats = engine.step(tokens, targets)
                found = {n: g / stats.loss_scale for n, g in engine.gradients.items()}
            errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
            worst = max(errors, key=lambda name: errors[name])
            least = min(cosine(found[name], wanted[name]) for name in wanted)
            print(f"{variant:10} {numerics:8} {errors[worst]:13.2%} {least:16.6f}  {worst}")


def curves(make: Any, ids: Array, steps: int, length: int, variants: list[str]) -> None:
    """Print how far losses are from those of float64."""
    starts = np.random.default_rng(0).integers(0, len(ids) - length, steps)
    windows = [ids[start : start + length + 1] for start in starts]
    model = make()
    weights = doubles(model)
    m, v = ({name: np.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    wanted = []
    for number, window in enumerate(windows, 1):
        loss, found = llama64.loss_and_gradients(weights, model.config, window[:-1], window[1:])
        adamw(weights, found, m, v, number, lr=5e-4)
        wanted.append(loss)
    last = slice(-steps // 10, None)
    print(f"float64: {wanted[0]:.4f} to {np.mean(wanted[last]):.4f}, the mean of the last tenth")
    print("variant    numerics  furthest  last tenth  skipped")
    for variant in variants:
        for numerics in ("exact", "fixed"):
            losses, skipped = [], 0
            with Engine(make(), variant, f"sim:m4,numerics={numerics}", seq_len=256) as engine:
                for window in windows:
                    stats = engine.step(window[:-1], window[1:])
                    skipped += stats.skipped
                    losses.append(stats.loss)
                    engine.update(lr=5e-4)
            apart = np.abs(np.array(losses) / wanted - 1)
            end = np.mean(losses[last]) / np.mean(wanted[last]) - 1
            print(f"{variant:10} {numerics:8} {apart.max():9.3%} {end:+11.3%} {skipped:8}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="weights (.bin)")
    parser.add_argument("tokenizer", nargs="?")
    parser.add_argument("text", nargs="?", help="a text of some hundred tokens")
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    options = parser.parse_args()
    variants = options.variant or list(VARIANTS)
    if options.wide:
        ids = np.random.default_rng(0).integers(0, WIDE.vocab_size, 2049, dtype=np.int32)

        def make() -> Model:
            return Model.init(WIDE, seed=1)
    else:
        tokenizer = Tokenizer.load(options.tokenizer)
        ids = np.array(tokenizer.encode(Path(options.text).read_text()), np.int32)

        def make() -> Model:
            return Model.load(options.model)

    if options.steps:
        curves(make, ids, options.steps, options.length, variants)
    else:
        gradients(make, ids[:256], ids[1:257], variants)


if __name__ == "__main__":
    main()
