"""How much arithmetic a step is."""

from __future__ import annotations

import ctypes

from ..models.freezing import Freeze
from ..models.lora import Lora
from ..models.model import ModelConfig, TensorTable
from ..native import abi


def flops_per_step(
    config: ModelConfig,
    seq: int,
    batch: int = 1,
    freeze: Freeze = (),
    lora: Lora | None = None,
) -> dict[str, int]:
    """Count the floating-point operations of one step in matrix products, two per multiply-add.

    Counted as the research programs do (docs/neural-engine.md#flops).

    Args:
        config: dimensions of the model.
        seq: tokens of each sequence.
        batch: sequences per step.
        freeze: tensors that are not trained, as for `Engine`: products that they save do not count.
        lora: an adapter that alone is trained: its products count, and those with weights that are
            still made.

    Returns:
        FLOPs of `fwd`, `bwd_dx` and `bwd_dw` (matrix products of the layers), `sdpa_bwd`,
        `classifier` and their `total`. Attention products of the forward pass are not counted.
    """
    table, flops = TensorTable(config, freeze, lora), abi.Flops()
    table.lib.anepy_step_flops(table.handle, ctypes.byref(flops), batch, seq)
    return {
        "fwd": int(flops.forward),
        "bwd_dx": int(flops.backward_dx),
        "bwd_dw": int(flops.backward_dw),
        "sdpa_bwd": int(flops.attention),
        "classifier": int(flops.classifier),
        "total": int(flops.total),
    }
