"""Run by test_mpi.py on every rank: ranks train as one process does, case by case."""

from __future__ import annotations

import sys
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
from cases import GQA, NORMS, SEPARATE, make_model

from anepy.engine.stats import StepStats
from anepy.models.lora import Lora
from anepy.models.model import ModelConfig
from anepy.text.data import TokenData
from anepy.training import exchange
from anepy.training.config import TrainConfig
from anepy.training.ranks import Ranks
from anepy.training.trainer import Trainer

exchange._SLICE = exchange._PAGE  # many chunks, also of small models
TOKENS = np.random.default_rng(5).integers(0, 200, 4000)
PLAIN = TokenData.from_array(TOKENS)
MASKED = TokenData.from_array(TOKENS)
MASKED.starts = np.arange(0, 4000, 23)
MASKED.mask = (np.random.default_rng(6).random(4000) < 0.1).astype(np.uint8)
# The first norm multiplies the gradient of a row of zeros: a window that holds it overflows.
OVERFLOW, RARE, LARGE_SCALE = "overflow", 599, 2.0**20
OVERFLOWING = TokenData.from_array(np.where(np.arange(4000) % 300 == 50, RARE, TOKENS))

BASE: dict[str, Any] = {
    "lr": 1e-3, "weight_decay": 0.1, "grad_clip": 0.05, "seq": 40, "precision": "fp32",
    "device": "cpu", "accum": 2, "steps": 6, "held_out": 0.2, "eval_every": 3,
}  # fmt: skip
# name: dimensions, data, settings, and how far weights may be off, in moves of AdamW.
CASES: dict[str, tuple[ModelConfig, TokenData, dict[str, Any], float]] = {
    "full": (GQA, PLAIN, {}, 1e-4),
    "separate": (SEPARATE, PLAIN, {"batch": 3, "accum": 1}, 1e-4),
    "norms": (NORMS, PLAIN, {"recompute": True, "steps": 5}, 1e-4),
    "masks": (GQA, MASKED, {"held_out": 0.0, "eval_every": 0}, 1e-4),
    "packed": (GQA, MASKED, {"held_out": 0.0, "eval_every": 0, "pack": True}, 1e-4),
    "frozen": (SEPARATE, PLAIN, {"freeze": ("tok_embeddings*", "layers.1.*")}, 1e-4),
    "frozen norm": (GQA, PLAIN, {"freeze": ("norm.weight",)}, 1e-4),
    "lora": (GQA, MASKED, {"lora": True, "held_out": 0.0, "eval_every": 0}, 1e-4),
    "muon": (GQA, PLAIN, {"optimizer": "muon"}, 1e-3),
    "bf16 on the wire": (GQA, PLAIN, {"wire": "bf16"}, 0.05),
    "simulator": (GQA, PLAIN, {"device": "sim", "precision": "auto", "steps": 3, "accum": 1}, 1e-3),
    "moments": (GQA, PLAIN, {"moments": "bf16"}, 0.3),
    "sgd": (GQA, PLAIN, {"optimizer": "sgd", "lr": 0.1}, 1e-4),
}


def train(
    config: ModelConfig, data: TokenData, settings: TrainConfig, ranks: Ranks | None
) -> tuple[dict[str, np.ndarray], list[float], list[float], float]:
    """Return what is trained, losses, held-out losses and the last norm of the gradient."""
    lora = Lora(4, seed=1) if settings.lora else None
    with Trainer(make_model(config), data, settings, lora=lora, ranks=ranks) as trainer:
        reports = list(trainer)
        found = {name: values.copy() for name, values in trainer.engine.trained.items()}
        norms = [report.update.grad_norm for report in reports if report.update is not None]
        held = [r.held_out_loss for r in reports if r.held_out_loss is not None]
        return found, [report.loss for report in reports], held, norms[-1]


def bits(found: dict[str, np.ndarray]) -> list[bytes]:
    return [values.tobytes() for values in found.values()]


def compare(ranks: Ranks, name: str) -> str:
    """Return what one case has shown; the same words on all ranks."""
    config, data, changes, bar = CASES[name]
    settings = TrainConfig(**{**BASE, **changes})
    found, losses, held, norm = train(config, data, settings, ranks)
    again = train(config, data, settings, ranks)
    assert bits(again[0]) == bits(found) and again[1] == losses, f"{name}: other bits"
    if settings.optimizer != "muon":
        part = train(config, data, replace(settings, shard=True), ranks)
        if settings.wire == "fp32":
            assert bits(part[0]) == bits(found), f"{name}: other bits with shard"
    n = ranks.size
    alone = replace(settings, shard=False, accum=settings.accum * n, steps=settings.steps * n,
                    eval_every=settings.eval_every * n)  # fmt: skip
    if settings.batch > 1:
        alone = replace(settings, batch=settings.batch * n)
    wanted, all_losses, all_held, all_norm = train(config, data, alone, None)
    begin = dict(make_model(config).weights)
    worst = 0.0
    for key, values in wanted.items():
        moved = np.abs(values - begin.get(key, 0)).mean() + 1e-9
        worst = max(worst, float(np.abs(values - found[key]).mean() / moved))
    assert worst < bar, f"{name}: {worst:.2g} of the way"
    group = n if settings.batch == 1 else 1
    means = np.mean(np.reshape(all_losses, (-1, group)), axis=1)
    if data is PLAIN:  # else they are weighted
        np.testing.assert_allclose(losses, means, rtol=max(1e-5, bar / 10))
        np.testing.assert_allclose(held, all_held, rtol=max(1e-5, bar / 10))
    np.testing.assert_allclose(norm, all_norm, rtol=max(1e-4, bar / 2))
    crc = zlib.crc32(b"".join(bits(found)))
    told = ranks.texts({"crc": crc, "losses": losses})
    assert all(each == told[0] for each in told), f"{name}: ranks differ"
    return f"{name}: {worst:.1e}"


def overflow(ranks: Ranks) -> str:
    """Overflow on some ranks only: all skip the update, and go on as one process without it."""
    settings = TrainConfig(**BASE | {"device": "sim", "precision": "auto", "accum": 1, "seq": 30,
                                     "steps": 8, "held_out": 0.0, "eval_every": 0})  # fmt: skip
    model, other = make_model(SEPARATE), make_model(SEPARATE)
    for each in (model, other):
        each.weights["tok_embeddings.weight"][RARE] = 0.0
    own: list[bool] = []
    with Trainer(model, OVERFLOWING, settings, ranks=ranks) as trainer:
        engine = trainer.engine
        engine.restore(0, 0, LARGE_SCALE, 0)
        step = engine.step

        def watched(*arguments: Any) -> StepStats:
            stats = step(*arguments)
            own.append(stats.skipped)
            return stats

        engine.step = watched  # type: ignore[method-assign]
        losses = [report.loss for report in trainer]
        crc = zlib.crc32(b"".join(bits(engine.trained)))
        told = ranks.texts({"crc": crc, "scale": engine.loss_scale, "losses": losses})
        updates = engine.updates
    assert all(each == told[0] for each in told), "overflow: ranks differ"
    steps = list(zip(*(each["own"] for each in ranks.texts({"own": own})), strict=True))
    skipped = [any(each) for each in steps]
    assert any(any(each) and not all(each) for each in steps) and not all(skipped), steps
    assert updates == skipped.count(False), steps
    alone = replace(settings, batch=ranks.size)
    with Trainer(other, OVERFLOWING, alone) as trainer:
        for loss, left_out in zip(losses, skipped, strict=True):
            if left_out:
                trainer._loop.sampler.skip(ranks.size)
            else:
                np.testing.assert_allclose(loss, trainer.run_step().loss, rtol=1e-4)
    begin, worst = make_model(SEPARATE).weights, 0.0
    for key, values in other.weights.items():
        moved = np.abs(values - begin[key]).mean() + 1e-9
        worst = max(worst, float(np.abs(values - model.weights[key]).mean() / moved))
    assert worst < 0.01, f"overflow: {worst:.2g} of the way"
    return f"overflow: {worst:.1e}, {sum(skipped)} of {len(steps)} skipped"


if __name__ == "__main__":
    with Ranks() as job:
        for case in sys.argv[1:] or (*CASES, OVERFLOW):
            text = overflow(job) if case == OVERFLOW else compare(job, case)
            if job.first:
                print(text, flush=True)
