"""Compiling the Objective-C of the Apple devices on Linux: clang, GNUstep, our stand-ins."""

from __future__ import annotations

import re
from pathlib import Path

import needs

from . import toolchain

STANDIN = toolchain.ROOT / "tests" / "apple" / "standin"
LIBRARIES = ["-lgnustep-base", "-lobjc", "-lm"]


def compiler() -> str:
    """Return a clang, or skip: gcc's Objective-C has no autorelease pools."""
    needs.program("gnustep-config", package="gnustep-devel")
    return needs.program(*needs.CLANGS)


def objc_flags(folder: Path) -> list[str]:
    """Return what Objective-C files need beside the flags of the C files."""
    headers = next(iter(sorted(Path("/usr/lib/gcc").glob("*/*/include/objc"), reverse=True)), None)
    headers = needs.file(headers, "the headers of gcc's Objective-C", "gobjc")
    # Only these: the folder holds gcc's own stddef.h and the like as well.
    link = folder / "objc-runtime" / "objc"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(headers)
    shown = toolchain.run(["gnustep-config", "--objc-flags"]).stdout.split()
    given = [word for word in shown if re.match(r"-D|-fexceptions|-fobjc|-fconstant", word)]
    system = [word[2:] for word in shown if re.match(r"-I/usr", word)]
    return [
        *(word for word in given if not re.match(r"-DGS(WARN|DIAGNOSE)", word)),
        "-fobjc-runtime=gcc",
        "-D_GNU_SOURCE",
        *(word for path in [str(link.parent), *system] for word in ("-isystem", path)),
        f"-I{STANDIN / 'include'}",
    ]
