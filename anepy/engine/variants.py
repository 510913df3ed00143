"""Variants: named sets of switches, and what the switches stand for on a device."""

from __future__ import annotations

import ctypes
from collections.abc import Collection

from ..errors import ConfigError
from ..models.model import Model
from ..native import find
from .device import AUTO
from .handle import encoded


def variants(device: str = AUTO) -> dict[str, tuple[str, ...]]:
    """Return the switches of every named variant that makes sense on a device."""
    lib = find.library()
    found: dict[str, tuple[str, ...]] = {}
    index = 0
    while (name := lib.anepy_variant_name(index)) is not None:
        index += 1
        switches = ctypes.c_uint32()
        try:
            lib.anepy_variant_parse(name, device.encode(), None, ctypes.byref(switches))
        except ConfigError:
            continue
        found[name.decode()] = named_switches(lib, switches.value)
    return found


def variant_switches(text: str, device: str = AUTO, model: Model | None = None) -> tuple[str, ...]:
    """Return the switches that a variant stands for on a device.

    Args:
        text: a variant, with any of +switch and -switch behind it.
        device: a device.
        model: what is to be trained; None: one that every switch takes.

    Raises:
        UnsupportedError: one of them means nothing on this device, or does not take this model.
        ConfigError: an unknown variant, switch or device.
    """
    lib = find.library()
    switches = ctypes.c_uint32()
    handle = model.table.handle if model is not None else None
    lib.anepy_variant_parse(encoded(text), encoded(device), handle, ctypes.byref(switches))
    return named_switches(lib, switches.value)


def switch_names() -> tuple[str, ...]:
    """Return every switch there is, on whatever device."""
    lib = find.library()
    names = (lib.anepy_switch_name(index) for index in range(32))
    return tuple(name.decode() for name in names if name is not None)


def named_switches(lib: ctypes.CDLL, bits: int) -> tuple[str, ...]:
    """Return the names of the switches whose bits are set."""
    return tuple(lib.anepy_switch_name(i).decode() for i in range(32) if bits >> i & 1)


def gradients_lag(switches: Collection[str]) -> bool:
    """Say whether gradients belong to the weights one update earlier (background_compile)."""
    return "background_compile" in switches and "dynamic_weights" not in switches
