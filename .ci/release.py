"""Build everything that is released, check it, and write down its SHA-256.

usage: python .ci/release.py OUT [--target TAG]... [--sdk DIR] [--base-url URL]

Into OUT: the source archive, the pure wheel, one wheel and one loose library per target, and
SHA256SUMS. By default the targets are Linux on x86-64 and AArch64, glibc 2.17 and musl; with --sdk,
the folder of a macOS SDK, macOS on arm64 as well. Compiled by zig (package ziglang), on any Linux;
nothing of an SDK gets into a wheel. Each library must pass every check of tests/helpers/binary.py
or tests/apple/sdk_check.py: if one fails, nothing stays in OUT and the exit code is 1.

The wheels hold release.json, which pins the SHA-256 of all libraries: a library in a wheel is held
to it as one from URL is. The source archive has none: what is built from it compiles, as does a
checkout. The same sources, tools and SOURCE_DATE_EPOCH give the same bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "apple")]

import binary  # noqa: E402
import sdk_check  # noqa: E402

from anepy.native import build, release  # noqa: E402
from anepy.system.version import __version__  # noqa: E402

# What pip calls the platforms; manylinux2014 is glibc 2.17 for older installers.
WHEEL_TAGS = {
    "linux-x86_64-glibc": ("manylinux2014_x86_64", "manylinux_2_17_x86_64"),
    "linux-aarch64-glibc": ("manylinux2014_aarch64", "manylinux_2_17_aarch64"),
    "linux-x86_64-musl": ("musllinux_1_2_x86_64",),
    "linux-aarch64-musl": ("musllinux_1_2_aarch64",),
    "macos-arm64": ("macosx_12_0_arm64",),
}
EPOCH = 1_580_601_600  # s, 2020-02-02: hatchling's own default


def fail(message: str) -> None:
    sys.exit(f"release.py: {message}")


def compile_library(target: str, sdk: Path | None, folder: Path) -> Path:
    """Build the library of a platform by zig."""
    compiler = folder / "zig-cc"
    compiler.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ziglang cc "$@"\n')
    compiler.chmod(0o755)
    out = folder / target
    command: list[str | Path] = [ROOT / "build_lib.sh", "--werror", "--quiet", "--target", target]
    command += ["--out", out]
    if sdk is not None and target.startswith("macos-"):
        command += ["--sdk", sdk]
    if subprocess.run(command, env={**os.environ, "CC": str(compiler)}, check=False).returncode:
        fail(f"{target} does not compile")
    return out / ("libanepy.dylib" if target.startswith("macos-") else "libanepy.so")


def library_faults(library: Path) -> list[str]:
    """Return everything that keeps a library from being released."""
    header = binary.public_header(ROOT / "libsrc")
    build_id = build.source_hash(ROOT)[:16].encode()
    content = library.read_bytes()
    found = [] if build_id + b"\0" in content else ["does not carry the id of these sources"]
    if library.suffix == ".so":
        return found + binary.Library(library).faults(header)
    found += [f"holds {name[0].decode()}" for name in binary.FOLDERS.finditer(content)]
    found += sdk_check.problems(sdk_check.read_macho(library), sdk_check.public_names(header))
    return found


def hatch(kind: str, source: Path, out: Path) -> Path:
    """Build the source archive or the pure wheel of a tree."""
    code = f"import sys; from hatchling.build import build_{kind} as b; print(b(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=source, check=True, stdout=subprocess.PIPE, text=True)
    return out / done.stdout.split()[-1]


def digest(content: bytes) -> str:
    """Return a SHA-256 as the RECORD of a wheel has it."""
    code = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return f"sha256={code.decode().rstrip('=')},{len(content)}"


def platform_wheel(pure: Path, target: str, library: Path, out: Path) -> Path:
    """Make the wheel of a platform: the pure one with the library inside."""
    tags = WHEEL_TAGS[target]
    folder = f"anepy-{__version__}.dist-info"
    moment = time.gmtime(max(int(os.environ["SOURCE_DATE_EPOCH"]), 315_532_800))[:6]
    with zipfile.ZipFile(pure) as archive:
        members = {
            info.filename: (archive.read(info), info.external_attr >> 16 & 0o111)
            for info in archive.infolist()
        }
    members[f"anepy/_lib/{target}/{library.name}"] = library.read_bytes(), 0o111
    lines = members[f"{folder}/WHEEL"][0].decode().splitlines()
    lines = [line for line in lines if line and not line.startswith(("Tag:", "Root-Is-Purelib:"))]
    lines += ["Root-Is-Purelib: false", *(f"Tag: py3-none-{tag}" for tag in tags)]
    members[f"{folder}/WHEEL"] = "\n".join([*lines, ""]).encode(), 0
    record = f"{folder}/RECORD"
    del members[record]
    rows = [f"{name},{digest(content)}" for name, (content, _) in sorted(members.items())]
    path = out / f"anepy-{__version__}-py3-none-{'.'.join(tags)}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        listing = "\n".join([*rows, f"{record},,", ""]).encode()
        for name, (content, executable) in [*sorted(members.items()), (record, (listing, 0))]:
            info = zipfile.ZipInfo(name, moment)
            info.external_attr = (0o100755 if executable else 0o100644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


def wheel_faults(wheel: Path, target: str, library: Path) -> list[str]:
    """Read a wheel back: RECORD, what it carries, and that nothing else came in."""
    found = []
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (record,) = (name for name in names if name.endswith(".dist-info/RECORD"))
        rows = archive.read(record).decode().splitlines()
        for name, _, rest in (row.partition(",") for row in rows):
            if name != record and digest(archive.read(name)) != rest:
                found.append(f"RECORD is wrong about {name}")
        if {row.partition(",")[0] for row in rows} != names:
            found.append("RECORD does not list what is there")
        carried = archive.read(f"anepy/_lib/{target}/{library.name}")
        pinned = json.loads(archive.read(f"anepy/native/{release.FILE_NAME}"))["files"][target]
    if hashlib.sha256(carried).hexdigest() != pinned["sha256"]:
        found.append("the library is not the pinned one")
    kinds = {".py", ".css", ".typed", ".json", ".c", ".h", ".m", ".sh", library.suffix}
    strays = [n for n in names if n.startswith("anepy/") and Path(n).suffix not in kinds]
    found += [f"carries {name}" for name in sorted(strays)]
    found += [f"carries {n}" for n in names if not n.startswith(("anepy/", "anepy-"))]
    return found


def make(out: Path, targets: list[str], sdk: Path | None, base_url: str, folder: Path) -> None:
    """Build and check everything in `folder`, then put it into `out`."""
    libraries, files = {}, {}
    for target in targets:
        library = libraries[target] = compile_library(target, sdk, folder)
        if faults := library_faults(library):
            fail("\n  ".join([f"the library of {target} must not be released:", *faults]))
        content = library.read_bytes()
        name = f"libanepy-{__version__}-{target}{library.suffix}"
        sha256 = hashlib.sha256(content).hexdigest()
        files[target] = {"name": name, "size": len(content), "sha256": sha256}
        print(f"{target}: {len(content):,} bytes, all checks passed, sha256 {sha256}", flush=True)
    made = folder / "made"
    made.mkdir()
    source = hatch("sdist", ROOT, made)
    with tarfile.open(source) as archive:
        archive.extractall(folder / "source", filter="data")
    (tree,) = (folder / "source").iterdir()
    record = {
        "version": __version__,
        "sources": build.source_hash(tree),
        "base_url": base_url,
        "files": files,
    }
    text = json.dumps(record, indent=2) + "\n"
    (tree / "anepy" / "native" / release.FILE_NAME).write_text(text, "utf-8")
    pure = hatch("wheel", tree, made)
    for target, library in libraries.items():
        wheel = platform_wheel(pure, target, library, made)
        if faults := wheel_faults(wheel, target, library):
            fail("\n  ".join([f"{wheel.name} must not be released:", *faults]))
        shutil.copyfile(library, made / str(files[target]["name"]))
    release.read(tree / "anepy" / "native")
    sums = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(made.iterdir())
    ]
    (made / "SHA256SUMS").write_text("".join(sums))
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(made.iterdir()):
        shutil.copyfile(path, out / path.name)
        print(f"{path.stat().st_size:>9,}  {path.name}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build, check and pin all files of a release.")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--target", action="append", choices=list(WHEEL_TAGS), default=[])
    parser.add_argument("--sdk", type=Path, metavar="DIR", help="folder of a macOS SDK")
    parser.add_argument("--base-url", default="", help="where the loose libraries will be")
    options = parser.parse_args()
    targets = options.target or [
        name for name in WHEEL_TAGS if options.sdk or not name.startswith("macos-")
    ]
    if options.out.exists() and any(options.out.iterdir()):
        fail(f"{options.out} is not empty")
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(EPOCH))
    with tempfile.TemporaryDirectory() as folder:
        # One cache for all targets: each library's own would compile the C library's stubs again.
        os.environ.setdefault("ZIG_GLOBAL_CACHE_DIR", f"{folder}/zig")
        make(options.out, targets, options.sdk, options.base_url, Path(folder))


if __name__ == "__main__":
    main()
