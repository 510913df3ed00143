"""Gates on the library as users get it: symbols, needs, instructions, and what loading it does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import needs
import pytest
from ckernels import toolchain

pytestmark = needs.LINUX  # reads ELF files

HEADER = toolchain.ROOT / "libsrc" / "anepy.h"
COMPILERS = ["gcc", "clang"]

# Of the platform itself: everything else would have to be shipped or installed.
ALLOWED_LIBRARIES = re.compile(
    r"(libc|libm|libpthread|ld-linux[\w-]*)\.so\.\d|libc\.musl-\w+\.so\.1"
)

# Where pthread became part of libc (Debian 12, Ubuntu 22.04, RHEL 9): what a library built on any
# newer system needs at least. A release is built on an older one; this gate is for newer calls.
NEWEST_GLIBC = (2, 34)
# Headers of glibc 2.38 and later put these in the place of strtol, strtoul and scanf.
RENAMED_BY_HEADERS = re.compile(r"__isoc23_\w+")

# A library neither prints, nor ends the process, nor changes what belongs to all of it.
FORBIDDEN_IMPORT = re.compile(
    r"_?_?(v|f|vf|d|vd|w|fw)?printf(_chk)?|f?put(s|c|char)(_unlocked)?|perror|psignal"
    r"|abort|_?_?exit|_Exit|quick_exit|at_quick_exit|atexit|__assert\w*|raise|kill|p?thread_kill"
    r"|signal|sigaction|sigprocmask|setlocale|setenv|putenv|unsetenv|chdir|system|popen|exec\w+"
    r"|v?fork|fesetround|fesetenv|feenableexcept|sched_setaffinity|pthread_setaffinity_np"
    r"|dlopen|dlsym|std(out|err)"
)


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly, AT&T syntax."""

    address: int
    encoding: bytes
    text: str

    @property
    def opcode(self) -> int:
        """First byte: 0x62 begins EVEX instructions, 0xc4 and 0xc5 VEX ones, nothing else."""
        return self.encoding[0]

    @property
    def writes_memory(self) -> bool:
        """Whether a vector move has its last operand, the destination, in memory."""
        return self.text.startswith("vmov") and self.text.split("#")[0].rstrip().endswith(")")

    @property
    def uses_stack(self) -> bool:
        """Whether it holds a vector there; an address that is read again costs nothing."""
        return "(%rsp" in self.text and re.search("%[xyz]mm", self.text) is not None

    @property
    def target(self) -> int | None:
        """Where a jump inside the function goes."""
        found = re.match(r"j\w+\s+([0-9a-f]+) <", self.text)
        return int(found[1], 16) if found else None


@dataclass(frozen=True)
class Library:
    """A built library, and its functions."""

    path: Path

    @cached_property
    def functions(self) -> dict[str, list[Instruction]]:
        listing = toolchain.run([needs.program("objdump"), "-d", "--wide", self.path]).stdout
        functions: dict[str, list[Instruction]] = {}
        name = ""
        for line in listing.splitlines():
            if found := re.match(r"[0-9a-f]+ <(.+)>:$", line):
                name = found[1]
                functions[name] = []
            elif found := re.match(r"\s*([0-9a-f]+):\t((?:[0-9a-f]{2} )+)\s*\t?(.*)", line):
                encoding = bytes.fromhex(found[2])
                functions[name].append(Instruction(int(found[1], 16), encoding, found[3].strip()))
        return functions

    def innermost_loops(self, function: str) -> Iterator[list[Instruction]]:
        """Yield the bodies of loops that contain no other: from a backward jump's target to it."""
        code = self.functions[function]
        first = code[0].address
        spans = {
            (jump.target, jump.address)
            for jump in code
            if jump.target is not None and first <= jump.target <= jump.address
        }
        for start, end in spans:
            if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in spans):
                yield [i for i in code if start <= i.address <= end]


@pytest.fixture(scope="session", params=COMPILERS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Build the library as released, once per compiler."""
    compiler = needs.program(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    options = ["--quiet", "--werror", "--out", folder]
    toolchain.run([toolchain.SCRIPT, *options], env={"CC": compiler})
    return Library(folder / "libanepy.so")


def symbols(library: Library, *options: str) -> list[tuple[str, str]]:
    """Return the dynamic symbols as (name, version)."""
    listing = toolchain.run([needs.program("nm"), "-D", *options, library.path]).stdout
    names = [line.split()[-1] for line in listing.splitlines()]
    return [(name.split("@")[0], name.partition("@")[2].lstrip("@")) for name in names]


def whole() -> str:
    """Return anepy.h and the part of it that it includes."""
    return "".join(path.read_text() for path in sorted(HEADER.parent.glob("anepy*.h")))


def declared() -> set[str]:
    """Return the functions anepy.h declares as exported."""
    text = re.sub(r"/\*.*?\*/", "", whole(), flags=re.DOTALL)
    return set(re.findall(r"^ANEPY_API\s[^;(]*?\b(anepy_\w+)\s*\(", text, re.MULTILINE))


# ---------------------------------------------------------------------------------- symbols, needs


def test_library_exports_what_the_header_declares_and_nothing_else(library: Library) -> None:
    exported = {name for name, _ in symbols(library, "--defined-only")}
    assert len(exported) > 20
    assert exported == declared()


def test_library_needs_the_platform_only(library: Library) -> None:
    listing = toolchain.run([needs.program("readelf"), "-dW", library.path]).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing)
    assert needed
    assert [name for name in needed if not ALLOWED_LIBRARIES.fullmatch(name)] == []
    assert "RPATH" not in listing and "RUNPATH" not in listing and "TEXTREL" not in listing


def test_library_runs_on_systems_with_an_older_libc(library: Library) -> None:
    newer = [
        (name, version)
        for name, version in symbols(library, "--undefined-only")
        if (found := re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version))
        and (int(found[1]), int(found[2])) > NEWEST_GLIBC
        and not RENAMED_BY_HEADERS.fullmatch(name)
    ]
    assert newer == []


def test_library_imports_nothing_that_prints_ends_or_changes_the_process(library: Library) -> None:
    imported = [name for name, _ in symbols(library, "--undefined-only")]
    assert {"memcpy", "free"} <= set(imported)
    assert [name for name in imported if FORBIDDEN_IMPORT.fullmatch(name)] == []


def test_forbidden_imports_are_recognized() -> None:
    bad = "printf __printf_chk __fprintf_chk vfprintf puts fputs abort exit _exit stderr"
    good = "snprintf vsnprintf __snprintf_chk __vsnprintf_chk pthread_sigmask exp expf strtol fgets"
    assert [name for name in bad.split() if not FORBIDDEN_IMPORT.fullmatch(name)] == []
    assert [name for name in good.split() if FORBIDDEN_IMPORT.fullmatch(name)] == []


def test_library_has_no_executable_stack(library: Library) -> None:
    listing = toolchain.run([needs.program("readelf"), "-lW", library.path]).stdout
    stack = [line.split() for line in listing.splitlines() if "GNU_STACK" in line]
    assert [words[-2] for words in stack] == ["RW"]


# ------------------------------------------------------------------------------------ instructions


@needs.X86
def test_wide_instructions_stand_in_functions_of_their_set_only(library: Library) -> None:
    """A processor without AVX must be able to run everything the table of kernels leaves it.

    The first byte tells the encoding: EVEX (AVX-512) or VEX (AVX, AVX2, FMA, F16C).
    """
    offenders = [
        f"{name}: {instruction.text}"
        for name, code in library.functions.items()
        for instruction in code
        if (instruction.opcode == 0x62 and "__avx512" not in name)
        or (instruction.opcode in (0xC4, 0xC5) and not re.search("__avx(512|2)", name))
    ]
    assert offenders[:20] == []
    for isa, register in (("avx2", "%ymm"), ("avx512", "%zmm")):
        assert any(
            register in instruction.text and "vfmadd" in instruction.text
            for instruction in library.functions[f"gemm_tile__{isa}"]
        )
    assert any("vdpbf16ps" in i.text for i in library.functions["dot_tile__avx512bf16"])
    assert [
        name
        for name, code in library.functions.items()
        if not name.endswith("__avx512bf16") and any("bf16" in i.text.split()[0] for i in code)
    ] == []
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
def test_compiler_without_bf16_instructions_leaves_their_set_out(tmp_path: Path) -> None:
    """As gcc before 10 and assemblers before 2.34: told apart by a file the script tries."""
    old = tmp_path / "old-cc"
    old.write_text(
        '#!/bin/sh\ncase "$*" in *-O2*/probe.c*) exit 1 ;; esac\n'
        f'exec {needs.program("gcc", "clang")} "$@"\n'
    )
    old.chmod(0o755)
    toolchain.run(
        [toolchain.SCRIPT, "--quiet", "--werror", "--out", tmp_path], env={"CC": str(old)}
    )
    library = Library(tmp_path / "libanepy.so")
    assert [name for name in library.functions if name.endswith("__avx512bf16")] == []
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
