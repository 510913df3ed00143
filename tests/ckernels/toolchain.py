"""Compile C sources with the very flags of `build_lib.sh`."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "build_lib.sh"
CHECKS = sorted((ROOT / "tests" / "ckernels").glob("*.c"))
# Objects of this process, which lie in folders that outlive it: compiler, flags, source.
_compiled: dict[tuple[str, tuple[str, ...], Path], Path] = {}
PATIENCE = 900  # seconds for one compilation or one run: a hang, not slowness, ends it

# Stands in for the compiler: notes its arguments and makes the file it was asked for.
RECORDER = """#!/bin/sh
previous=
for word; do
    [ "$previous" = -o ] && : >"$word"
    previous=$word
    printf '%s\\n' "$word" >>"$ANEPY_TEST_RECORD"
done
"""


def run(
    command: Sequence[str | Path], *, env: dict[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a program in the checkout; its output is in the message if it fails."""
    result = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    if check and result.returncode != 0:
        shown = " ".join(str(word) for word in command)
        output = (result.stdout + result.stderr)[-6000:]
        pytest.fail(f"exit code {result.returncode}: {shown}\n{output}")
    return result


def library_sources() -> list[Path]:
    """Return the C files of the library."""
    return sorted((ROOT / "libsrc").rglob("*.c"))


def script_flags(folder: Path, *options: str) -> list[str]:
    """Return the flags build_lib.sh compiles every file with, given these options."""
    compiler, record = folder / "recorder", folder / "record"
    compiler.write_text(RECORDER)
    compiler.chmod(0o755)
    record.unlink(missing_ok=True)
    # The result is no library, so a later step of the script may fail; the record is complete then.
    run(
        [SCRIPT, "--quiet", "--out", folder / "recorded", *options],
        env={"CC": str(compiler), "JOBS": "1", "ANEPY_TEST_RECORD": str(record)},
        check=False,
    )
    words = record.read_text().split("\n")
    start = words.index("-std=c11", words.index("-std=c11") + 1)  # the first one tests the compiler
    return words[start : words.index("-c", start)]


def compile_files(
    compiler: str, flags: Sequence[str], sources: Iterable[Path], folder: Path
) -> list[Path]:
    """Compile sources on all processors of this process; return the objects, in the same order.

    What was compiled before, by the same compiler with the same flags, is not compiled again.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        key = (compiler, tuple(flags), source)
        if key not in _compiled:
            output = folder / (re.sub(r"\W", "-", str(source.relative_to(source.anchor))) + ".o")
            run([compiler, *flags, "-c", source, "-o", output])
            _compiled[key] = output
        return _compiled[key]

    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(compile_one, sources))


def compile_checks(compiler: str, flags: Sequence[str], folder: Path) -> list[Path]:
    """Compile the checks themselves.

    They need no speed, and gcc 12 for AArch64 dies of an internal error over two of them at -O3.
    """
    return compile_files(compiler, [*flags, "-Itests/ckernels", "-O1"], CHECKS, folder)


def link(compiler: str, flags: Sequence[str], objects: Iterable[Path], program: Path) -> Path:
    """Link a program."""
    run([compiler, *flags, "-pthread", *objects, "-o", program, "-lm"])
    return program
