"""Choosing, fetching and opening the native library, on a tiny stand-in source tree."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import needs
import pytest
from http_server import Answer, FileServer, wait_for
from installations import (
    ABI,
    EMPTY,
    SOURCES,
    TAG,
    built,
    by_place,
    installed,
    layout_of,
    place,
    python,
    release_of,
)

from anepy.errors import (
    AbiMismatchError,
    ChecksumError,
    DownloadError,
    LibraryBuildError,
    LibraryNotFoundError,
    OfflineError,
)
from anepy.native import find
from anepy.native.find import Layout
from anepy.system import download

pytestmark = pytest.mark.usefixtures("isolation")


# ------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("packaged", "cached", "expected"),
    [
        (None, None, {"package": "missing", "cache": "missing", "compile": "possible"}),
        ("{id}", None, {"package": "usable"}),
        ("{id}-debug", None, {"package": "usable"}),
        ("0123456789abcdef", "{id}", {"package": "rejected", "cache": "usable"}),
        ("", "\0" * 100, {"package": "rejected", "cache": "rejected", "compile": "possible"}),
    ],
)
@pytest.mark.parametrize("wheel", [False, True])
def test_search_local_files_count_only_with_the_id_of_the_sources(
    root: Path, packaged: str | None, cached: str | None, expected: dict[str, str], wheel: bool
) -> None:
    layout = layout_of(root, wheel=wheel)
    assert layout.build_id is not None
    for path, content in ((layout.packaged, packaged), (layout.cached, cached)):
        if content is not None:
            installed(path, b"\x7fELF.." + content.format(id=layout.build_id).encode() + b"\0..")
    found = by_place(layout)
    assert list(found) == ["package", "cache", "download", "compile"]
    assert {name: found[name].status for name in expected} == expected
    assert all(candidate.reason for candidate in found.values())


def test_search_stale_library_says_other_sources(root: Path) -> None:
    layout = layout_of(root)
    place(layout.packaged, "0123456789abcdef")
    assert by_place(layout)["package"].reason == "was built from other sources"


def test_search_without_sources_takes_what_the_package_has(root: Path) -> None:
    layout = layout_of(root, sources=None, source_hash=None)
    installed(layout.packaged, "anything")
    found = by_place(layout)
    assert found["package"].status == "usable" and found["compile"].status == "impossible"


@pytest.mark.parametrize(("kind", "status"), [("file", "usable"), ("folder", "missing")])
def test_search_override_is_the_only_place(root: Path, kind: str, status: str) -> None:
    layout = layout_of(root)
    assert layout.build_id is not None
    place(layout.packaged, layout.build_id)
    path = root / "mine.so"
    path.mkdir() if kind == "folder" else path.write_text("x")
    found = find.search(dataclasses.replace(layout, override=str(path)))
    assert [(c.place, c.path, c.status) for c in found] == [("ANEPY_LIB", path, status)]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({}, "possible", "from http://base/lib.so"),
        ({"offline": True}, "impossible", "ANEPY_OFFLINE"),
        ({"tag": "linux-riscv64-musl"}, "impossible", "on linux-riscv64-musl"),
        ({"release": EMPTY}, "impossible", "nothing is published"),
        ({"source_hash": "f" * 64}, "impossible", "nothing is published for these sources"),
    ],
)
def test_search_download_needs_a_file_pinned_for_these_sources(
    root: Path, changes: dict[str, object], status: str, words: str
) -> None:
    layout = layout_of(root)
    layout = dataclasses.replace(layout, release=release_of(layout, b"", "http://base"))
    found = by_place(dataclasses.replace(layout, **changes))  # type: ignore[arg-type]
    assert found["download"].status == status and words in found["download"].reason


@pytest.mark.parametrize(
    ("content", "status"), [(b"release", "usable"), (b"rel\0ase", "refused"), (None, "missing")]
)
def test_search_cached_release_is_hashed_every_time(
    root: Path, content: bytes | None, status: str
) -> None:
    layout = layout_of(root)
    layout = dataclasses.replace(layout, release=release_of(layout, b"release"))
    if content is not None:
        place(layout.cached_release, content)
    found = by_place(layout)
    assert list(found) == ["package", "cache", "cached release", "download", "compile"]
    assert found["cached release"].status == status


def test_search_places_depend_on_version_abi_sources_and_platform(root: Path) -> None:
    layout = layout_of(root)
    changes: list[dict[str, object]] = [
        {},
        {"abi": ABI + 1},
        {"release": {**EMPTY, "version": "9.9.8"}},
        {"source_hash": "0" * 64},
        {"tag": "linux-aarch64-musl"},
    ]
    paths = {dataclasses.replace(layout, **change).cached for change in changes}  # type: ignore[arg-type]
    assert len(paths) == len(changes)
    assert layout.cached.parts[-4:-2] == ("lib", f"9.9.9-abi{ABI}-{layout.build_id}")


def test_search_changes_nothing(root: Path, tmp_path: Path) -> None:
    layout = layout_of(root)
    before = sorted(tmp_path.rglob("*"))
    find.search(layout)
    assert sorted(tmp_path.rglob("*")) == before


def test_layout_detect_describes_this_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ANEPY_OFFLINE", "1")
    monkeypatch.setenv("ANEPY_LIB", "x.so")
    layout = Layout.detect()
    assert (layout.tag, layout.abi, layout.offline) == (TAG, ABI, True)
    assert layout.override == "x.so" and layout.cache == tmp_path / "cache"
    assert layout.sources is not None and (layout.sources / "libsrc" / "anepy.h").is_file()


# ------------------------------------------------------------------------------------------ opening


def test_load_checkout_compiles_into_the_package_once(root: Path, lines: list[str]) -> None:
    layout = layout_of(root)
    lib, candidate = find.load(layout)
    assert candidate.place == "compile" and candidate.path == layout.packaged
    assert lib.anepy_build_id().decode() == layout.build_id
    assert (
        len(lines) == 1
        and "compiling the native library with " in lines[0]
        and "(once, about" in lines[0]
    )
    _, candidate = find.load(layout)
    assert candidate.place == "package" and len(lines) == 1
    assert not layout.cache.exists()


def test_load_wheel_compiles_into_the_cache(root: Path, lines: list[str]) -> None:
    layout = layout_of(root, wheel=True)
    before = sorted(layout.package.rglob("*"))
    _, candidate = find.load(layout)
    assert candidate.path == layout.cached and layout.cached.is_file()
    assert sorted(layout.package.rglob("*")) == before
    assert find.load(layout)[1].place == "cache" and len(lines) == 1


def test_load_changed_sources_are_compiled_again(root: Path, lines: list[str]) -> None:
    place(layout_of(root).packaged, "0123456789abcdef")
    layout = layout_of(root)
    lib, _ = find.load(layout)
    assert lib.anepy_build_id().decode() == layout.build_id
    assert len(lines) == 1 and "its sources changed" in lines[0]


def test_load_file_the_system_refuses_falls_through_to_the_compiler(
    root: Path, lines: list[str]
) -> None:
    """A home folder shared by machines can hold a library this one's C library cannot open."""
    layout = layout_of(root)
    assert layout.build_id is not None
    installed(layout.packaged, f"not a library, but {layout.build_id}")
    lib, candidate = find.load(layout)
    assert candidate.place == "compile" and lib.anepy_abi_version() == ABI


def test_load_other_abi_is_an_error_not_a_reason_to_go_on(root: Path, lines: list[str]) -> None:
    text = SOURCES["libsrc/api.c"].replace(f"return {ABI};", f"return {ABI + 1};")
    place(root / "libsrc" / "api.c", text)
    layout = layout_of(root)
    with pytest.raises(AbiMismatchError, match=f"ABI {ABI + 1} instead of {ABI}"):
        find.load(layout)
    with pytest.raises(AbiMismatchError):
        find.load(layout)
    assert len(lines) == 1, "compiling the same sources again cannot help"


def test_load_override_is_opened_unchecked(root: Path, tmp_path: Path, lines: list[str]) -> None:
    path = find.build(tmp_path / "mine", layout=layout_of(root))
    place(root / "libsrc" / "api.c", "int changed;\n")
    layout = layout_of(root, override=str(path), compiler=None)
    assert find.load(layout)[1].place == "ANEPY_LIB"
    assert lines == [f"using {path}, which ANEPY_LIB names; it is not checked"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "does not exist"), (b"", "cannot be opened"), (b"\x7fELF broken", "cannot be opened")],
)
def test_load_bad_override_is_final_and_named(
    root: Path, content: bytes | None, words: str, lines: list[str]
) -> None:
    path = root / "mine.so"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LibraryNotFoundError, match=words) as caught:
        find.load(layout_of(root, override=str(path)))
    assert "ANEPY_LIB" in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(lines) == (content is not None)
    assert not (root / "anepy" / "_lib").exists()


def test_load_foreign_library_is_refused(root: Path, tmp_path: Path) -> None:
    source = place(tmp_path / "x.c", "int other_thing(void) { return 1; }\n")
    path = tmp_path / "x.so"
    subprocess.run([needs.compiler(), "-shared", "-fPIC", "-o", path, source], check=True)
    with pytest.raises(AbiMismatchError, match=r"x\.so is not a library of anepy"):
        find.load(layout_of(root, override=str(path)))


def test_load_nothing_works_lists_every_place_and_both_remedies(
    root: Path, lines: list[str]
) -> None:
    layout = layout_of(root, wheel=True, compiler=None)
    place(layout.packaged, "0123456789abcdef")
    with pytest.raises(LibraryNotFoundError) as caught:
        find.load(layout)
    message = str(caught.value)
    assert "\n" not in message and lines == []
    for words in (
        f"package: {layout.packaged} was built from other sources",
        f"cache: {layout.cached} does not exist",
        "download: nothing is published",
        "compile: no C compiler (tried cc, gcc, clang, zig)",
        "install a C compiler (",
        "anepy lib fetch --from FILE",
        "ANEPY_LIB",
    ):
        assert words in message


def test_load_unwritable_cache_names_the_variable(root: Path, lines: list[str]) -> None:
    """Mode bits do not stop root, a parent that is a file does."""
    layout = layout_of(root, wheel=True, cache=place(root / "file", "") / "cache")
    with pytest.raises(LibraryBuildError, match="ANEPY_CACHE") as caught:
        find.load(layout)
    assert str(layout.cache) in str(caught.value) and "\n" not in str(caught.value)


def test_build_target_unwritable_checkout_is_the_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(root)
    assert layout.build_target == layout.packaged
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert layout.build_target == layout.cached


def test_library_is_opened_once_for_all_threads(
    root: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(root)
    monkeypatch.setattr(Layout, "detect", lambda: layout)
    assert find.loaded() is None
    found: list[ctypes.CDLL] = []
    threads = [threading.Thread(target=lambda: found.append(find.library())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len({id(lib) for lib in found}) == 1
    assert len(lines) == 1
    candidate = find.loaded()
    assert candidate is not None and candidate.path == layout.packaged


def test_library_failure_is_not_remembered(
    root: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "detect", lambda: layout_of(root, compiler=None))
    with pytest.raises(LibraryNotFoundError):
        find.library()
    monkeypatch.setattr(Layout, "detect", lambda: layout_of(root))
    assert find.library().anepy_abi_version() == ABI


def test_notify_by_default_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    find.notify("compiling")
    assert capsys.readouterr() == ("", "anepy: compiling\n")


BUILD = (
    "from pathlib import Path\n"
    "from anepy.native import find\n"
    "import dataclasses\n"
    "package = Path(sys.argv[1])\n"
    "layout = dataclasses.replace(find.Layout.detect(), package=package,\n"
    "    sources=package.parent, source_hash=find.source_hash(package.parent))\n"
    "lib, candidate = find.load(layout)\n"
    "print(lib.anepy_build_id().decode(), candidate.place)\n"
)


def test_load_processes_at_once_all_get_a_whole_library(root: Path) -> None:
    layout = layout_of(root)
    processes = [python(BUILD, str(layout.package)) for _ in range(4)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert {out.split()[0] for out, _ in results} == {layout.build_id}
    assert "compile" in {out.split()[1] for out, _ in results}
    assert sorted(layout.packaged.parent.iterdir()) == built(layout.packaged)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_load_stopped_ends_the_compilers_and_leaves_nothing(
    root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    real = needs.compiler()
    slow = place(
        tmp_path / "slow-cc",
        f'#!/bin/sh\ncase "$*" in *api.c*) echo $$ >>"{tmp_path}/pids"; exec sleep 60 ;; esac\n'
        f'exec {real} "$@"\n',
    )
    slow.chmod(0o755)
    process = python(BUILD, str(root / "anepy"), CC=str(slow))
    try:
        assert wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert number == signal.SIGKILL or "KeyboardInterrupt" in errors
    for pid in (tmp_path / "pids").read_text().split():
        assert wait_for(lambda pid=pid: not alive(int(pid)))
    assert wait_for(lambda: list((root / "anepy" / "_lib" / TAG).iterdir()) == [])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z")


def test_translated_python_is_warned_and_still_loads(
    root: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of(root)
    find.build(layout=layout)
    monkeypatch.setattr(find, "translated", lambda: True)
    find.load(layout)
    assert len(lines) == 1 and "Rosetta" in lines[0]


# ----------------------------------------------------------------------------------------- releases


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
def released(root: Path, server: FileServer) -> tuple[Layout, bytes]:
    """Return an installed wheel for which the server has a release, and its contents."""
    layout = layout_of(root, wheel=True)
    content = find.build(root / "release", layout=layout).read_bytes()
    server.answers["/v9/lib.so"] = [Answer(content)]
    release = release_of(layout, content, server.url("/v9"))
    return dataclasses.replace(layout, release=release, compiler=None), content


def test_load_pinned_release_is_downloaded_once(
    released: tuple[Layout, bytes], server: FileServer, lines: list[str]
) -> None:
    layout, content = released
    lib, candidate = find.load(layout)
    assert candidate.place == "download" and lib.anepy_abi_version() == ABI
    assert layout.cached_release.read_bytes() == content
    assert len(lines) == 1 and "downloading the native library" in lines[0]
    assert find.load(layout)[1].place == "cached release"
    assert len(server.requests) == 1 and len(lines) == 1


def test_load_damaged_cached_release_is_downloaded_again(
    released: tuple[Layout, bytes], server: FileServer, lines: list[str]
) -> None:
    layout, content = released
    place(layout.cached_release, content[:-1] + b"?")
    assert find.load(layout)[1].place == "download"
    assert layout.cached_release.read_bytes() == content


def test_load_mirror_is_asked_instead(
    released: tuple[Layout, bytes],
    server: FileServer,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, content = released
    server.answers = {"/mirror/lib.so": [Answer(content)]}
    monkeypatch.setenv("ANEPY_MIRROR", server.url("/mirror"))
    assert find.load(layout)[1].place == "download"
    assert server.requests == ["/mirror/lib.so"] and server.url("/mirror/lib.so") in lines[0]


def test_load_failed_download_is_reported_and_the_compiler_takes_over(
    released: tuple[Layout, bytes], server: FileServer, lines: list[str]
) -> None:
    layout, content = released
    server.answers["/v9/lib.so"] = [Answer(b"?" + content[1:])]
    layout = dataclasses.replace(layout, compiler="cc")
    assert find.load(layout)[1].place == "compile"
    assert len(lines) == 3 and "SHA-256" in lines[1] and "compiling" in lines[2]
    assert not layout.cached_release.exists()


def test_load_failed_download_without_compiler_names_both(
    released: tuple[Layout, bytes], server: FileServer, lines: list[str]
) -> None:
    layout, _ = released
    server.answers = {}
    with pytest.raises(LibraryNotFoundError, match=r"download: .*404.*no C compiler"):
        find.load(layout)


def test_load_offline_asks_nobody(
    released: tuple[Layout, bytes], server: FileServer, lines: list[str]
) -> None:
    layout = dataclasses.replace(released[0], offline=True)
    with pytest.raises(LibraryNotFoundError, match="download: ANEPY_OFFLINE forbids it"):
        find.load(layout)
    assert server.requests == []


def test_load_no_release_pinned_never_touches_the_network(
    root: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*arguments: object, **options: object) -> Path:
        raise AssertionError("no network without a pinned file")

    monkeypatch.setattr(download, "download", forbidden)
    assert find.load(layout_of(root, wheel=True))[1].place == "compile"


def test_fetch_installs_the_release_and_drops_the_compiled_one(
    released: tuple[Layout, bytes], lines: list[str]
) -> None:
    layout, content = released
    place(layout.cached, content)
    path = find.fetch(layout=layout)
    assert path == layout.cached_release and path.read_bytes() == content
    assert find.load(layout)[1].place == "cached release"


def test_fetch_from_file_is_held_to_the_pinned_hash(
    released: tuple[Layout, bytes], server: FileServer, root: Path, lines: list[str]
) -> None:
    layout, content = released
    good, bad = place(root / "good", content), place(root / "bad", content[:-1] + b"?")
    with pytest.raises(ChecksumError, match="bad"):
        find.fetch(bad, layout=layout)
    assert not layout.cached_release.exists()
    assert find.fetch(good, layout=layout) == layout.cached_release
    assert server.requests == []


def test_fetch_offline_forbids_the_network_but_not_a_file(
    released: tuple[Layout, bytes],
    server: FileServer,
    root: Path,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout, content = released
    monkeypatch.setenv("ANEPY_OFFLINE", "1")
    with pytest.raises(OfflineError):
        find.fetch(layout=layout)
    assert server.requests == [] and lines == []
    find.fetch(place(root / "good", content), layout=layout)


def test_fetch_nothing_published_says_what_to_do(root: Path) -> None:
    with pytest.raises(DownloadError, match=r"9\.9\.9 on .*anepy lib build.*--from"):
        find.fetch(layout=layout_of(root))


def test_fetch_from_file_without_release_needs_the_same_sources(
    root: Path, tmp_path: Path, lines: list[str]
) -> None:
    """This is how a library gets to a machine with neither compiler nor network."""
    layout = layout_of(root, wheel=True, compiler=None)
    built = find.build(tmp_path / "elsewhere", layout=layout_of(root, wheel=True))
    assert find.fetch(built, layout=layout) == layout.cached
    assert find.load(layout)[1].place == "cache"
    other = place(tmp_path / "other.so", b"0123456789abcdef")
    with pytest.raises(DownloadError, match=r"other\.so was not built from the sources"):
        find.fetch(other, layout=layout)
    with pytest.raises(DownloadError, match=r"none\.so: No such file"):
        find.fetch(tmp_path / "none.so", layout=layout)


def test_fetch_shadowed_by_the_package_says_so(
    root: Path, tmp_path: Path, lines: list[str]
) -> None:
    layout = layout_of(root)
    find.build(layout=layout)
    find.fetch(layout.packaged, layout=layout)
    assert len(lines) == 1 and f"{layout.packaged} comes before" in lines[0]


def test_verify_tells_good_from_foreign(released: tuple[Layout, bytes], tmp_path: Path) -> None:
    layout, content = released
    report = find.verify(layout=layout)
    assert report["ok"] is False and report["path"] is None
    find.fetch(layout=layout)
    report = find.verify(layout=layout)
    assert report["ok"] is True and report["reason"] == "has the pinned SHA-256"
    assert report["sha256"] == hashlib.sha256(content).hexdigest() == report["pinned_sha256"]
    assert report["build_id"] == report["expected_build_id"] == layout.build_id
    json.dumps(report)
    layout = dataclasses.replace(layout, release=EMPTY)
    report = find.verify(place(tmp_path / "bare.so", content), layout=layout)
    assert report["ok"] is False and "recorded nowhere" in str(report["reason"])
    report = find.verify(installed(tmp_path / "copy.so", content), layout=layout)
    assert report["ok"] is True and report["reason"] == "built from these sources"
    layout = dataclasses.replace(layout, source_hash="0" * 64)
    report = find.verify(tmp_path / "copy.so", layout=layout)
    assert report["ok"] is False and report["reason"] == "was built from other sources"


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF nonsense"])
def test_verify_broken_file_reports_instead_of_raising(
    root: Path, tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "broken.so"
    if content is not None:
        path.write_bytes(content)
    report = find.verify(path, layout=layout_of(root))
    assert report["ok"] is False and report["reason"]
