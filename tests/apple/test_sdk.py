"""The macOS library, cross-built: against an SDK of ten symbols, and a real one where there is one.

`sdk_check.py` is what looks at the result; half of these tests ask whether it would notice.
"""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import needs
import pytest
from installations import make_sources, place, run_script

from apple import sdk_check

STUB = """--- !tapi-tbd
tbd-version: 4
targets: [ arm64-macos ]
install-name: '{name}'
exports:
  - targets: [ arm64-macos ]
    symbols: [ {symbols} ]
...
"""
SYSTEM = "dyld_stub_binder, _sqrt, ___stack_chk_fail, ___stack_chk_guard"
BRIDGE = "extern int CFBundleGetVersion(void);\nint anepy_hidden(void);\n"
PUBLIC = {"anepy_abi_version", "anepy_build_id", "anepy_root"}


@pytest.fixture(scope="module")
def compiler() -> str:
    """Return a clang that finds a linker for Mach-O."""
    return needs.macos_linking_clang()


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an SDK that has what the stand-in sources need; the path has a space in it."""
    root = tmp_path_factory.mktemp("sdk") / "Mac OS.sdk"
    place(root / "usr/include/math.h", "double sqrt(double);\n")
    place(root / "usr/include/pthread.h", "")
    libraries = {
        "usr/lib/libSystem.tbd": (sdk_check.LIBRARIES[0], SYSTEM),
        "usr/lib/libm.tbd": (sdk_check.LIBRARIES[0], SYSTEM),
        "usr/lib/libobjc.tbd": (sdk_check.LIBRARIES[1], "_objc_msgSend"),
    }
    for name in sdk_check.FRAMEWORKS:
        symbols = "_CFBundleGetVersion" if name == "CoreFoundation" else f"_{name}Version"
        path = f"System/Library/Frameworks/{name}.framework/{name}.tbd"
        libraries[path] = (sdk_check.framework_path(name), symbols)
    for path, (name, symbols) in libraries.items():
        place(root / path, STUB.format(name=name, symbols=symbols))
    return root


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    root = make_sources(tmp_path / "check out")
    place(root / "libsrc/device/ane/bridge.m", "@class Nothing;\n" + BRIDGE)
    return root


def build(sources: Path, sdk: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    words = ("--target", "macos-arm64", "--sdk", str(sdk), "--out", str(sources / "out"))
    return run_script(sources, *words, check=check, CC="")


@pytest.fixture
def library(compiler: str, sources: Path, sdk: Path) -> Path:
    place(
        sources / "libsrc/device/ane/bridge.m",
        BRIDGE.replace("hidden", "bridge")
        + "int anepy_bridge(void) { return CFBundleGetVersion(); }\n",
    )
    build(sources, sdk)
    return sources / "out" / "libanepy.dylib"


def test_cross_built_library_is_as_expected(library: Path) -> None:
    found = sdk_check.read_macho(library)
    assert sdk_check.problems(found, PUBLIC) == []
    origin = sdk_check.framework_path("CoreFoundation")
    assert ("_CFBundleGetVersion", origin) in found.undefined
    assert found.signature == "ad hoc"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"cpu": 0x01000007}, "processor"),
        ({"kind": 8}, "file type"),
        ({"name": "libanepy.dylib"}, "install name"),
        ({"platform": 2}, "platform"),
        ({"oldest": (26, 0)}, "oldest macOS: (26, 0)"),
        ({"dependencies": ["/usr/local/lib/libomp.dylib"]}, "linked libraries"),
        ({"exported": ["_anepy_abi_version", "_helper"]}, "exported names"),
        ({"undefined": [("_ANEDeviceOpen", sdk_check.LIBRARIES[0])]}, "private symbol: _ANE"),
        (
            {"undefined": [("_OBJC_CLASS_$__ANEModel", sdk_check.LIBRARIES[0])]},
            "private symbol: _OBJC_CLASS_$__ANEModel",
        ),
        ({"undefined": [("_f", "ordinal 254")]}, "private symbol: _f from ordinal 254"),
        ({"undefined": [("_f", "/System/Library/PrivateFrameworks/A")]}, "private symbol: _f"),
    ],
)
def test_check_notices_what_is_wrong(library: Path, change: dict[str, object], word: str) -> None:
    changed = dataclasses.replace(sdk_check.read_macho(library), **change)  # type: ignore[arg-type]
    found = sdk_check.problems(changed, PUBLIC)
    assert any(word in sentence for sentence in found)


def test_check_notices_a_name_that_is_not_exported(library: Path) -> None:
    found = sdk_check.problems(sdk_check.read_macho(library), {*PUBLIC, "anepy_more"})
    assert len(found) == 1 and "anepy_more" in found[0]


def test_check_notices_an_edit_after_signing(library: Path) -> None:
    data = bytearray(library.read_bytes())
    data[4000] ^= 1
    library.write_bytes(data)
    assert "page 0 does not match" in sdk_check.problems(sdk_check.read_macho(library), PUBLIC)[0]


def test_check_other_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no 64-bit Mach-O"):
        sdk_check.read_macho(place(tmp_path / "x", b"\x7fELF" + bytes(100)))


def test_cross_build_private_symbol_fails_at_link(compiler: str, sources: Path, sdk: Path) -> None:
    place(
        sources / "libsrc/device/ane/bridge.m",
        "int ANEDeviceOpen(void);\nint anepy_bridge(void);\n"
        "int anepy_bridge(void) { return ANEDeviceOpen(); }\n",
    )
    result = build(sources, sdk, check=False)
    assert result.returncode == 1 and "ANEDeviceOpen" in result.stderr
    assert list((sources / "out").iterdir()) == []


@needs.NO_MAC
def test_cross_build_without_an_sdk_says_what_is_missing(sources: Path, tmp_path: Path) -> None:
    result = run_script(sources, "--target", "macos-arm64", check=False)
    assert result.returncode == 2 and "needs --sdk DIR" in result.stderr
    result = build(sources, tmp_path, check=False)
    assert result.returncode == 2 and "is no macOS SDK" in result.stderr
    assert result.stderr.count("\n") == 1


def test_build_script_sdk_for_another_target_is_refused(sources: Path, sdk: Path) -> None:
    words = ("--target", "linux-aarch64-glibc", "--sdk", str(sdk))
    result = run_script(sources, *words, check=False)
    assert result.returncode == 2 and "--sdk is for macos-* targets" in result.stderr


def test_library_against_a_real_sdk_is_as_expected(
    compiler: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sdk_check.main([needs.macos_sdk()]) == 0, capfd.readouterr().err
    assert "links nothing private" in capfd.readouterr().out
