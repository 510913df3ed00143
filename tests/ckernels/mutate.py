"""Mistakes put into the library, to show that the checks notice them.

A comment `/* mutate: NAME */` in libsrc marks what a mistake replaces: the operand or statement
that follows, up to the first of `; , ) ] { } ? : && ||` outside brackets, or an Objective-C label.
Every marker has one row here, and every row one marker.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import needs

from . import toolchain

LIBSRC = toolchain.ROOT / "libsrc"
MARKER = re.compile(r"/\* mutate: (\S+) \*/\s*")
END = re.compile(r"[;,)\]{}?:]|&&|\|\||\s+\w+:(?=\S)")
INCLUDE = re.compile(r'#include "([^"]+)"')


@dataclass(frozen=True)
class Mutation:
    """A mistake.

    Attributes:
        name: its marker.
        build: the checks that must notice it: "native" (test_kernels), "blas", "metal" or "bench".
        groups: their groups, or the case of the benchmark.
        new: what replaces the marked text; `{}` stands for that text.
        needs: a kernel set without which the code never runs: "amx", "bf16", "vectors" or "x86".
    """

    name: str
    build: str
    groups: tuple[str, ...]
    new: str
    needs: str = ""

    def ask(self) -> None:
        """Skip the test where the code with the mistake cannot run."""
        if self.needs == "amx":
            needs.kernel_set("amxbf16")
        elif self.needs == "bf16":
            needs.precision("bf16")
        elif self.needs == "vectors":
            needs.vector_sets()
        elif self.needs == "x86":
            needs.x86()


def native(name: str, group: str, new: str, needs: str = "") -> Mutation:
    return Mutation(name, "native", (group,), new, needs)


def blas(name: str, new: str) -> Mutation:
    return Mutation(name, "blas", ("gemm", "engine"), new)


def metal(name: str, group: str, new: str) -> Mutation:
    return Mutation(name, "metal", (group,), new)


def bench(name: str, case: str, new: str) -> Mutation:
    return Mutation(name, "bench", (case,), new, "vectors")


MUTATIONS = [
    native("vector-load-tail", "elementwise", "1", "vectors"),
    native("vector-store-tail", "elementwise", "1", "vectors"),
    native("transpose-row-limit", "products", "1", "vectors"),
    native("random-rounding", "half", "0", "vectors"),
    native("exp-coefficient", "exp", "{} * 0.9999f", "vectors"),
    native("adam-eps", "adam", "v_set(0.0f)", "vectors"),
    native("fixed-least", "fixed", "124", "vectors"),
    native("fixed-halves", "fixed", "0", "vectors"),
    native("fixed-limit", "fixed", "0x1p30", "vectors"),
    native("gemm-later-part-adds", "gemm", "0"),
    native("gemm-squares-of-last-part", "gemm", "1"),
    native("gemm-piece-squares", "gemm", "2 * {}"),
    native("gemm-odd-row", "gemm", "0", "bf16"),
    native("gemm-odd-column", "gemm", "0", "bf16"),
    native("zip-odd-row", "bf16", "1", "bf16"),
    native("amx-last-units", "bf16", "0", "amx"),
    native("pack-odd-row", "bf16", "src", "bf16"),
    native("arena-size", "model", "{} + 1"),
    native("loss-padding", "batch", "s"),
    native("squares-tokens", "batch", "e->run.tokens"),
    native("packed-positions", "packing", "1"),
    native("packed-mask", "packing", "0"),
    native("packed-first", "packing", "b->at.block > 0"),
    native("recompute-held", "recompute", "0"),
    native("frozen-rows", "frozen", "0"),
    native("frozen-update", "frozen", "at - tensor->offset"),
    native("pool-serial", "pool", "0"),
    native("ready-last-group", "ready", "1"),
    native("ready-done", "ready", "1"),
    native("join-lost", "ready", "scale / own"),
    native("update-lent", "ready", "1"),
    native("fpmode-given-back", "handles", "{} | 0x8040", "x86"),
    blas("blas-one-thread", "0"),
    blas("blas-threads-given-back", "0"),
    blas("blas-transposed-b", "0"),
    blas("blas-accumulate", "0"),
    blas("blas-first-row", "0"),
    blas("blas-last-piece", "0"),
    blas("blas-row-squares", ""),
    metal("dw-last-of-layer", "numbers", "!({})"),
    metal("dw-wait-for-gpu", "numbers", "0"),
    metal("dw-keeps-captures", "numbers", "0"),
    metal("step-damaged", "faults", "0"),
    metal("metal-accumulate", "numbers", "1"),
    metal("metal-new-depth", "numbers", "0"),
    metal("metal-depth", "numbers", "1"),
    metal("metal-release-buffer", "steady", "(void)i"),
    metal("metal-broken", "faults", ""),
    metal("metal-release-group", "faults", ""),
    metal("metal-round-up", "steady", "1"),
    metal("metal-aligned", "steady", "0"),
    bench("tile-start", "wo_", "i == 0 && j == 0 ? 1.0f : {}"),
    bench("adam-variance", "adam", "i == 0 ? v_add({}, v_set(1e-3f)) : {}"),
    bench("half-value", "to_fp16", "i == 0 ? v_add({}, v_set(1.0f)) : {}"),
    bench("swiglu-gate", "swiglu", "i == 0 ? v_set(NAN) : {}"),
]


def of(build: str) -> list[Mutation]:
    """Return the mistakes that this build must notice."""
    return [mutation for mutation in MUTATIONS if mutation.build == build]


def files(tree: Path = LIBSRC) -> list[Path]:
    """Return all sources and headers."""
    return sorted(path for path in tree.rglob("*") if path.suffix in (".c", ".h", ".m"))


def markers() -> list[str]:
    """Return the markers of the library, as often as they stand there."""
    return [name for path in files() for name in MARKER.findall(path.read_text())]


def marked_end(text: str, start: int) -> int:
    """Return where the operand or statement that begins at `start` ends."""
    depth, at = 0, start
    while depth > 0 or not END.match(text, at):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        at += 1
    return at


def mutate(tree: Path, mutation: Mutation) -> Path:
    """Make the mistake in a copy of the sources; return the file it is in."""
    found = [
        (path, match)
        for path in files(tree)
        for match in MARKER.finditer(path.read_text())
        if match[1] == mutation.name
    ]
    assert len(found) == 1, f"{len(found)} markers /* mutate: {mutation.name} */ in libsrc"
    path, match = found[0]
    text = path.read_text()
    end = marked_end(text, match.end())
    old = text[match.end() : end]
    assert old.strip(), f"nothing follows /* mutate: {mutation.name} */"
    path.write_text(text[: match.end()] + mutation.new.replace("{}", old) + text[end:])
    return path


def users(tree: Path, changed: Path) -> set[Path]:
    """Return the file and all that include it, directly or through other headers."""
    included = {path: set(INCLUDE.findall(path.read_text())) for path in files(tree)}
    found, new = {changed}, {changed}
    while new:
        names = {str(path.relative_to(tree)) for path in new}
        new = {path for path, others in included.items() if others & names} - found
        found |= new
    return found


def rebuilt(
    mutations: Sequence[Mutation],
    objects: dict[Path, Path],
    compiler: str,
    flags: Callable[[Path], Sequence[str]],
    folder: Path,
) -> list[Path]:
    """Return the objects of a program whose library has the mistakes.

    Args:
        mutations: the mistakes.
        objects: those of the right program, by source.
        compiler: what compiles the sources that the mistakes touch once more.
        flags: gives the flags that a source of the library was compiled with.
        folder: for copies and objects.
    """
    tree = folder / "libsrc"
    shutil.copytree(LIBSRC, tree)
    again: set[Path] = set()
    for mutation in mutations:
        changed = users(tree, mutate(tree, mutation))
        touched = {LIBSRC / path.relative_to(tree) for path in changed} & objects.keys()
        assert touched, f"nothing that is compiled has {mutation.name}"
        again |= touched
    return [
        compile_in(tree, compiler, flags(source), source, folder) if source in again else made
        for source, made in objects.items()
    ]


def compile_in(tree: Path, compiler: str, flags: Iterable[str], source: Path, folder: Path) -> Path:
    """Compile the copy of a source in this tree. A mistake may leave a variable without use."""
    words = [f"-I{tree}" if flag == "-Ilibsrc" else flag for flag in flags if flag != "-Werror"]
    copy = tree / source.relative_to(LIBSRC)
    return toolchain.compile_files(compiler, words, [copy], folder / "objects")[0]
