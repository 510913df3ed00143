"""Low-rank adapters in float64: as the weights that they come to, W + scale B A.

Source: LoRA (arXiv 2106.09685). The engine never forms that sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .llama64 import Array, Weights


def adapted(weights: Weights, adapter: Weights, scale: float) -> dict[str, npt.NDArray[Any]]:
    """Return weights in which W is W + scale B A where the adapter has `….lora_a`, `….lora_b`."""
    found = {name: _f64(tensor) for name, tensor in weights.items()}
    for name, a in adapter.items():
        if name.endswith("lora_a"):
            stem = name.removesuffix("lora_a")
            found[f"{stem}weight"] = found[f"{stem}weight"] + scale * _f64(
                adapter[f"{stem}lora_b"]
            ) @ _f64(a)
    return found


def adapter_gradients(
    gradients: Mapping[str, Array], adapter: Weights, scale: float
) -> dict[str, Array]:
    """Turn the gradients of `adapted` weights into those of an adapter.

    With W' = W + scale B A: dA = scale B^T dW' and dB = scale dW' A^T.
    """
    found = {}
    for name in adapter:
        stem, which = name.rsplit(".", 1)
        dw = scale * gradients[f"{stem}.weight"]
        a, b = _f64(adapter[f"{stem}.lora_a"]), _f64(adapter[f"{stem}.lora_b"])
        found[name] = b.T @ dw if which == "lora_a" else dw @ a.T
    return found


def _f64(tensor: npt.NDArray[Any]) -> Array:
    return np.asarray(tensor, np.float64)
