"""Platform, sources and `build_lib.sh`, on a tiny stand-in source tree."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
from pathlib import Path

import needs
import pytest
from installations import (
    CHECKOUT,
    TAG,
    built,
    by_place,
    layout_of,
    make_sources,
    place,
    run_script,
)

from anepy.errors import (
    LibraryBuildError,
    UnsupportedPlatformError,
)
from anepy.native import build, find

pytestmark = pytest.mark.usefixtures("isolation")


# ----------------------------------------------------------------------------------------- platform


@pytest.mark.parametrize(
    ("system", "machine", "libc", "expected"),
    [
        ("linux", "x86_64", "glibc", "linux-x86_64-glibc"),
        ("linux", "AMD64", "glibc", "linux-x86_64-glibc"),
        ("linux", "aarch64", "musl", "linux-aarch64-musl"),
        ("linux", "arm64", "glibc", "linux-aarch64-glibc"),
        ("linux", "riscv64", "glibc", "linux-riscv64-glibc"),
        ("darwin", "arm64", "musl", "macos-arm64"),
        ("darwin", "x86_64", "musl", "macos-x86_64"),
    ],
)
def test_tag_of_known_platform_has_its_tag(
    system: str, machine: str, libc: str, expected: str
) -> None:
    assert build.tag_of(system, machine, libc, 64, "little") == expected


@pytest.mark.parametrize(
    ("system", "machine", "bits", "byteorder"),
    [
        ("win32", "AMD64", 64, "little"),
        ("freebsd14", "amd64", 64, "little"),
        ("linux", "aarch64", 32, "little"),
        ("linux", "s390x", 64, "big"),
        ("linux", "", 64, "little"),
        ("darwin", "ppc64", 64, "little"),
    ],
)
def test_tag_of_unknown_platform_names_what_was_found(
    system: str, machine: str, bits: int, byteorder: str
) -> None:
    with pytest.raises(UnsupportedPlatformError, match=f"{system}.*{bits}-bit"):
        build.tag_of(system, machine, "glibc", bits, byteorder)


def test_platform_tag_agrees_with_the_script(root: Path) -> None:
    assert run_script(root, "--print-tag").stdout == f"{TAG}\n"


@pytest.mark.parametrize(
    ("variable", "present", "expected"),
    [
        (None, ["cc", "gcc"], "cc"),
        (None, ["clang", "zig"], "clang"),
        (None, ["zig"], "zig"),
        (None, [], None),
        ("gcc", ["cc", "gcc"], "gcc"),
        ("gcc -m64", ["gcc"], "gcc -m64"),
        ("tcc", ["cc"], None),
    ],
)
def test_find_compiler_takes_the_variable_then_a_known_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str | None,
    present: list[str],
    expected: str | None,
) -> None:
    for name in present:
        place(tmp_path / "bin" / name, "#!/bin/sh\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(build, "_search_path", lambda: os.environ["PATH"])  # without ziglang
    if variable is not None:
        monkeypatch.setenv("CC", variable)
    assert build.find_compiler() == expected


# ------------------------------------------------------------------------------------------ sources


def test_source_hash_agrees_with_the_script(root: Path) -> None:
    place(root / "libsrc" / "Zebra.h", "")
    place(root / "libsrc" / "model" / "a-b.c", "int x;\n")
    (root / "libsrc" / "link.c").symlink_to("api.c")
    assert run_script(root, "--print-hash").stdout == find.source_hash(root) + "\n"


def test_source_hash_of_this_checkout_agrees_with_the_script() -> None:
    assert run_script(CHECKOUT, "--print-hash").stdout == find.source_hash(CHECKOUT) + "\n"


@pytest.mark.parametrize("name", ["libsrc/api.c", "libsrc/anepy.h", "libsrc/new.c", "build_lib.sh"])
def test_source_hash_source_edit_changes_it(root: Path, name: str) -> None:
    before = find.source_hash(root)
    with open(root / name, "a") as file:
        file.write("# or //\n")
    assert find.source_hash(root) != before


def test_source_hash_rename_changes_it(root: Path) -> None:
    before = find.source_hash(root)
    (root / "libsrc" / "api.c").rename(root / "libsrc" / "bpi.c")
    assert find.source_hash(root) != before


def test_source_hash_other_files_do_not_matter(root: Path) -> None:
    before = find.source_hash(root)
    place(root / "libsrc" / "notes.txt", "x")
    place(root / "anepy" / "new.py", "x")
    assert find.source_hash(root) == before


def test_find_sources_prefers_the_wheel_then_the_checkout(tmp_path: Path) -> None:
    package = tmp_path / "site" / "anepy"
    package.mkdir(parents=True)
    assert build.find_sources(package) is None
    make_sources(tmp_path / "site")
    assert build.find_sources(package) == tmp_path / "site"
    make_sources(package / "_src")
    assert build.find_sources(package) == package / "_src"


# ------------------------------------------------------------------------------------- build script


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_build_library_works_and_carries_its_id(
    root: Path, compiler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", needs.program(compiler))
    layout = layout_of(root)
    path = find.build(layout=layout)
    assert path == root / "anepy" / "_lib" / TAG / layout.file_name
    assert sorted(path.parent.iterdir()) == built(path)
    lib = find._open(path)
    lib.anepy_root.restype, lib.anepy_root.argtypes = ctypes.c_double, [ctypes.c_double]
    assert lib.anepy_root(4.0) == 42.0
    assert lib.anepy_build_id().decode() == layout.build_id
    assert not hasattr(lib, "anepy_hidden"), "only what is marked ANEPY_API may be visible"


def test_build_debug_library_says_so_and_is_used(root: Path) -> None:
    layout = layout_of(root)
    path = find.build(debug=True, layout=layout)
    assert find._open(path).anepy_build_id().decode() == f"{layout.build_id}-debug"
    found = find.search(layout)[0]
    assert (found.status, found.reason) == ("usable", "debug build of these sources")


PLAIN = """
#if defined(__AVX__) || defined(__SSE3__) || defined(__ARM_FEATURE_ATOMICS)
#error "this would not run on every processor of the family"
#endif
int anepy_overflow(int x);
int anepy_overflow(int x) { return x + 1; }
"""


@pytest.fixture
def zig(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the compiler of the package ziglang; its cache is kept for the next test."""
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "zig"))
    return needs.zig()


@needs.LINUX
def test_build_by_zig_is_for_every_processor(
    root: Path, monkeypatch: pytest.MonkeyPatch, zig: str
) -> None:
    """By itself `zig cc` compiles for the processor it runs on; its checks stop at overflow."""
    monkeypatch.setenv("CC", zig)
    place(root / "libsrc" / "plain.c", PLAIN)
    layout = layout_of(root)
    path = find.build(layout=layout)
    assert b"ubsan" not in path.read_bytes()
    assert find._open(path).anepy_build_id().decode() == layout.build_id
    assert sorted(path.parent.iterdir()) == built(path)


def test_load_without_another_compiler_takes_the_package_ziglang(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    zig: str,
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in "bash env dirname uname getconf find sort tr xargs sha256sum cut sed".split():
        (tools / name).symlink_to(needs.program_path(name))
    for name in "mkdir mktemp rm grep ls nproc mv chmod head cat".split():
        (tools / name).symlink_to(needs.program_path(name))
    monkeypatch.setenv("PATH", str(tools))
    assert find.load(layout_of(root))[1].place == "compile"
    assert "compiling the native library with zig (once" in capsys.readouterr().err


def test_build_leaves_the_source_tree_alone(root: Path, tmp_path: Path) -> None:
    """An installed wheel may be read-only; root can write anywhere, so compare before and after."""
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    out = tmp_path / "else where"
    path = find.build(out, layout=layout_of(root))
    assert path.parent == out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_build_verbose_shows_the_command(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    find.build(layout=layout_of(root))
    assert capfd.readouterr() == ("", "")
    find.build(verbose=True, layout=layout_of(root))
    shown = capfd.readouterr()
    assert shown.out == "" and "-std=c11" in shown.err and "libanepy" in shown.err


def test_build_flags_are_portable_whatever_the_environment_says(root: Path) -> None:
    """A -march or fast-math meant for other programs must not get in: conda sets such CFLAGS."""
    bad = "-march=native -ffast-math -Ofast"
    shown = run_script(root, CFLAGS=bad, CPPFLAGS=bad, LDFLAGS=bad).stdout
    commands = [line for line in shown.splitlines() if " -o " in line]
    assert len(commands) == 2
    for wanted in ("-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-fPIC", "-Ilibsrc"):
        assert wanted in commands[0]
    assert commands[1].endswith("-lm")
    assert not any(word in shown for word in ("-march", "-mavx", "fast-math", "-Ofast", "-flto"))
    path, sha256 = shown.splitlines()[-2:]
    assert sha256 == f"sha256 {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"


def test_build_script_error_names_the_first_message_and_keeps_the_old_library(root: Path) -> None:
    layout = layout_of(root)
    path = find.build(layout=layout)
    old = path.read_bytes()
    place(root / "libsrc" / "bad.c", "int f(void) { return undeclared_thing; }\n")
    with pytest.raises(LibraryBuildError) as caught:
        find.build(layout=layout)
    first, *rest = str(caught.value).splitlines()
    assert "undeclared_thing" in first and "libsrc/bad.c:1" in first and "build_lib.sh" in first
    assert any("compiler: " in line for line in rest) and len(rest) <= 20
    assert path.read_bytes() == old and sorted(path.parent.iterdir()) == built(path)


@needs.LINUX  # the linkers of macOS refuse undefined symbols by themselves
def test_build_script_undefined_symbol_fails_at_link(root: Path) -> None:
    (root / "libsrc" / "model" / "api.c").unlink()
    with pytest.raises(LibraryBuildError, match="anepy_hidden"):
        find.build(layout=layout_of(root))


def test_build_script_werror_turns_a_warning_into_a_failure(root: Path) -> None:
    place(root / "libsrc" / "odd.c", "int anepy_unannounced(void) { return 1; }\n")
    run_script(root)
    result = run_script(root, "--werror", check=False)
    assert result.returncode == 1 and "missing-prototypes" in result.stderr


@pytest.mark.parametrize(
    ("flags", "folder", "symbol"),
    [
        (["--asan", "--ubsan"], "-address-undefined", b"__asan_init"),
        (["--tsan"], "-thread", b"__tsan_init"),
    ],
)
def test_build_script_sanitized_library_stays_out_of_the_way(
    root: Path, flags: list[str], folder: str, symbol: bytes
) -> None:
    """Opening such a library in a plain Python ends the process, so `library` must not find it."""
    run_script(root, *flags)
    layout = layout_of(root)
    path = root / "anepy" / "_lib" / f"{TAG}{folder}" / layout.file_name
    assert symbol in path.read_bytes()
    assert by_place(layout)["package"].status == "missing"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fast"], "unknown option --fast"),
        (["--out"], "--out needs a value"),
        (["--target", "plan9-x86_64"], "unknown target plan9-x86_64"),
        (["--target", "linux-x86_64-bionic"], "unknown target"),
        (["--asan", "--tsan"], "exclude each other"),
    ],
)
def test_build_script_wrong_usage_exits_2(root: Path, arguments: list[str], words: str) -> None:
    result = run_script(root, *arguments, check=False)
    assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1


@needs.X86
def test_build_script_other_machine_is_cross_compiled(root: Path) -> None:
    needs.program("aarch64-linux-gnu-gcc", package="gcc-aarch64-linux-gnu")
    run_script(root, "--target", "linux-aarch64")
    path = root / "anepy" / "_lib" / "linux-aarch64-glibc" / "libanepy.so"
    assert path.read_bytes()[18:20] == b"\xb7\x00"  # ELF e_machine: AArch64


def test_build_script_no_compiler_is_one_line(root: Path, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    needed = "bash env dirname uname getconf find sort tr xargs sha256sum cut sed"
    for name in needed.split():
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    result = run_script(root, check=False, PATH=str(tools))
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "no C compiler found (tried cc, gcc, clang, zig)" in result.stderr
    assert "apt install gcc" in result.stderr or "xcode-select --install" in result.stderr
    result = run_script(root, check=False, CC="no-such-cc")
    assert result.returncode == 1 and "CC=no-such-cc was not found" in result.stderr
    assert result.stderr.count("\n") == 1


def test_build_script_compiler_without_headers_names_the_package(
    root: Path, tmp_path: Path
) -> None:
    """Debian's gcc alone, without libc6-dev, stops at the first #include."""
    real = needs.compiler()
    wrapper = place(tmp_path / "my bin" / "bare cc", f'#!/bin/sh\nexec {real} -nostdinc "$@"\n')
    wrapper.chmod(0o755)
    result = run_script(root, check=False, CC=str(wrapper))
    assert result.returncode == 1 and "libc6-dev" in result.stderr
    assert list((root / "anepy" / "_lib" / TAG).iterdir()) == []
