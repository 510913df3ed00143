"""Which devices there are, and which one "auto" takes, with the reason in one line."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..errors import AnepyError, CompileBudgetError, ConfigError
from ..native import abi, find
from ..system import mac

AUTO = "auto"
_ADVICE = "; use --device cpu"
T = TypeVar("T")


@dataclass(frozen=True)
class DeviceInfo:
    """A device by name; `reason` says what it is, or why it cannot be used here."""

    name: str
    usable: bool
    reason: str


def devices() -> list[DeviceInfo]:
    """List the devices this build knows, in the order in which "auto" tries them.

    "auto" takes the first usable one that an engine can be made on; `reason` says why another
    cannot be used, and `Engine.device_note` which one an engine took and why not a better one.
    The simulator stands last and is taken only by name.

    Example:
        >>> [device.name for device in devices() if device.usable]
        ['cpu', 'sim']
    """
    lib = find.library()
    found = []
    for index in range(256):
        info = abi.DeviceInfo()
        try:
            lib.anepy_device_get_info(index, ctypes.byref(info))
        except ConfigError:
            break
        name, reason = info.name.decode(), info.reason.decode()
        if name == "ane" and not info.usable:
            # A library of another architecture knows less about the Mac.
            reason = mac.obstacle() or reason
        found.append(DeviceInfo(name, bool(info.usable), reason))
    return found


def open_device(device: str, make: Callable[[str], T]) -> tuple[T, str]:
    """Make something on the device that was named, or on the first one that works for "auto".

    Args:
        device: a name, or "auto".
        make: makes it on a device, by name; raises what is wrong otherwise.

    Returns:
        What was made, and for "auto" one line about the choice, else "".

    Raises:
        AnepyError: what `make` raises, for "auto" on the last device.
    """
    if device != AUTO:
        try:
            return make(device), ""
        except ConfigError as error:
            found = next((item for item in devices() if item.name == device), None)
            if found is None or found.usable or found.reason in str(error):
                raise
            raise ConfigError(f"device {device}: {found.reason}") from error
    refused: list[str] = []
    failure: AnepyError | None = None
    for info in devices():
        if info.name == "sim":
            break
        if not info.usable:
            refused.append(refusal(info.name, info.reason))
            continue
        try:
            return make(info.name), choice_note(info.name, refused)
        except CompileBudgetError:  # a limit of this process: another device is no answer
            raise
        except AnepyError as error:
            failure = error
            refused.append(refusal(info.name, str(error)))
    if failure is not None:
        raise failure
    return make(AUTO), ""  # the library says why none is usable


def choice_note(name: str, refused: list[str]) -> str:
    """Say in one line which device "auto" took; each of `refused` says why not another."""
    return "; ".join([f"device {name}, chosen automatically", *refused])


def refusal(name: str, reason: str) -> str:
    """Say in a few words why a device is not taken."""
    reason = reason.removeprefix(f"device {name}: ").removesuffix(_ADVICE)
    return f"not {name}: {' '.join(reason.split())}"


def precision_note(precision: str, device: str, isa: str, asked: str) -> str:
    """Say in a few words why "auto" took a precision (`choose_precision` in create.c), else ""."""
    if asked != AUTO:
        return ""
    if precision == "fp16":
        return f"device {device} computes in fp16"
    if precision == "bf16" or "bf16" not in isa:
        has = "has" if precision == "bf16" else "has no"
        return f"{isa} {has} bf16 dot products"
    return "the system's library multiplies matrices in fp32"
