"""The native checks of tests/native: plain, under sanitizers, per instruction set, on AArch64."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import needs
import pytest
from native import toolchain

THREADED = ("gemm", "pool", "runtime", "engine", "batch", "handles", "weights")
ARM = ["neonbf16", "neon", "scalar"]


@dataclass(frozen=True)
class Build:
    """One way of compiling library and checks into one program."""

    name: str
    compilers: tuple[str, ...]  # the first that works is taken
    options: tuple[str, ...] = ()  # of build_lib.sh
    link: tuple[str, ...] = ()


PLAIN = Build("plain", ("cc", "gcc", "clang"))
GCC = Build("gcc", ("gcc",))
CLANG = Build("clang", ("clang",))
# clang's sanitized programs run twice as fast.
ADDRESS = Build(
    "address",
    ("clang", "gcc"),
    ("--asan", "--ubsan"),
    ("-fsanitize=address,undefined",),
)
THREAD = Build("thread", ("clang", "gcc"), ("--tsan",), ("-fsanitize=thread",))
AARCH64 = Build(
    "aarch64", ("aarch64-linux-gnu-gcc",), ("--target", "linux-aarch64-glibc"), ("-static",)
)


@dataclass(frozen=True)
class Program:
    """The result of a build."""

    path: Path
    compiler: str
    flags: list[str]
    objects: dict[Path, Path]  # source -> object


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Build], Program]:
    """Return a function that builds each kind of program once."""
    made: dict[Build, Program] = {}

    def make(build: Build) -> Program:
        if build not in made:
            folder = tmp_path_factory.mktemp(build.name)
            compiler = needs.compiler_with(build.link, build.compilers, folder)
            flags = toolchain.script_flags(folder, *build.options)
            sources = toolchain.library_sources()
            objects = toolchain.compile_files(compiler, flags, sources, folder / "library")
            checks = toolchain.compile_checks(compiler, flags, folder / "checks")
            path = toolchain.link(compiler, build.link, [*objects, *checks], folder / "run")
            by_source = dict(zip([*sources, *toolchain.CHECKS], [*objects, *checks], strict=True))
            made[build] = Program(path, compiler, flags, by_source)
        return made[build]

    return make


def assert_passes(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run the checks; fail with their output unless there were some and all passed."""
    result = toolchain.run(command, env=env, check=False)
    output = result.stdout + result.stderr
    summary = re.search(r"^(\d+) checks, 0 failures$", output, re.MULTILINE)
    assert result.returncode == 0 and summary and int(summary[1]) > 0, (
        f"{' '.join(map(str, command))}: exit code {result.returncode}\n{output[-6000:]}"
    )
    return output


# -------------------------------------------------------------------------------- every kind of run


@pytest.mark.parametrize("build", [PLAIN, CLANG], ids=lambda build: build.name)
def test_checks_optimized_as_released_pass(
    program: Callable[[Build], Program], build: Build
) -> None:
    output = assert_passes(program(build).path)
    main = (toolchain.ROOT / "tests" / "native" / "main.c").read_text()
    groups = re.findall(r'{"(\w+)", checks_\w+}', main)
    assert len(groups) > 10
    for group in groups:
        assert re.search(rf"^{group} +[1-9]\d* checks, 0 failures$", output, re.MULTILINE), group


def test_checks_under_address_and_undefined_sanitizers_pass(
    program: Callable[[Build], Program],
) -> None:
    assert_passes(program(ADDRESS).path, env={"UBSAN_OPTIONS": "print_stacktrace=1"})


def test_checks_under_thread_sanitizer_pass(program: Callable[[Build], Program]) -> None:
    path, env = program(THREAD).path, {"TSAN_OPTIONS": "die_after_fork=0:exitcode=66"}
    # Before gcc 14, ThreadSanitizer cannot place its memory where addresses are very random.
    probe = toolchain.run([path, "table"], env=env, check=False)
    unplaced = "unexpected memory mapping" in probe.stderr
    prefix = [needs.program("setarch"), "-R"] if unplaced else []
    assert_passes(*prefix, path, *THREADED, env=env)


@needs.LINUX  # qemu runs its programs
def test_checks_on_emulated_aarch64_pass(program: Callable[[Build], Program]) -> None:
    emulator = needs.program("qemu-aarch64", "qemu-aarch64-static")
    path = program(AARCH64).path
    for processor, sets in (("max", ARM), ("cortex-a72", ARM[1:])):
        listed = toolchain.run([emulator, "-cpu", processor, path, "--list"]).stdout
        assert listed.split() == sets, f"{processor} is taken for something else"
    assert_passes(emulator, "-cpu", "cortex-a72", path, "--isa", "neon", "table")
    assert_passes(emulator, "-cpu", "max", path, "--emulated")


def test_every_kernel_has_a_check() -> None:
    """The checks run over all instruction sets, here and emulated; so each kernel is in them."""
    header = (toolchain.ROOT / "libsrc" / "kernels" / "kernels.h").read_text()
    kernels = re.findall(r"\(\*(\w+)\)\(", header)
    assert len(kernels) > 25
    checks = "".join(path.read_text() for path in toolchain.CHECKS)
    assert [name for name in kernels if f"->{name}(" not in checks] == []


# ------------------------------------------------------------------------------ choices at run time


@pytest.mark.parametrize("mask", needs.KERNEL_SETS)
def test_checks_with_a_mask_run_that_set_or_the_best_below(
    program: Callable[[Build], Program], mask: str
) -> None:
    path = program(PLAIN).path
    available = toolchain.run([path, "--list"]).stdout.split()
    assert available[-1] == "scalar"
    allowed = needs.KERNEL_SETS[needs.KERNEL_SETS.index(mask) :]
    expected = next(name for name in allowed if name in available)
    groups = ("table", "engine", "batch", "handles")
    assert_passes(path, "--isa", expected, *groups, env={"ANEPY_CPU_MASK": mask})


def test_checks_without_a_mask_run_the_best_set(program: Callable[[Build], Program]) -> None:
    path = program(PLAIN).path
    best = toolchain.run([path, "--list"]).stdout.split()[0]
    assert_passes(path, "--isa", best, "table", env={"ANEPY_CPU_MASK": ""})


@pytest.mark.parametrize(("wanted", "threads"), [("1", "1"), ("3", "3"), ("100000", "256")])
def test_default_threads_are_those_of_the_environment(
    program: Callable[[Build], Program], wanted: str, threads: str
) -> None:
    env = {"ANEPY_NUM_THREADS": wanted}
    assert_passes(program(PLAIN).path, "--threads", threads, "runtime", env=env)


@needs.LINUX
def test_default_threads_respect_affinity(program: Callable[[Build], Program]) -> None:
    allowed = os.sched_getaffinity(0)
    path = program(PLAIN).path
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert_passes(path, "--threads", "1", "runtime", env={"ANEPY_NUM_THREADS": ""})
    finally:
        os.sched_setaffinity(0, allowed)


# ---------------------------------------------------------------------------- the checks can fail

# group that must notice, file, what stands there, what stands there instead
VECTORS = "kernels/vector_impl.h"
MUTATIONS = [
    ("elementwise", VECTORS, "left >= VL ? v_load(p) : v_load_n(p, left)", "v_load(p)"),
    ("elementwise", VECTORS, "    else v_store_n(p, v, left);", "    else v_store(p, v);"),
    (
        "products",
        VECTORS,
        "j < rows ? src[j * ld + p] : 0.0f",
        "j <= rows ? src[j * ld + p] : 0.0f",
    ),
    ("exp", VECTORS, "0x1.fffffcp-2f", "0x1.ffffp-2f"),
    ("adam", VECTORS, "v_fma(v_sqrt(var), c2, eps)", "v_mul(v_sqrt(var), c2)"),
    ("gemm", "kernels/gemm.c", "whole->accumulate || p > 0", "whole->accumulate"),
    ("gemm", "kernels/gemm.c", "if (p + s.k < whole->k) s.squares = NULL;", "s.squares = NULL;"),
    (
        "gemm",
        "kernels/gemm.c",
        "sum_squares(c + r * s->ldc, p.columns)",
        "sum_squares(c, p.columns)",
    ),
    ("gemm", "kernels/gemm.c", "if (k % 2 != 0) row[k] = 0;", ""),
    ("gemm", "kernels/gemm.c", "pairs[(n - 1) * COLS + j] &= 0xffff;", "(void)pairs;"),
    ("bf16", "kernels/bf16_impl.h", "(uint32_t)*high << 16 : 0)", "(uint32_t)*high << 16 : 1)"),
    ("bf16", "kernels/bf16_impl.h", "pack_pair(dst, src, NULL, n)", "pack_pair(dst, src, src, n)"),
    ("pool", "runtime/threads.c", "if (pool->serial) return NULL;", "if (0) return NULL;"),
    ("model", "model/model.c", "arena_n += t->rows * cols;", "arena_n += t->rows * cols + 1;"),
    (
        "batch",
        "train/engine.h",
        "token / e->run.tokens * e->run.padded + token % e->run.tokens",
        "token",
    ),
    ("batch", "train/loss.c", "e->room->lse[start + s] = INFINITY;", "e->room->lse[s] = INFINITY;"),
    (
        "batch",
        "train/squares.c",
        "t < anepy_running_tokens(e) && c->tied",
        "t < e->run.tokens && c->tied",
    ),
    ("handles", "runtime/fpmode.h", "(uint32_t)saved);", "(uint32_t)saved | 0x8040);"),
]


def depends(source: Path, name: str, tree: Path) -> bool:
    """Whether a source file is `name` of the tree or includes it, through other headers or not."""
    if source == tree / name:
        return True
    included = re.findall(r'#include "([^"]+)"', source.read_text())
    return any(depends(tree / path, name, tree) for path in included if (tree / path).is_file())


@needs.X86
@pytest.mark.parametrize(("group", "name", "old", "new"), MUTATIONS)
def test_checks_of_a_broken_library_fail(
    program: Callable[[Build], Program], tmp_path: Path, group: str, name: str, old: str, new: str
) -> None:
    good = program(PLAIN)
    tree = tmp_path / "libsrc"
    shutil.copytree(toolchain.ROOT / "libsrc", tree)
    text = (tree / name).read_text()
    assert text.count(old) == 1, f"{name} has changed: break something else there"
    (tree / name).write_text(text.replace(old, new))
    users = [
        source
        for source in good.objects
        if source.is_relative_to(toolchain.ROOT / "libsrc")
        and depends(source, name, toolchain.ROOT / "libsrc")
    ]
    assert users
    flags = [f"-I{tree}" if flag == "-Ilibsrc" else flag for flag in good.flags]
    broken = [tree / source.relative_to(toolchain.ROOT / "libsrc") for source in users]
    objects = toolchain.compile_files(good.compiler, flags, broken, tmp_path / "objects")
    others = [good.objects[source] for source in good.objects if source not in users]
    path = toolchain.link(good.compiler, (), [*objects, *others], tmp_path / "run")
    assert toolchain.run([path, group], check=False).returncode != 0


# --------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize("build", [GCC, CLANG, AARCH64], ids=lambda build: build.name)
def test_library_compiles_without_a_warning(build: Build, tmp_path: Path) -> None:
    compiler = needs.program(*build.compilers)
    command = [toolchain.SCRIPT, "--quiet", "--werror", "--out", tmp_path, *build.options]
    toolchain.run(command, env={"CC": compiler})


@pytest.mark.parametrize("build", [GCC, CLANG], ids=lambda build: build.name)
def test_checks_compile_without_a_warning(build: Build, tmp_path: Path) -> None:
    compiler = needs.program(*build.compilers)
    flags = toolchain.script_flags(tmp_path, "--werror")
    assert "-Werror" in flags
    toolchain.compile_checks(compiler, flags, tmp_path / "objects")
