"""Every allocation of the library fails once.

usage: python tests/reliability/allocations.py FOLDER      (builds everything there)

What fails and what must follow stands at the head of `tests/ckernels/faults/faults.c`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]

import needs  # noqa: E402
from ckernels import toolchain  # noqa: E402

CHECKS = TESTS / "ckernels"
WRAPPED = (
    "malloc", "calloc", "realloc", "posix_memalign", "free", "mmap", "munmap", "pthread_create",
)  # fmt: skip


def attack(folder: Path, stride: int = 1) -> dict[str, int]:
    """Build the program and run it; return its figures."""
    compiler, flags = needs.compiler(), toolchain.script_flags(folder, "--debug")
    sources = [CHECKS / "faults" / "faults.c", CHECKS / "fixture.c", CHECKS / "check.c"]
    objects = toolchain.compile_files(compiler, flags, toolchain.library_sources(), folder)
    own = [*flags, "-std=gnu11", "-Itests/ckernels"]
    objects += toolchain.compile_files(compiler, own, sources, folder)
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    program = toolchain.link(compiler, wraps, objects, folder / "faults")
    done = toolchain.run([program, str(stride)])
    figures: dict[str, int] = json.loads(done.stdout)
    return figures


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    print(json.dumps(attack(target)))
