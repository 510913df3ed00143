"""Training side by side with PyTorch: the same model, data and AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tolerances
from cases import GQA, SEPARATE, sequence
from tolerances import assert_tensors_close, relative_error

from anepy.engine import Engine
from anepy.model import PRESETS, Model, ModelConfig
from anepy.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra `peers`)")

Pair = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def ids(pair: Pair) -> list[Any]:
    return [torch.from_numpy(np.asarray(part, np.int64))[None] for part in pair]


def losses_of_both(
    model: Model, data: list[Pair], lr: float, accum: int = 1, **options: float
) -> tuple[list[float], list[float]]:
    """Train both on the same sequences and return their losses, step by step."""
    from peers import torch_llama

    peer = torch_llama.build(model.config, model.weights)
    adamw = torch_llama.adamw(peer, lr, options.get("weight_decay", 0.0))
    ours, theirs = [], []
    with Engine(model, "opt", "cpu", "fp32", threads=2) as engine:
        for number, pair in enumerate(data, 1):
            loss = peer.loss(*ids(pair))
            (loss / accum).backward()
            theirs.append(float(loss.detach()))
            ours.append(engine.step(*pair).loss)
            if number % accum:
                continue
            if "grad_clip" in options:
                norm = torch.nn.utils.clip_grad_norm_(peer.parameters(), options["grad_clip"])
            adamw.step()
            adamw.zero_grad()
            stats = engine.update(lr, **options)
            if "grad_clip" in options:
                assert stats.grad_norm == pytest.approx(float(norm), rel=1e-3)
    return ours, theirs


def random_pairs(config: ModelConfig, count: int) -> list[Pair]:
    """Return two sequences in turns, so that there is something to learn."""
    return [sequence(config, 33 + 32 * (n % 2)) for n in range(count)]


@pytest.mark.parametrize("config", [GQA, SEPARATE], ids=["gqa", "separate"])
@pytest.mark.parametrize(
    ("accum", "options"),
    [
        (1, {"lr": 3e-3}),
        (1, {"lr": 3e-3, "weight_decay": 0.1, "grad_clip": 0.5}),
        (4, {"lr": 3e-3, "weight_decay": 0.1}),
    ],
    ids=["plain", "decay-clip", "accumulated"],
)
def test_losses_of_twenty_updates_equal_torch(
    config: ModelConfig, accum: int, options: dict[str, float]
) -> None:
    model = Model.init(config, seed=1)
    data = random_pairs(config, 20 * accum)
    ours, theirs = losses_of_both(model, data, accum=accum, **options)
    assert ours == pytest.approx(theirs, abs=tolerances.TORCH_LOSS_20_STEPS)
    assert np.mean(ours[-5:]) < np.mean(ours[:5]) - 0.1, "nothing was learned"


def test_losses_of_fine_tuning_a_real_model_equal_torch(shared: Callable[[str], Path]) -> None:
    model = Model.load(shared("stories260K.bin"))
    tokenizer = Tokenizer.load(shared("tok512.bin"), model.config.vocab_size)
    tokens = np.array(tokenizer.encode(shared("tinyshakespeare.txt").read_text("utf-8")[:20000]))
    data = [(tokens[i : i + 128], tokens[i + 1 : i + 129]) for i in range(0, 20 * 128, 128)]
    with Engine(model, device="cpu") as engine:
        before = [engine.evaluate(*pair) for pair in data]
    ours, theirs = losses_of_both(model, data, lr=3e-4, weight_decay=0.1, grad_clip=1.0)
    assert ours == pytest.approx(theirs, abs=tolerances.TORCH_LOSS_20_STEPS)
    assert np.mean(ours[10:]) < np.mean(before[10:]) - 0.1, "nothing was learned"


@pytest.mark.parametrize("name", ["stories260K", "stories15M"])
def test_gradients_equal_torch(name: str) -> None:
    """At the size of a real model, where the float64 reference would take long."""
    from peers import torch_llama

    model = Model.init(PRESETS[name], seed=1)
    pair = sequence(model.config, 128)
    peer = torch_llama.build(model.config, model.weights)
    loss = peer.loss(*ids(pair))
    loss.backward()
    with Engine(model, "max", "cpu", "fp32", threads=2) as engine:
        assert relative_error(engine.step(*pair).loss, float(loss.detach())) < 1e-6
        # Both are rounded: twice the tolerance against exact gradients.
        found = torch_llama.gradients(peer)
        assert_tensors_close(dict(engine.gradients), found, 2 * tolerances.FP32_GRADIENT)
    assert math.isclose(float(loss.detach()), math.log(model.config.vocab_size), rel_tol=0.05)
