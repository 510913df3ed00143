"""What the loaded library says about itself."""

from __future__ import annotations

import ctypes
import hashlib
from datetime import datetime, timezone
from typing import Any

from ..system import machine
from ..system.version import __version__
from . import abi, find


def library_info() -> dict[str, Any]:
    """Describe the loaded library: instruction sets, matrix kernel, compiler, threads."""
    lib = find.library()
    info = abi.LibraryInfo()
    lib.anepy_library_get_info(ctypes.byref(info))
    return {
        "isa": info.isa.decode(),
        "isa_available": info.isa_all.decode().split(),
        "gemm": info.gemm.decode(),
        "compiler": info.compiler.decode(),
        "build_id": lib.anepy_build_id().decode(),
        "abi": lib.anepy_abi_version(),
        "threads": info.threads,
        "cores": info.cores,
    }


def library_facts() -> dict[str, Any]:
    """Return `library_info()` and the SHA-256 of the file, where the file is known."""
    facts = library_info()
    if (found := find.loaded()) is not None and found.path is not None:
        facts["sha256"] = hashlib.sha256(found.path.read_bytes()).hexdigest()
    return facts


def provenance() -> dict[str, Any]:
    """Return what every record of a measurement begins with.

    Returns:
        `anepy` (version), `created` (UTC, to the second), `machine` (`machine.describe()`) and
        `library` (`library_facts()`).
    """
    return {
        "anepy": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "library": library_facts(),
    }
