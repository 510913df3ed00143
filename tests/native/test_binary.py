"""Gates on the library as users get it: symbols, needs, instructions, and what loading it does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import binary
import needs
import pytest
from binary import Instruction, Library
from ckernels import toolchain

pytestmark = needs.LINUX  # reads ELF files

HEADER = toolchain.ROOT / "libsrc" / "anepy.h"
COMPILERS = ["gcc", "clang"]


@pytest.fixture(scope="session", params=COMPILERS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Build the library as released, once per compiler."""
    compiler = needs.program(request.param)
    for tool in ("readelf", "objdump"):
        needs.program(tool, package="binutils")
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--quiet", "--werror", "--out", folder]
    toolchain.run([toolchain.SCRIPT, *options], env={"CC": compiler})
    return Library(folder / "libanepy.so")


def whole() -> str:
    """Return anepy.h and the part of it that it includes."""
    return binary.public_header(HEADER.parent)


# ---------------------------------------------------------------------------------- symbols, needs


def test_library_exports_what_the_header_declares_and_nothing_else(library: Library) -> None:
    assert len(binary.declarations(whole())) > 20
    assert library.wrong_exports(whole()) == []
    assert library.wrong_exports("ANEPY_API int anepy_new(void);")[0].endswith("not declared")


def test_library_needs_the_platform_only(library: Library) -> None:
    assert library.foreign_needs() == []


def test_library_runs_on_systems_with_an_older_libc(library: Library) -> None:
    assert library.newer_calls(binary.NEWEST_GLIBC) == []
    assert library.newer_calls((2, 0)) != []


def test_library_imports_nothing_that_prints_ends_or_changes_the_process(library: Library) -> None:
    assert {"memcpy", "free"} <= set(library.imported)
    assert library.forbidden_imports() == []


def test_forbidden_imports_are_recognized() -> None:
    bad = "printf __printf_chk __fprintf_chk vfprintf puts fputs abort exit _exit stderr"
    good = "snprintf vsnprintf __snprintf_chk __vsnprintf_chk pthread_sigmask exp expf strtol fgets"
    assert [name for name in bad.split() if not binary.FORBIDDEN_IMPORT.fullmatch(name)] == []
    assert [name for name in good.split() if binary.FORBIDDEN_IMPORT.fullmatch(name)] == []


def test_library_has_no_executable_stack_and_no_writable_calls(library: Library) -> None:
    assert library.soft_places() == []


def test_library_tells_nothing_of_the_machine_that_built_it(library: Library) -> None:
    assert library.traces() == []


# ------------------------------------------------------------------------------------ instructions


@needs.X86
def test_wide_instructions_stand_in_functions_of_their_set_only(library: Library) -> None:
    """A processor without AVX must be able to run everything the table of kernels leaves it."""
    assert library.misplaced_instructions()[:20] == []
    assert library.missing_sets() == []
    for isa, register in (("avx2", "%ymm"), ("avx512", "%zmm")):
        assert any(
            register in instruction.text and "vfmadd" in instruction.text
            for instruction in library.functions[f"gemm_tile__{isa}"]
        )
    assert any("vdpbf16ps" in i.text for i in library.functions["dot_tile__avx512bf16"])
    assert any("tdpbf16ps" in i.text for i in library.functions["dot_panel__amxbf16"])
    assert len([name for name in library.functions if "__avx2" in name]) > 15


@needs.X86
@pytest.mark.parametrize(
    ("kernel", "product", "vectors"),
    [
        ("gemm_tile__avx2", "vfmadd", 2),
        ("gemm_tile__avx512", "vfmadd", 4),
        ("gemm_tile__avx512bf16", "vfmadd", 4),
        ("dot_tile__avx512bf16", "vdpbf16ps", 4),
    ],
)
def test_matrix_kernel_keeps_its_accumulators_in_registers(
    library: Library, kernel: str, product: str, vectors: int
) -> None:
    """No innermost loop of products stores a vector, or reads one from the stack."""
    sizes = set()
    for loop in library.innermost_loops(kernel):
        products = sum(product in instruction.text for instruction in loop)
        if products == 0:
            continue
        sizes.add(products)
        spilled = [i.text for i in loop if i.writes_memory or i.uses_stack]
        assert spilled == [], f"{products} products, spilled {spilled}"
    # One loop for each number of rows; a compiler may unroll it.
    for rows in range(1, 7):
        assert any(size % (rows * vectors) == 0 for size in sizes), (rows, sizes)


def test_loops_and_stores_are_recognized() -> None:
    def at(address: int, text: str) -> Instruction:
        return Instruction(address, b"\x90", text)

    library = Library(Path("none"))
    code = [
        at(0, "xor %eax,%eax"),
        at(4, "vmovups (%rdi),%zmm0"),
        at(8, "vfmadd231ps %zmm0,%zmm1,%zmm2"),
        at(12, "vmovaps %zmm2,0x40(%rsp)"),
        at(16, "jne 8 <f+0x8>"),
        at(20, "jne 4 <f+0x4>"),
        at(24, "jmp 28 <f+0x28>"),
    ]
    library.__dict__["functions"] = {"f": code}
    assert [[i.address for i in loop] for loop in library.innermost_loops("f")] == [[8, 12, 16]]
    assert [i.address for i in code if i.writes_memory] == [12]
    assert [i.address for i in code if i.uses_stack] == [12]


@needs.X86
@pytest.mark.parametrize(
    ("asked", "left_out"), [("*", ("avx512bf16", "amxbf16")), ("*amx*", ("amxbf16",))]
)
def test_compiler_without_instructions_leaves_their_sets_out(
    tmp_path: Path, asked: str, left_out: tuple[str, ...]
) -> None:
    """As gcc before 10, and before 11, and their assemblers: told by files the script tries."""
    old = tmp_path / "old-cc"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *-O2*/probe.c*)\n'
        f'case "$(cat "$(dirname "$0")"/.build*/probe.c)" in {asked}) exit 1 ;; esac ;; esac\n'
        f'exec {needs.program("gcc", "clang")} "$@"\n'
    )
    old.chmod(0o755)
    toolchain.run(
        [toolchain.SCRIPT, "--quiet", "--werror", "--out", tmp_path], env={"CC": str(old)}
    )
    library = Library(tmp_path / "libanepy.so")
    for suffix in ("avx512bf16", "amxbf16"):
        functions = [name for name in library.functions if name.endswith(f"__{suffix}")]
        assert (functions == []) == (suffix in left_out)
    assert "gemm_tile__avx512" in library.functions


# --------------------------------------------------------------------------------- loading, header


def python(code: str, *arguments: str | Path, **env: str) -> str:
    """Run Python code that starts with nothing loaded; return what it prints."""
    return toolchain.run([sys.executable, "-c", code, *arguments], env=env).stdout.strip()


def test_loading_leaves_subnormal_numbers_alone(library: Library) -> None:
    """Libraries linked with -ffast-math flush them for the whole process as soon as they load."""
    code = """
import ctypes, sys
import numpy as np
ctypes.CDLL(sys.argv[1]).anepy_abi_version()
small = np.full(64, np.finfo(np.float32).smallest_normal)
assert (small * np.float32(0.5) > 0).all()
wide = np.full(64, np.finfo(np.float64).smallest_normal)
assert (wide * 0.5 > 0).all()
print("intact")
"""
    assert python(code, library.path) == "intact"


def test_loading_starts_no_thread_and_opens_nothing(library: Library) -> None:
    code = """
import ctypes, os, sys
def state():
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
before = state()
lib = ctypes.CDLL(sys.argv[1])
lib.anepy_abi_version()
print(state() == before)
"""
    assert python(code, library.path) == "True"


def test_unknown_mask_is_named_by_every_refusal(library: Library) -> None:
    """Asking for device "auto" used to say "unknown device 'auto'" instead."""
    code = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
lib.anepy_status_name.restype = ctypes.c_char_p
def say(status):
    text = ctypes.create_string_buffer(512)
    lib.anepy_last_error(text, ctypes.c_uint64(512))
    print(lib.anepy_status_name(status).decode(), text.value.decode(), sep="|")
info = (ctypes.c_uint32 * 512)()
info[0] = 4 * len(info)
say(lib.anepy_library_get_info(info))
bits = ctypes.c_uint32()
say(lib.anepy_variant_parse(b"max", None, None, ctypes.byref(bits)))
say(lib.anepy_variant_parse(b"max", b"auto", None, ctypes.byref(bits)))
"""
    lines = python(code, library.path, ANEPY_CPU_MASK="sse9").splitlines()
    assert len(lines) == 3
    for line in lines:
        status, _, text = line.partition("|")
        assert status == "name"
        assert text.startswith("ANEPY_CPU_MASK=sse9 is unknown: use one of ")
        assert text.endswith("scalar")


@pytest.mark.parametrize(
    ("language", "standard", "compilers"),
    [("c", "c11", ["gcc"]), ("c", "c11", ["clang"]), ("c++", "c++11", ["g++", "clang++"])],
    ids=["c-gcc", "c-clang", "c++"],
)
def test_header_compiles_alone(
    language: str, standard: str, compilers: list[str], tmp_path: Path
) -> None:
    compiler = needs.program(*compilers)
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Wundef", "-Werror"]
    source = tmp_path / "alone"
    source.write_text(f'#include "{HEADER}"\n#include "{HEADER}"\n')
    command = [compiler, "-x", language, f"-std={standard}", *warnings, "-fsyntax-only", source]
    toolchain.run(command)


def test_header_names_are_all_prefixed() -> None:
    """Whatever the header adds to a program that includes it begins with anepy_ or ANEPY_."""
    compiler = needs.program("gcc", "clang", "cc")

    def macros(*included: str) -> set[str]:
        listing = subprocess.run(
            [compiler, "-x", "c", "-std=c11", "-dM", "-E", "-"],
            input="".join(f'#include "{name}"\n' for name in included),
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return {line.split()[1].split("(")[0] for line in listing.splitlines()}

    added = macros("stdint.h", str(HEADER)) - macros("stdint.h")
    assert len(added) > 10
    assert [name for name in sorted(added) if not name.startswith("ANEPY_")] == []
    text = re.sub(r"/\*.*?\*/", "", whole(), flags=re.DOTALL)
    types = re.findall(r"typedef struct (\w+)|}\s*(\w+);", text)
    assert types and all(name.startswith("anepy_") for pair in types for name in pair if name)
