"""How far the sums of a step on the simulator stay below what makes them infinite."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy.typing as npt

from ..engine.engine import Engine
from ..native import find

if TYPE_CHECKING:
    from ..models.model import Model

LIMIT = 32768.0  # docs/neural-engine.md#numerics


@dataclass(frozen=True)
class Headroom:
    """One product of a program, in all layers together.

    Attributes:
        program: the program, like ffn_fwd.
        result: what its text calls the result.
        largest: the largest magnitude of a sum; 65536 if one was infinite.
    """

    program: str
    result: str
    largest: float

    @property
    def factor(self) -> float:
        """By how much the sums may grow before one is infinite; below 1 one is."""
        return LIMIT / self.largest


def headroom(
    model: Model,
    tokens: npt.ArrayLike,
    targets: npt.ArrayLike,
    variant: str = "max",
    device: str = "sim",
    loss_scale: float | None = None,
) -> list[Headroom]:
    """Run one step on the simulator and return the products of its programs, closest first.

    Args:
        model: the model; nothing in it changes.
        tokens: ids, one sequence; targets: the ids that follow each.
        variant: as of Engine; it decides which products are on the device.
        device: "sim", with details.
        loss_scale: as of Engine: gradients, and so their sums, are larger by it.
    """
    lib = find.library()
    found: list[Headroom] = []
    with Engine(model, variant, device, loss_scale=loss_scale) as engine:
        lib.anepy_sim_watch(1)
        try:
            engine.step(tokens, targets)
        finally:
            lib.anepy_sim_watch(0)
    largest = ctypes.c_double()
    while name := lib.anepy_sim_headroom(len(found), ctypes.byref(largest)):
        program, result = name.decode().split(" ")
        found.append(Headroom(program, result, largest.value))
    return sorted(found, key=lambda item: -item.largest)
