"""A tiny stand-in for the C sources, and installations made of it, for the loader's tests."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import children
import pytest
from needs import CHECKOUT

import anepy
from anepy.errors import AbiMismatchError
from anepy.native import build, find, trust
from anepy.native.find import Candidate, Layout, Release
from anepy.system import download

SCRIPT = CHECKOUT / "build_lib.sh"
ABI = 7
TAG = find.platform_tag()
EMPTY: Release = {"version": "9.9.9", "sources": "", "base_url": "", "files": {}}

SOURCES = {
    "libsrc/anepy.h": "#ifndef ANEPY_H\n#define ANEPY_H\n"
    '#define ANEPY_API __attribute__((visibility("default")))\n'
    "ANEPY_API int anepy_abi_version(void);\nANEPY_API const char *anepy_build_id(void);\n"
    "int anepy_hidden(void);\nANEPY_API double anepy_root(double x);\n#endif\n",
    "libsrc/api.c": '#include "anepy.h"\n#include <math.h>\n'
    f"int anepy_abi_version(void) {{ return {ABI}; }}\n"
    "const char *anepy_build_id(void) { return ANEPY_BUILD_ID; }\n"
    "double anepy_root(double x) { return sqrt(x) + anepy_hidden(); }\n",
    # Two files of the same name: their objects must not collide.
    "libsrc/model/api.c": '#include "anepy.h"\nint anepy_hidden(void) { return 40; }\n',
    "libsrc/device/ane/bridge.m": "this is not for the C compiler\n",
}
STUB_ABI = (
    "import sys, types\n"
    "stub = types.ModuleType('anepy.native.abi')\n"
    f"stub.ABI_VERSION, stub.bind = {ABI}, lambda lib, path: None\n"
    "sys.modules['anepy.native.abi'] = stub\n"
)


def make_sources(root: Path) -> Path:
    """Write the stand-in source tree and the real build script."""
    for name, text in SOURCES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copy(SCRIPT, root / "build_lib.sh")
    return root


def isolate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the real cache, the real library and the user's settings out of every test."""
    for name in ("ANEPY_LIB", "ANEPY_OFFLINE", "ANEPY_MIRROR", "CC", "JOBS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("ANEPY_CACHE", str(tmp_path / "cache"))

    def bind(lib: ctypes.CDLL, path: str) -> None:
        found = lib.anepy_abi_version()
        if found != ABI:
            raise AbiMismatchError(f"{path} has ABI {found} instead of {ABI}")

    stub = types.ModuleType("anepy.native.abi")
    stub.ABI_VERSION, stub.bind = ABI, bind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "anepy.native.abi", stub)
    monkeypatch.setattr(anepy.native, "abi", stub, raising=False)
    monkeypatch.setattr(find, "_library", None)
    monkeypatch.setattr(find, "_loaded", None)


def layout_of(root: Path, *, wheel: bool = False, **changes: object) -> Layout:
    """Describe a stand-in installation: a checkout, or a wheel with the sources inside."""
    sources = make_sources(root / "anepy" / "_src") if wheel else root
    layout = Layout(
        tag=TAG,
        package=root / "anepy",
        sources=sources,
        source_hash=find.source_hash(sources),
        cache=download.cache_dir(),
        abi=ABI,
        release=EMPTY,
        override=None,
        compiler=build.find_compiler(),
        offline=False,
    )
    return dataclasses.replace(layout, **changes)  # type: ignore[arg-type]


def release_of(layout: Layout, content: bytes, base: str = "http://base") -> Release:
    """Pin a release file with these contents, built from the sources of the layout."""
    assert layout.source_hash is not None
    return {
        "version": "9.9.9",
        "sources": layout.source_hash,
        "base_url": base,
        "files": {
            TAG: {
                "name": "lib.so",
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        },
    }


def built(library: Path) -> list[Path]:
    """Return what a build leaves in its folder."""
    return [library, library.with_name(f"{library.name}.sha256")]


def installed(path: Path, content: bytes | str) -> Path:
    """Put a library where it belongs, with its SHA-256 recorded."""
    trust.make_private(path.parent)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    trust.record(path, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def place(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def by_place(layout: Layout) -> dict[str, Candidate]:
    return {candidate.place: candidate for candidate in find.search(layout)}


def run_script(
    root: Path, *arguments: str, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [root / "build_lib.sh", *arguments],
        env=os.environ | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=check,
    )


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python that has this anepy with the stand-in `abi`."""
    return children.start("-c", STUB_ABI + code, *arguments, cwd="/", **environment)
