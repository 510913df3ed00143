"""The C checks of this folder: plain, under sanitizers, per instruction set, on AArch64."""

from __future__ import annotations

import graphlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import needs
import pytest

from ckernels import mutate, toolchain

THREADED = (
    "gemm", "pool", "runtime", "engine", "batch", "masks", "packing", "recompute", "frozen",
    "handles", "weights", "ready", "decoder", "adapters", "optimizers",
)  # fmt: skip
ARM = ["neonbf16", "neon", "scalar"]
UNMASKED = {"ANEPY_CPU_MASK": ""}  # whatever mask the tests run under


@dataclass(frozen=True)
class Build:
    """One way of compiling library and checks into one program."""

    name: str
    compilers: tuple[str, ...]  # the first that works is taken
    options: tuple[str, ...] = ()  # of build_lib.sh
    link: tuple[str, ...] = ()


PLAIN = Build("plain", ("gcc", "cc", *needs.CLANGS))
CLANG = Build("clang", needs.CLANGS)
ZIG = Build("zig", ())
# clang's sanitized programs run twice as fast.
ADDRESS = Build(
    "address",
    (*needs.CLANGS, "gcc"),
    ("--asan", "--ubsan"),
    ("-fsanitize=address,undefined",),
)
THREAD = Build("thread", (*needs.CLANGS, "gcc"), ("--tsan",), ("-fsanitize=thread",))
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
    """Return a function that builds each kind of program once; a warning fails all its tests."""
    made: dict[Build, Program] = {}

    def make(build: Build) -> Program:
        if build not in made:
            folder = tmp_path_factory.mktemp(build.name)
            compiler = needs.compiler_with(build.link, build.compilers or (zig(folder),), folder)
            flags = toolchain.script_flags(folder, "--werror", *build.options)
            assert "-Werror" in flags
            sources = toolchain.library_sources()
            objects = toolchain.compile_files(compiler, flags, sources, folder / "library")
            checks = toolchain.compile_checks(compiler, flags, folder / "checks")
            more = libgcc() if build is ZIG and needs.X86_64 else []
            path = toolchain.link(compiler, build.link, [*objects, *checks, *more], folder / "run")
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


def zig(folder: Path) -> str:
    """Return a program that is what releases are compiled with, as build_lib.sh calls it."""
    path = folder / "zig-cc"
    target = f"-target {os.uname().machine}-linux-gnu.2.17 -mcpu=baseline"
    path.write_text(f'#!/bin/sh\nexec {needs.zig()} {target} "$@"\n')
    path.chmod(0o755)
    return str(path)


def libgcc() -> list[Path]:
    """Return what `__builtin_cpu_supports`, which a check asks, needs; zig brings none."""
    gcc = needs.program("gcc", "clang")
    return [Path(toolchain.run([gcc, "-print-libgcc-file-name"]).stdout.strip())]


@pytest.mark.parametrize("build", [PLAIN, CLANG, ZIG], ids=lambda build: build.name)
def test_checks_optimized_as_released_pass(
    program: Callable[[Build], Program], build: Build
) -> None:
    """And each group has checks, each kernel is called by one, on every set that is here."""
    path = program(build).path
    output = assert_passes(path, "--kernels")
    groups = re.findall(r"^(\w+) +(\d+) checks, 0 failures$", output, re.MULTILINE)
    assert len(groups) > 10 and all(int(count) > 0 for _, count in groups), groups
    header = (toolchain.ROOT / "libsrc" / "kernels" / "kernels.h").read_text()
    bf16, _, plain = header.partition("} anepy_bf16_kernels;")
    names = set(re.findall(r"\(\*(\w+)\)\(", plain))
    assert len(names) > 25
    listed = toolchain.run([path, "--list"]).stdout
    if "bf16" in listed:
        names |= set(re.findall(r"\(\*(\w+)\)\(", bf16.rpartition("typedef struct {")[2]))
    if "amxbf16" not in listed:
        names -= {"dot_panel", "turn"}
    called = re.search(r"^kernels: (.+)$", output, re.MULTILINE)
    assert called and names - set(called[1].split()) == set()


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
    assert_passes(*prefix, path, "--brief", *THREADED, env=env)


@needs.LINUX  # qemu runs its programs
def test_checks_on_emulated_aarch64_pass(program: Callable[[Build], Program]) -> None:
    emulator = needs.program("qemu-aarch64", "qemu-aarch64-static")
    path = program(AARCH64).path
    for processor, sets in (("max", ARM), ("cortex-a72", ARM[1:])):
        command = [emulator, "-cpu", processor, path, "--list"]
        listed = toolchain.run(command, env=UNMASKED).stdout
        assert listed.split() == sets, f"{processor} is taken for something else"
    command = [emulator, "-cpu", "cortex-a72", path, "--isa", "neon", "table"]
    assert_passes(*command, env=UNMASKED)
    assert_passes(emulator, "-cpu", "max", path, "--brief", env=UNMASKED)


# ------------------------------------------------------------------------------------- the sources


def test_no_two_files_need_each_other(program: Callable[[Build], Program]) -> None:
    """Functions that files of the library take from others go one way, through any number."""
    nm, owners, wanted = needs.program("nm", package="binutils"), {}, {}
    for source, made in program(PLAIN).objects.items():
        if source.is_relative_to(mutate.LIBSRC):
            listed = toolchain.run([nm, "-P", "-g", made]).stdout
            symbols = [line.split()[:2] for line in listed.splitlines()]
            wanted[source] = {name for name, kind in symbols if kind == "U"}
            owners.update({name: source for name, kind in symbols if kind != "U"})
    arrows = {
        source: {owners[name] for name in names & owners.keys()} for source, names in wanted.items()
    }
    assert sum(map(len, arrows.values())) > 100
    graphlib.TopologicalSorter(arrows).prepare()  # raises over a circle


# ------------------------------------------------------------------------------ choices at run time


@pytest.mark.parametrize("mask", needs.KERNEL_SETS)
def test_checks_with_a_mask_run_that_set_or_the_best_below(
    program: Callable[[Build], Program], mask: str
) -> None:
    path = program(PLAIN).path
    available = toolchain.run([path, "--list"], env=UNMASKED).stdout.split()
    assert available[-1] == "scalar"
    allowed = needs.KERNEL_SETS[needs.KERNEL_SETS.index(mask) :]
    expected = next(name for name in allowed if name in available)
    masked = {"ANEPY_CPU_MASK": mask}
    listed = toolchain.run([path, "--list"], env=masked).stdout.split()
    assert listed == available[available.index(expected) :]
    groups = (
        "table", "engine", "batch", "masks", "packing", "adapters", "handles", "ready", "decoder",
    )  # fmt: skip
    assert_passes(path, "--isa", expected, *groups, env=masked)


def test_checks_without_a_mask_run_the_best_set(program: Callable[[Build], Program]) -> None:
    path = program(PLAIN).path
    best = toolchain.run([path, "--list"], env=UNMASKED).stdout.split()[0]
    assert_passes(path, "--isa", best, "table", env=UNMASKED)


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


@pytest.mark.parametrize("mutation", mutate.of("native"), ids=lambda mutation: mutation.name)
def test_checks_of_a_broken_library_fail(
    program: Callable[[Build], Program], tmp_path: Path, mutation: mutate.Mutation
) -> None:
    mutation.ask()
    good = program(PLAIN)
    made = mutate.rebuilt([mutation], good.objects, good.compiler, lambda _: good.flags, tmp_path)
    path = toolchain.link(good.compiler, (), made, tmp_path / "run")
    assert toolchain.run([path, *mutation.groups], check=False).returncode != 0


def test_every_marker_has_one_mutation() -> None:
    names = [mutation.name for mutation in mutate.MUTATIONS]
    assert sorted(mutate.markers()) == sorted(names)
    assert len(set(names)) == len(names) > 20
