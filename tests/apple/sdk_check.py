"""Build the macOS library against a real SDK and check what came out; usable without a Mac.

usage: python tests/apple/sdk_check.py SDK [--keep DIR]

SDK is the folder clang calls the system root: System/Library/Frameworks and usr/ are in it. Nothing
of an SDK belongs into this repository; tests/README.md says where one was taken from.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = ("CoreFoundation", "Foundation", "IOSurface", "Metal", "MetalPerformanceShaders")
LIBRARIES = ("/usr/lib/libSystem.B.dylib", "/usr/lib/libobjc.A.dylib")
INSTALL_NAME = "@rpath/libanepy.dylib"
OLDEST = (12, 0)
ARM64, DYLIB, MACOS = 0x0100000C, 6, 1
# Load commands (mach-o/loader.h).
SYMTAB, LOAD_DYLIB, ID_DYLIB, CODE_SIGNATURE, BUILD_VERSION = 0x2, 0xC, 0xD, 0x1D, 0x32
DEPENDENCIES = (LOAD_DYLIB, 0x80000018, 0x8000001F, 0x80000023)  # plain, weak, re-exported, upward
AD_HOC = 0x2
# What the linker of zig adds on its own: the address of the header, under two names.
LINKERS_OWN = {"__mh_dylib_header", "___dso_handle"}


@dataclass
class MachO:
    """What this check looks at in a library."""

    cpu: int
    kind: int
    name: str = ""
    platform: int = 0
    oldest: tuple[int, int] = (0, 0)
    dependencies: list[str] = field(default_factory=list)
    exported: list[str] = field(default_factory=list)
    undefined: list[tuple[str, str]] = field(default_factory=list)  # symbol, library it is from
    signature: str = "none"


def text_at(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()


def read_symbols(data: bytes, at: int, library: MachO) -> None:
    """Read LC_SYMTAB; the dependencies are known by then."""
    table, count, strings = struct.unpack_from("<3I", data, at + 8)
    for i in range(count):
        index, kind, _, description, _ = struct.unpack_from("<IBBHQ", data, table + 16 * i)
        if kind & 0xE0 or not kind & 0x01:  # debugging, or of this file only
            continue
        symbol = text_at(data, strings + index)
        if kind & 0x0E:
            if not kind & 0x10 and symbol not in LINKERS_OWN:  # 0x10: hidden visibility
                library.exported.append(symbol)
            continue
        ordinal = description >> 8
        known = 1 <= ordinal <= len(library.dependencies)
        library.undefined.append(
            (symbol, library.dependencies[ordinal - 1] if known else f"ordinal {ordinal}")
        )


def read_signature(data: bytes, at: int) -> str:
    """Check every page against the code directory: macOS ends a process over a wrong one."""
    (start,) = struct.unpack_from("<I", data, at + 8)
    magic, _, count = struct.unpack_from(">3I", data, start)
    if magic != 0xFADE0CC0:
        return "not a signature"
    for i in range(count):
        _, offset = struct.unpack_from(">2I", data, start + 12 + 8 * i)
        base = start + offset
        magic, _, _, flags, hashes, _, _, pages, limit = struct.unpack_from(">9I", data, base)
        if magic != 0xFADE0C02:
            continue
        size, kind, _, shift = struct.unpack_from(">4B", data, base + 36)
        if (size, kind) != (32, 2):
            return f"hash type {kind}"
        for page in range(pages):
            first = page << shift
            code = data[first : min(first + (1 << shift), limit)]
            slot = base + hashes + size * page
            if hashlib.sha256(code).digest() != data[slot : slot + size]:
                return f"page {page} does not match"
        if limit != start or pages != -(-limit >> shift):
            return "does not cover the file"
        return "ad hoc" if flags & AD_HOC else "with a certificate"
    return "no code directory"


def read_macho(path: Path) -> MachO:
    """Read a 64-bit little-endian Mach-O file.

    Raises:
        ValueError: it is something else.
    """
    data = path.read_bytes()
    magic, cpu, _, kind, count, _, _, _ = struct.unpack_from("<8I", data)
    if magic != 0xFEEDFACF:
        raise ValueError(f"{path} is no 64-bit Mach-O file")
    library, symbols, at = MachO(cpu, kind), 0, 32
    for _ in range(count):
        command, size = struct.unpack_from("<2I", data, at)
        if command == ID_DYLIB or command in DEPENDENCIES:
            name = text_at(data, at + struct.unpack_from("<I", data, at + 8)[0])
            if command == ID_DYLIB:
                library.name = name
            else:
                library.dependencies.append(name)
        elif command == BUILD_VERSION:
            library.platform, version = struct.unpack_from("<2I", data, at + 8)
            library.oldest = (version >> 16, version >> 8 & 255)
        elif command == CODE_SIGNATURE:
            library.signature = read_signature(data, at)
        elif command == SYMTAB:
            symbols = at
        at += size
    read_symbols(data, symbols, library)
    return library


def public_names(header: str) -> set[str]:
    """Return the functions a header exports."""
    return set(re.findall(r"^ANEPY_API [^;(]*?(\w+)\(", header, re.MULTILINE))


def framework_path(name: str) -> str:
    version = "C" if name == "Foundation" else "A"
    return f"/System/Library/Frameworks/{name}.framework/Versions/{version}/{name}"


def problems(library: MachO, public: set[str]) -> list[str]:
    """Return one sentence per thing that is not as it must be."""
    found = []

    def expect(what: str, actual: object, wanted: object) -> None:
        if actual != wanted:
            found.append(f"{what}: {actual}, expected {wanted}")

    expect("processor", library.cpu, ARM64)
    expect("file type", library.kind, DYLIB)
    expect("install name", library.name, INSTALL_NAME)
    expect("platform", library.platform, MACOS)
    expect("oldest macOS", library.oldest, OLDEST)
    expect("signature", library.signature, "ad hoc")
    wanted = {*LIBRARIES, *map(framework_path, FRAMEWORKS)}
    expect("linked libraries", sorted(library.dependencies), sorted(wanted))
    expect("exported names", sorted(library.exported), sorted(f"_{name}" for name in public))
    for symbol, origin in library.undefined:
        if origin not in wanted or re.match(r"_(OBJC_CLASS_\$_)?_?ANE", symbol):
            found.append(f"undefined private symbol: {symbol} from {origin}")
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Build libanepy.dylib against an SDK, check it.")
    parser.add_argument("sdk", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the library (default: temporary)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.keep or Path(scratch)
        command = [ROOT / "build_lib.sh", "--target", "macos-arm64", "--sdk", options.sdk]
        built = subprocess.run([*command, "--werror", "--quiet", "--out", out], check=False)
        if built.returncode != 0:
            return built.returncode
        library = read_macho(out / "libanepy.dylib")
    headers = sorted((ROOT / "libsrc").glob("anepy*.h"))
    found = problems(library, public_names("".join(path.read_text() for path in headers)))
    print(f"arm64 library for macOS {'.'.join(map(str, library.oldest))}: {library.signature}")
    print(f"exports {len(library.exported)} names")
    print(f"needs {len(library.undefined)} symbols from")
    for dependency in library.dependencies:
        names = [symbol for symbol, origin in library.undefined if origin == dependency]
        print(f"  {dependency}: {len(names)}")
    for sentence in found:
        print(f"WRONG: {sentence}", file=sys.stderr)
    if not found:
        print("exports what anepy.h declares, links nothing private, signature matches")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
