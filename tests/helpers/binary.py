"""What a built library for Linux must be: exports, needs, instructions, hardening, nothing of here.

Each check returns one sentence per fault; `faults` is all of them, a gate for releases
(`.ci/release.py`). Files of other processors are read as well, by the objdump of their binutils.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

# Of the platform itself: everything else would have to be shipped or installed.
ALLOWED_LIBRARIES = re.compile(
    r"(libc|libm|libpthread|ld-linux[\w-]*)\.so\.\d|libc\.musl-\w+\.so\.1|libc\.so"
)

# Where pthread became part of libc (Debian 12, Ubuntu 22.04, RHEL 9): what a library built on any
# newer system needs at least.
NEWEST_GLIBC = (2, 34)
RELEASED_GLIBC = (2, 17)  # RHEL 7, Debian 8, the manylinux2014 of wheels
# Headers of glibc 2.38 and later put these in the place of strtol, strtoul and scanf.
RENAMED_BY_HEADERS = re.compile(r"__isoc23_\w+")

# A library neither prints, nor ends the process, nor changes what belongs to all of it. Its own
# threads move by sched_setaffinity and may use the same processors afterwards (test_neighbour.py).
FORBIDDEN_IMPORT = re.compile(
    r"_?_?(v|f|vf|d|vd|w|fw)?printf(_chk)?|f?put(s|c|char)(_unlocked)?|perror|psignal"
    r"|abort|_?_?exit|_Exit|quick_exit|at_quick_exit|atexit|__assert\w*|raise|kill|p?thread_kill"
    r"|signal|sigaction|sigprocmask|setlocale|setenv|putenv|unsetenv|chdir|system|popen|exec\w+"
    r"|v?fork|fesetround|fesetenv|feenableexcept|pthread_setaffinity_np"
    r"|dlopen|dlsym|std(out|err)"
)

# Instructions that not every AArch64 processor has: bf16 and dot products, atomics of ARMv8.1.
BEYOND_ARMV8 = re.compile(
    r"(bf(dot|mmla|mlal|cvt)\w*|[su]s?u?dot|[su]s?mmla|fmlal\w*|fmlsl\w*|cas[alp]\w*|swp\w*|ld(add|clr|set|eor)[alh]*)\b"
)

LARGEST = 1_500_000  # bytes of a released library
FOLDERS = re.compile(
    rb"/(tmp|home|root|work|Users|runner|private|opt|mnt|github)/[\w.-]+|site-packages"
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
    """A built library, what its file says, and its functions."""

    path: Path

    def _readelf(self, *options: str) -> str:
        command = ["readelf", "-W", *options, str(self.path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @cached_property
    def machine(self) -> str:
        """Return `x86_64` or `aarch64`."""
        number = int.from_bytes(self.path.read_bytes()[18:20], "little")
        return {62: "x86_64", 183: "aarch64"}[number]

    @cached_property
    def functions(self) -> dict[str, list[Instruction]]:
        tools = (f"{self.machine}-linux-gnu-objdump", "objdump")
        native = os.uname().machine == self.machine
        tool = next(name for name in tools if shutil.which(name) or native)
        command = [tool if shutil.which(tool) else "objdump", "-d", "--wide", str(self.path)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        functions: dict[str, list[Instruction]] = {}
        name = ""
        for line in listing.splitlines():
            if found := re.match(r"[0-9a-f]+ <(.+)>:$", line):
                name = found[1]
                functions[name] = []
            elif found := re.match(
                r"\s*([0-9a-f]+):\t((?:[0-9a-f]{2} )+|[0-9a-f]{8} )\s*\t?(.*)", line
            ):
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

    @cached_property
    def symbols(self) -> list[tuple[str, str, bool]]:
        """Return the dynamic symbols as (name, version, defined here)."""
        rows = []
        for line in self._readelf("--dyn-syms").splitlines():
            words = line.split()
            if len(words) > 7 and words[0].rstrip(":").isdigit():
                name, _, version = words[7].partition("@")
                rows.append((name, version.lstrip("@"), words[6] != "UND"))
        return rows

    @property
    def imported(self) -> list[str]:
        """Return the names it takes from others."""
        return [name for name, _, defined in self.symbols if not defined]

    # -------------------------------------------------------------------------------- the checks

    def wrong_exports(self, header: str) -> list[str]:
        """Hold what is exported to what `anepy.h` declares."""
        exported = {name for name, _, defined in self.symbols if defined}
        declared = declarations(header)
        return [
            f"{name} is {'exported and not declared' if name in exported else 'not exported'}"
            for name in sorted(exported ^ declared)
        ]

    def foreign_needs(self) -> list[str]:
        """Return what it needs beside the platform's own libraries."""
        listing = self._readelf("-d")
        needed = re.findall(r"\(NEEDED\).*\[(.+)\]", listing) or ["nothing"]
        found = [f"needs {name}" for name in needed if not ALLOWED_LIBRARIES.fullmatch(name)]
        return found + [
            f"has {word}" for word in ("RPATH", "RUNPATH", "TEXTREL") if word in listing
        ]

    def newer_calls(self, newest: tuple[int, int]) -> list[str]:
        """Return the calls of glibc that are newer than that version."""
        return [
            f"{name} needs {version}"
            for name, version, defined in self.symbols
            if not defined
            and (found := re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version))
            and (int(found[1]), int(found[2])) > newest
            and not RENAMED_BY_HEADERS.fullmatch(name)
        ]

    def forbidden_imports(self) -> list[str]:
        """Return the calls that print, end or change the process."""
        return [f"calls {name}" for name in self.imported if FORBIDDEN_IMPORT.fullmatch(name)]

    def misplaced_instructions(self) -> list[str]:
        """Return instructions that not every processor has, outside the functions of their set.

        On x86-64 the first byte tells the encoding: EVEX (AVX-512) or VEX (AVX, AVX2, FMA, F16C).
        """
        if self.machine == "aarch64":
            return [
                f"{name}: {code.text}"
                for name, body in self.functions.items()
                for code in body
                if BEYOND_ARMV8.match(code.text)
                and "__neonbf16" not in name
                and not name.startswith("__aarch64_")  # they ask the processor first
            ]
        return [
            f"{name}: {code.text}"
            for name, body in self.functions.items()
            for code in body
            if (code.opcode == 0x62 and not re.search("__(avx512|amxbf16)", name))
            or (code.opcode in (0xC4, 0xC5) and not re.search("__(avx512|avx2|amxbf16)", name))
            or ("bf16" in code.text.split()[0] and not re.search("__(avx512|amx)bf16$", name))
        ]

    def missing_sets(self) -> list[str]:
        """Return the kernel sets of its processor family that were left out."""
        sets = {"x86_64": ("avx2", "avx512", "avx512bf16", "amxbf16"), "aarch64": ("neonbf16",)}[
            self.machine
        ]
        return [
            f"has no kernels for {name}"
            for name in sets
            if not any(function.endswith(f"__{name}") for function in self.functions)
        ]

    def soft_places(self) -> list[str]:
        """Return what an attack could write to or run: the stack, tables of calls, buffers."""
        segments, dynamic = self._readelf("-l"), self._readelf("-d")
        stack = [line.split()[-2] for line in segments.splitlines() if "GNU_STACK" in line]
        found = [] if stack == ["RW"] else [f"its stack is {stack}, not RW"]
        found += [] if "GNU_RELRO" in segments else ["has no RELRO"]
        found += [] if "NOW" in dynamic else ["binds late: its table of calls is writable"]
        found += [] if "__stack_chk_fail" in self.imported else ["has no guards on its stack"]
        glibc = any(version.startswith("GLIBC_") for _, version, _ in self.symbols)
        checked = any(re.fullmatch(r"__\w+_chk", name) for name in self.imported)
        return found + (["does not check its buffers"] if glibc and not checked else [])

    def traces(self) -> list[str]:
        """Return what tells of the machine that built it: folders, debugging sections."""
        content = self.path.read_bytes()
        folders = {found[0].decode() for found in FOLDERS.finditer(content)}
        sections = re.findall(r"\.debug_\w+", self._readelf("-S"))
        return [f"holds {what}" for what in (*sorted(folders), *sections)]

    def faults(self, header: str) -> list[str]:
        """Return everything that keeps a library from being released."""
        size = self.path.stat().st_size
        return [
            *self.wrong_exports(header),
            *self.foreign_needs(),
            *self.newer_calls(RELEASED_GLIBC),
            *self.forbidden_imports(),
            *self.misplaced_instructions()[:20],
            *self.missing_sets(),
            *self.soft_places(),
            *self.traces(),
            *([f"has {size:,} bytes, {LARGEST:,} are allowed"] if size > LARGEST else []),
        ]


def public_header(libsrc: Path) -> str:
    """Return the text of anepy.h and of the parts of it that it includes."""
    return "".join(path.read_text("utf-8") for path in sorted(libsrc.glob("anepy*.h")))


def declarations(header: str) -> set[str]:
    """Return the functions a header declares as exported."""
    text = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    return set(re.findall(r"^ANEPY_API\s[^;(]*?\b(anepy_\w+)\s*\(", text, re.MULTILINE))
