"""Compile the native library: what platform this is, where the sources are, which compiler runs.

`build_lib.sh` does the compiling and can be run by hand; this module runs it and reads its output.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import LibraryBuildError, UnsupportedPlatformError
from ..system import download

# ------------------------------------------------------------------------------------- the platform


def platform_tag() -> str:
    """Return operating system, processor and C library of this process, `linux-x86_64-glibc`.

    Raises:
        UnsupportedPlatformError: anepy does not run here.
    """
    libc = "musl"
    with contextlib.suppress(AttributeError, ValueError, OSError):
        if os.confstr("CS_GNU_LIBC_VERSION"):
            libc = "glibc"
    bits = ctypes.sizeof(ctypes.c_void_p) * 8
    return tag_of(sys.platform, platform.machine(), libc, bits, sys.byteorder)


def tag_of(system: str, machine: str, libc: str, bits: int, byteorder: str) -> str:
    """Return the platform tag of a process with these properties.

    Args:
        system: as `sys.platform`.
        machine: as `platform.machine()`; under Rosetta that is x86_64, and so must the library be.
        libc: `glibc` or `musl`, ignored on macOS.
        bits: width of a pointer; 32 also for a 32-bit Python on a 64-bit kernel.
        byteorder: as `sys.byteorder`.

    Raises:
        UnsupportedPlatformError: anepy does not run there.
    """
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine.lower())
    known = machine != "" and bits == 64 and byteorder == "little"
    if system == "linux" and known:
        return f"linux-{machine}-{libc}"
    if system == "darwin" and known and machine in ("aarch64", "x86_64"):
        return "macos-arm64" if machine == "aarch64" else "macos-x86_64"
    raise UnsupportedPlatformError(
        f"anepy does not run on {system} {machine} ({bits}-bit, {byteorder}-endian); "
        "use a 64-bit Python on Linux or macOS"
    )


def find_compiler() -> str | None:
    """Return the compiler `build_lib.sh` will use, `CC` or one it finds; None if there is none."""
    chosen = os.environ.get("CC")
    if chosen:
        program = chosen if shutil.which(chosen) else (chosen.split() or [""])[0]
        return chosen if shutil.which(program) else None
    if sys.platform == "darwin" and not _succeeds("xcode-select", "-p"):
        return None  # /usr/bin/cc is then only a stub that opens a dialog
    names, path = ("cc", "gcc", "clang", "zig"), _search_path()
    return next((name for name in names if shutil.which(name, path=path)), None)


def _search_path() -> str:
    """Return PATH, and behind it the folder of the package ziglang (extra `compiler`)."""
    found = importlib.util.find_spec("ziglang")
    folders = found.submodule_search_locations if found else None
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *(folders or ())])


def _succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def compiler_remedy() -> str:
    """Return the command that installs a compiler on this system."""
    if sys.platform == "darwin":
        return "xcode-select --install"
    for manager, packages in (
        ("apt", "gcc libc6-dev"),
        ("dnf", "gcc glibc-devel"),
        ("apk", "bash gcc musl-dev"),
    ):
        if shutil.which(manager):
            verb = "add" if manager == "apk" else "install"
            return f"{manager} {verb} {packages}, or pip install 'anepy[compiler]'"
    return "apt install gcc libc6-dev, or pip install 'anepy[compiler]'"


def translated() -> bool:
    """Return whether this is an Intel Python on Apple silicon."""
    if sys.platform != "darwin" or platform.machine() != "x86_64":
        return False
    command = ("/usr/sbin/sysctl", "-n", "sysctl.proc_translated")
    try:
        return subprocess.run(command, capture_output=True, check=False).stdout.strip() == b"1"
    except OSError:
        return False


# -------------------------------------------------------------------------------------- the sources


def find_sources(package: Path) -> Path | None:
    """Return the folder with `libsrc/` and `build_lib.sh`: in a wheel, or around a checkout."""
    for root in (package / "_src", package.parent):
        if (root / "libsrc").is_dir() and (root / "build_lib.sh").is_file():
            return root
    return None


def source_hash(root: Path | None = None) -> str:
    """Return the SHA-256 that identifies the sources, the same as `build_lib.sh --print-hash`.

    It is the hash of a text with one line `<SHA-256 of file>  <path>` per file, in byte order of
    the paths below `root`.

    Args:
        root: folder with `libsrc/` and `build_lib.sh`; by default that of this installation.

    Raises:
        LibraryBuildError: this installation carries no sources.
    """
    package = Path(__file__).resolve().parents[1]
    root = root or find_sources(package)
    if root is None:
        raise LibraryBuildError(f"{package} carries no C sources; reinstall anepy")
    files = ["build_lib.sh"]
    for folder, _, names in os.walk(root / "libsrc"):
        for name in names:
            path = Path(folder, name)
            if path.suffix in (".c", ".h", ".m") and not path.is_symlink():
                files.append(path.relative_to(root).as_posix())
    lines = (
        f"{download.file_sha256(root / name)}  {name}\n" for name in sorted(files, key=os.fsencode)
    )
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


# ------------------------------------------------------------------------------------- the compiler


def expected_duration(sources: Path) -> int:
    """Return about how many seconds compiling takes; gcc 12 does about 48 kB/s on one CPU."""
    nbytes = sum(path.stat().st_size for path in (sources / "libsrc").rglob("*.c"))
    return max(2, round(nbytes / 35_000 / (os.cpu_count() or 1)))


def compile_library(
    sources: Path,
    tag: str,
    target: Path,
    remedy: str,
    *,
    debug: bool = False,
    verbose: bool = False,
) -> None:
    """Run `build_lib.sh`; it puts the library at `target` in one step, whoever else does the same.

    Args:
        sources: folder with `libsrc/` and `build_lib.sh`.
        tag: platform tag of this process.
        target: path of the result; its folder is created.
        remedy: what to do if that folder cannot be written, for the message.
        debug: no optimization, assertions on.
        verbose: let the commands and the compiler's messages through to stderr.

    Raises:
        LibraryBuildError: with the command, the first error and the last lines of its output.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise LibraryBuildError(
            f"cannot write {target.parent} to compile the native library: {error.strerror}; "
            f"{remedy}"
        ) from error
    # Through bash, because installers may drop the executable bit.
    command = ["bash", str(sources / "build_lib.sh"), "--target", tag]
    command += ["--out", str(target.parent)]
    command += ["--debug"] if debug else []
    code, output = _run(command if verbose else [*command, "--quiet"], verbose)
    if code != 0 or not target.is_file():
        lines = output.strip().splitlines() or [f"exit code {code}"]
        first = next((line for line in lines if "error:" in line), lines[-1])
        first = first.removeprefix("build_lib.sh: ")
        message = f"compiling the native library failed: {first}; command: {shlex.join(command)}"
        raise LibraryBuildError("\n".join([message, *lines[-20:]] if len(lines) > 1 else [message]))


def _run(command: list[str], verbose: bool) -> tuple[int, str]:
    """Run a command and return its exit code and what it printed, empty if `verbose` showed it.

    It gets its own process group, so that Ctrl-C ends the compilers it started as well. If this
    process is killed, a shell that waits for its word ends them.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PATH": _search_path()},
        stdout=2 if verbose else subprocess.PIPE,
        stderr=None if verbose else subprocess.STDOUT,
        start_new_session=True,
    )
    words = ["bash", "-c", 'read -r word || kill -s TERM -- "-$0"', str(process.pid)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True) as watch:
        try:
            output, _ = process.communicate()
            watch.communicate(b"done\n")
        except BaseException:
            watch.communicate()
            try:
                process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
            raise
    return process.returncode, (output or b"").decode("utf-8", "replace")
