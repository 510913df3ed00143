"""The Apple devices on Linux: their sources, unmodified, with all stand-ins in one library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckernels import gnustep, toolchain

LIBSRC = toolchain.ROOT / "libsrc"
COVERAGE = ("-fprofile-instr-generate", "-fcoverage-mapping")
# Calls of the library that the stand-ins take over: standin/ane/system.m.
WRAPPED = ("dlopen", "dlerror", "NSClassFromString", "NSTemporaryDirectory")
# What takes the place of a device elsewhere.
NONE = {LIBSRC / "device" / name / "none.c" for name in ("ane", "metal")}


def build(folder: Path, options: Sequence[str] = (), extra: Sequence[str] = ()) -> Path:
    """Build libanepy.so with the flags of build_lib.sh and its options; return it.

    Args:
        folder: for the objects and the library.
        options: of build_lib.sh, such as --asan.
        extra: further flags for the Objective-C files of the library, and for linking.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiler = gnustep.compiler()
    flags = toolchain.script_flags(folder, "--werror", *options)
    objc = [*flags, *gnustep.objc_flags(folder)]
    standin = gnustep.STANDIN
    metal = ["-Ddlsym=gpu_dlsym", f"-I{standin / 'metal'}"]
    groups: list[tuple[list[str], list[Path]]] = [
        (flags, [path for path in toolchain.library_sources() if path not in NONE]),
        ([*objc, *extra], sorted((LIBSRC / "device" / "ane").glob("*.m"))),
        ([*objc, *metal], sorted((LIBSRC / "device" / "metal").glob("*.m"))),
        ([*objc, f"-I{standin / 'ane'}"], sorted((standin / "ane").glob("*.m"))),
        ([*objc, *metal], sorted((standin / "metal").glob("*.m"))),
        ([*flags, *metal], [standin / "metal" / "gpu.c"]),
    ]
    objects = [
        made
        for words, sources in groups
        for made in toolchain.compile_files(compiler, words, sources, folder)
    ]
    sanitizers = [word for word in flags if word.startswith("-fsanitize=")]
    shared = ["-shared-libsan"] if sanitizers else []
    wrapped = [f"-Wl,--wrap={name}" for name in WRAPPED]
    library = folder / "libanepy.so"
    toolchain.run(
        [compiler, "-shared", "-pthread", *sanitizers, *shared, *extra, *wrapped, *objects,
         "-o", library, *gnustep.LIBRARIES]
    )  # fmt: skip
    return library
