"""How matrices may be stored, by name. Imports nothing heavy, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..errors import ConfigError

# By name, the number in C. "q8" is GGUF's Q8_0.
STORAGES: Mapping[str, int] = MappingProxyType({"f32": 0, "bf16": 2, "q8": 3})

MOMENTS = ("f32", "bf16")  # of optimizers


def check_storage(storage: str, also: tuple[str, ...] = ()) -> str:
    """Return the name of a storage.

    Raises:
        ConfigError: there is none of that name.
    """
    known = (*also, *STORAGES)
    if storage not in known:
        raise ConfigError(f"storage is {storage!r}, expected {', '.join(known)}")
    return storage
