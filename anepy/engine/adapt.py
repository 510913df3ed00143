"""What probes found about this machine, and what the library does differently because of it.

A finding becomes a detail of the device, the words behind its colon that libsrc/device/traits.h
reads. It is kept in the user cache for this machine and this build of the system, and added when an
engine is made on device "ane" without details; other devices do not read the cache.

`ADAPTATIONS` lists all findings that change something. The others need not: programs declare their
surfaces in ascending order of their names, so both ways to bind them agree; loss scaling counts a
saturated value as an overflow; norms sum by a convolution with ones, not by reduce_sum; no program
slices its last axis.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..native import trust
from ..system import download, machine
from ..system.files import parsed, replacing

DEVICE = "ane"
SCHEMA = 2  # of the record; one of another schema is as good as none


@dataclass(frozen=True)
class Adaptation:
    """How the values of one probe become a detail of the device.

    Attributes:
        probe: its name.
        detail: of the device, or "" if the default fits.
        because: what the library does then.
    """

    probe: str
    detail: Callable[[Mapping[str, Any]], str]
    because: str


def _surface(values: Mapping[str, Any]) -> str:
    smallest = int(values["smallest"])
    return f"surface={smallest}" if smallest > 65536 else ""


ADAPTATIONS = (
    Adaptation(
        "dialect",
        lambda v: "dialect=1.0" if v["1.0"] and not v["1.3"] else "",
        "programs are written in the older dialect",
    ),
    Adaptation(
        "procedures",
        lambda v: "" if v["usable"] else "procedures=no",
        "each program is compiled on its own, with restarts when the budget is used up",
    ),
    Adaptation(
        "budget",
        lambda v: f"budget={v['limit']}" if v["limit"] else "",
        "a process compiles no more programs than that",
    ),
    Adaptation("floor", _surface, "surfaces are multiples of this size"),
    Adaptation(
        "reuse",
        lambda v: "" if v["right"] else "reuse=no",
        "nothing that an earlier run compiled is loaded",
    ),
)


def adaptations(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the details that follow from the results of probes, and what each does.

    Args:
        results: `probes` of a record (hardware/ask.py). A probe without an answer changes nothing.
    """
    answers = {item["name"]: item["values"] for item in results if item["values"]}
    found = []
    for item in ADAPTATIONS:
        if item.probe in answers and (detail := item.detail(answers[item.probe])):
            found.append({"detail": detail, "because": item.because})
    return found


def path(device: str) -> Path:
    """Return where the record of a device is kept, for this machine and build of the system."""
    _, build = machine.macos()
    model = machine.sysctl("hw.model") or platform.machine()
    words = (device, model, build or platform.release())
    return download.cache_dir() / "probe" / (re.sub(r"[^\w.]+", "-", "-".join(words)) + ".json")


def store(record: Mapping[str, Any]) -> Path:
    """Keep a record and return where.

    Raises:
        OSError: it cannot be written.
    """
    target = path(record["device"])
    trust.make_private(target.parent)  # the cache is where libraries are looked for, too
    with replacing(target) as file:
        file.write(json.dumps(record, indent=2).encode())
    return target


def stored(device: str) -> dict[str, Any] | None:
    """Return what was kept for a device on this machine and system, None if nothing readable is."""
    with contextlib.suppress(OSError, ValueError):
        record = parsed(path(device).read_text("utf-8"))
        if isinstance(record, dict) and record.get("schema") == SCHEMA:
            return record
    return None


def adapted(device: str) -> str:
    """Return a device with the details that are known of this machine, if none are given."""
    if device != DEVICE:
        return device
    record = stored(device)
    details = ",".join(item["detail"] for item in record["adapts"]) if record else ""
    return f"{device}:{details}" if details else device
