"""The programs that are compared: each does a step and an update of the same model and tokens."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
from common import timed, tolerances

LEARNING_RATE = 1e-5  # small: where the loss falls steeply, rounding alone parts bf16 curves
WEIGHT_DECAY = 0.1
PRECISIONS = ("fp32", "bf16")
TORCH_MODES = ("eager", "compile")


class AnepySide:
    """anepy's engine behind the two calls that are timed."""

    def __init__(
        self,
        weights: Any,
        tokens: np.ndarray,
        targets: np.ndarray,
        options: argparse.Namespace,
        precision: str,
    ) -> None:
        from anepy.engine import Engine
        from anepy.models.model import Model

        self.name, self.precision = f"anepy {precision}", precision
        self.model = Model(weights.config)
        self.model.arena[:] = weights.arena
        self.engine = Engine(
            self.model,
            variant=options.variant,
            device="cpu",
            precision=precision,
            seq_len=options.seq,
            threads=options.threads,
        )
        self.tokens, self.targets = tokens, targets
        self.stats: Any = None

    def prepare(self) -> None:
        """Do nothing: after `update` the next step overwrites the gradients."""

    def step(self) -> float:
        """Run forward and backward; return the loss."""
        self.stats = self.engine.step(self.tokens, self.targets)
        return float(self.stats.loss)

    def update(self) -> None:
        """Apply AdamW."""
        self.engine.update(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def gradients(self) -> Mapping[str, np.ndarray]:
        """Copy the gradients: a view that is held makes every later update clear them."""
        return {name: np.array(value) for name, value in self.engine.gradients.items()}


class TorchSide:
    """The same in PyTorch."""

    def __init__(
        self,
        weights: Any,
        tokens: np.ndarray,
        targets: np.ndarray,
        options: argparse.Namespace,
        precision: str,
        mode: str,
    ) -> None:
        import torch
        import torch_llama

        self.torch = torch
        self.name = f"torch {mode}" if precision == "fp32" else f"torch {mode} {precision}"
        self.precision = precision
        torch.set_num_threads(options.threads)
        self.model = torch_llama.build(weights.config, weights.weights)
        self.loss = self.model.loss
        if mode == "compile":
            self.loss = torch.compile(self.model.loss, dynamic=False)
        self.optimizer = torch_llama.adamw(
            self.model, LEARNING_RATE, WEIGHT_DECAY, **{options.adam: True}
        )
        self.tokens = torch.from_numpy(tokens.astype(np.int64))[None]
        self.targets = torch.from_numpy(targets.astype(np.int64))[None]

    def prepare(self) -> None:
        """Drop the gradients, which is PyTorch's fastest way to clear them; not timed."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> float:
        """Run forward and backward; return the loss. bf16 is autocast, PyTorch's own recipe."""
        autocast = self.torch.autocast(
            "cpu", dtype=self.torch.bfloat16, enabled=self.precision == "bf16"
        )
        with autocast:
            loss = self.loss(self.tokens, self.targets)
        loss.backward()
        return float(loss.item())

    def update(self) -> None:
        """Apply AdamW."""
        self.optimizer.step()

    def gradients(self) -> Mapping[str, np.ndarray]:
        """Return name -> gradient."""
        import torch_llama

        return torch_llama.gradients(self.model)


Side = AnepySide | TorchSide


def without_torch() -> str | None:
    """Say why there is nothing to compare with; None if there is."""
    return None if importlib.util.find_spec("torch") else "PyTorch is not installed"


def float64_gradients(weights: Any, tokens: np.ndarray, targets: np.ndarray) -> Any:
    """Compute loss and gradients in float64, with PyTorch as the calculator."""
    import torch
    import torch_llama

    model = torch_llama.build(weights.config, weights.weights, torch.float64)
    loss = model.loss(*(torch.from_numpy(t.astype(np.int64))[None] for t in (tokens, targets)))
    loss.backward()
    return float(loss.item()), torch_llama.gradients(model)


def check(side: Side, exact: Any) -> dict[str, float]:
    """Run one step of a side, hold its gradients against exact ones, and apply the first update.

    anepy has to keep the bars of its design; PyTorch only has to compute the same thing.

    Raises:
        SystemExit: a loss or a gradient is wrong.
    """
    side.prepare()
    first_ms, loss = timed(side.step)
    expected_loss, expected = exact
    found = side.gradients()
    bf16 = side.precision == "bf16"
    bar, least = (
        (tolerances.BF16_GRADIENT, tolerances.BF16_COSINE)
        if bf16
        else (
            tolerances.FP32_GRADIENT,
            None,
        )
    )
    if isinstance(side, TorchSide):
        bar, least = (tolerances.PEER_BF16_GRADIENT if bf16 else tolerances.PEER_GRADIENT), None
    largest = tolerances.PEER_BF16_LOSS if bf16 else tolerances.PEER_LOSS
    if not abs(loss - expected_loss) <= largest:
        raise SystemExit(f"{side.name}: loss {loss:.6f}, in float64 {expected_loss:.6f}")
    try:
        tolerances.assert_tensors_close(found, expected, bar, min_cosine=least)
    except AssertionError as error:
        raise SystemExit(f"{side.name}: gradients differ from float64, {error}") from None
    result = {
        "loss_difference": abs(loss - expected_loss),
        "gradient_error": max(tolerances.relative_error(found[n], expected[n]) for n in expected),
        "cosine": min(tolerances.cosine(found[n], expected[n]) for n in expected),
        "first_step_ms": first_ms,
    }
    del found
    side.update()
    return result
