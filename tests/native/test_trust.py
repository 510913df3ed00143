"""What is never opened: damaged files, caches that others can change, records of something else."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import needs
import pytest
from installations import TAG, by_place, installed, layout_of, release_of

from anepy.errors import DownloadError, LibraryBuildError, LibraryNotFoundError
from anepy.native import find, release, trust
from anepy.native.find import Layout
from anepy.system.version import __version__

pytestmark = pytest.mark.usefixtures("isolation")


@pytest.fixture
def never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a library is opened."""

    def fail(path: Path) -> None:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(find, "_open", fail)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# -------------------------------------------------------------------------------------- the content


def test_any_flipped_bit_of_a_cached_library_is_noticed(root: Path) -> None:
    layout = layout_of(root, wheel=True)
    path = find.build(layout=layout)
    size = len(path.read_bytes()) * 8
    for bit in random.Random(0).sample(range(size), 160):
        flip(path, bit)
        assert by_place(layout)["cache"].status in ("refused", "rejected"), bit
        flip(path, bit)
    assert by_place(layout)["cache"].status == "usable"


@pytest.mark.parametrize("place", ["package", "cache"])
def test_damaged_library_is_named_in_one_line_and_not_opened(
    root: Path, place: str, lines: list[str], never_opened: None
) -> None:
    layout = layout_of(root, wheel=True)
    path = layout.packaged if place == "package" else layout.cached
    assert layout.build_id is not None
    installed(path, f"{layout.build_id} library")
    path.write_bytes(path.read_bytes() + b".")
    reason = "is damaged: it does not have the recorded SHA-256"
    with pytest.raises(LibraryNotFoundError, match=reason):
        find.load(dataclasses.replace(layout, compiler=None))
    assert lines == [f"{path} {reason}"]


def test_damaged_library_is_compiled_again(root: Path, lines: list[str]) -> None:
    layout = layout_of(root, wheel=True)
    flip(find.build(layout=layout), 8 * 1000)
    assert find.load(layout)[1].place == "compile"
    assert len(lines) == 2 and "is damaged" in lines[0] and "compiling" in lines[1]
    assert find.load(layout)[1].place == "cache" and len(lines) == 2


def test_library_of_a_wheel_is_held_to_the_pinned_hash(
    root: Path, lines: list[str], never_opened: None
) -> None:
    layout = layout_of(root, wheel=True, compiler=None, offline=True)
    layout = dataclasses.replace(layout, release=release_of(layout, b"the library"))
    layout.packaged.parent.mkdir(parents=True)
    layout.packaged.write_bytes(b"the library")
    assert by_place(layout)["package"].status == "usable"
    layout.packaged.write_bytes(b"the librarY")
    with pytest.raises(LibraryNotFoundError, match="does not have the pinned SHA-256"):
        find.load(layout)
    assert len(lines) == 1


def test_library_without_a_record_is_not_opened(
    root: Path, lines: list[str], never_opened: None
) -> None:
    layout = layout_of(root, wheel=True, compiler=None)
    assert layout.build_id is not None
    installed(layout.cached, layout.build_id).with_name("libanepy.so.sha256").unlink()
    with pytest.raises(LibraryNotFoundError, match="its SHA-256 is recorded nowhere"):
        find.load(layout)
    assert find.verify(layout.cached, layout=layout)["ok"] is False
    assert len(lines) == 1


@pytest.mark.parametrize("text", ["", "no hash", "A" * 64, "\xff" * 64, "0" * 63])
def test_damaged_record_is_no_record(root: Path, text: str) -> None:
    layout = layout_of(root, wheel=True)
    path = find.build(layout=layout)
    path.with_name(f"{path.name}.sha256").write_text(text, "latin-1")
    assert by_place(layout)["cache"].status == "refused"


def test_fetch_from_file_damaged_on_the_way_is_refused(root: Path, tmp_path: Path) -> None:
    layout = layout_of(root, wheel=True)
    path = find.build(tmp_path / "usb", layout=layout)
    flip(path, 8 * 1000)
    with pytest.raises(DownloadError, match="SHA-256 recorded beside it"):
        find.fetch(path, layout=layout)
    assert not layout.cached.exists()


# --------------------------------------------------------------------------------------- the folder


def spoil_mode(mode: int) -> Callable[[Layout], None]:
    return lambda layout: layout.cached.parent.chmod(mode)


def spoil_owner(layout: Layout) -> None:
    os.chown(layout.cache, 12345, -1)


def spoil_file(layout: Layout) -> None:
    layout.cached.chmod(0o666)


def spoil_link(layout: Layout) -> None:
    layout.cache.rename(layout.cache.with_name("moved"))
    layout.cache.symlink_to("moved")


def spoil_above(layout: Layout) -> None:
    layout.cache.parent.chmod(0o777)


SPOILS = [
    (spoil_mode(0o777), "others can write to"),
    (spoil_mode(0o770), "others can write to"),
    (spoil_owner, "belongs to user 12345"),
    (spoil_file, "others can write to"),
    (spoil_link, "is a symbolic link"),
    (spoil_above, "everybody can write to"),
]


@pytest.mark.parametrize(
    ("spoil", "words"), SPOILS, ids=lambda value: getattr(value, "__name__", "")
)
def test_cache_that_others_can_change_is_not_used(
    root: Path,
    tmp_path: Path,
    spoil: Callable[[Layout], None],
    words: str,
    lines: list[str],
    never_opened: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither what lies there, nor as a place to put something: no compiler runs, nothing comes."""
    layout = layout_of(root, wheel=True, cache=tmp_path / "home" / "cache")
    find.build(layout=layout)
    if spoil is spoil_owner and os.geteuid() != 0:
        monkeypatch.setattr(os, "geteuid", lambda: 12345 + os.getuid())
        words = "belongs to user"
    else:
        spoil(layout)
    with pytest.raises(LibraryNotFoundError, match=words) as caught:
        find.load(layout)
    assert "\n" not in str(caught.value)
    assert len(lines) == 1 and words in lines[0]
    if spoil is spoil_file:
        return  # the folder is safe, another library may come into it
    with pytest.raises(LibraryBuildError, match=words):
        find.build(layout=layout)
    with pytest.raises(DownloadError, match=words):
        find.fetch(layout.packaged, layout=layout)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o077])
def test_cache_is_made_for_this_user_alone(root: Path, tmp_path: Path, mask: int) -> None:
    """Whatever the umask: with 002, usual where every user has a group, folders would be open."""
    layout = layout_of(root, wheel=True, cache=tmp_path / "new" / "cache")
    before = os.umask(mask)
    try:
        find.build(layout=layout)
    finally:
        os.umask(before)
    assert layout.cache.stat().st_mode & 0o777 == 0o700
    assert layout.cached.stat().st_mode & 0o022 == 0
    assert by_place(layout)["cache"].status == "usable"


# --------------------------------------------------------------------------------------- the record


def record(**changes: object) -> dict[str, object]:
    file = {"name": "libanepy.so", "size": 1, "sha256": "0" * 64}
    whole: dict[str, object] = {"version": __version__, "sources": "", "base_url": ""}
    return {**whole, "files": {TAG: file}, **changes}


def test_release_record_is_read_or_absent(tmp_path: Path) -> None:
    assert release.read(tmp_path)["files"] == {}
    (tmp_path / "release.json").write_text(json.dumps(record()))
    assert list(release.read(tmp_path)["files"]) == [TAG]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "cannot read"),
        ("[]", "is damaged"),
        (json.dumps(record(extra=1)), "is damaged"),
        (json.dumps(record(files={TAG: {"name": "x", "size": 1, "sha256": "0"}})), "is damaged"),
        (
            json.dumps(record(files={TAG: {"name": "../x", "size": 1, "sha256": "0" * 64}})),
            "damaged",
        ),
        (json.dumps(record(version="0.0.9")), r"is of anepy 0\.0\.9, this is"),
    ],
)
def test_wrong_release_record_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "release.json").write_text(text)
    with pytest.raises(LibraryNotFoundError, match=words) as caught:
        release.read(tmp_path)
    assert "\n" not in str(caught.value) and "reinstall anepy" in str(caught.value)


def test_record_is_what_sha256sum_writes(tmp_path: Path) -> None:
    path = tmp_path / "libanepy.so"
    trust.record(path, "0" * 64)
    assert (tmp_path / "libanepy.so.sha256").read_text() == f"{'0' * 64}  libanepy.so\n"
    assert trust.recorded(path) == "0" * 64
    trust.forget(path)
    assert trust.recorded(path) is None and list(tmp_path.iterdir()) == []


def test_folder_without_execution_is_named_before_anything_is_compiled(
    root: Path, tmp_path: Path, lines: list[str]
) -> None:
    """Compiling took its seconds each time, and what came of it could never be loaded."""
    layout = layout_of(root, wheel=True)
    folder = tmp_path / "noexec"
    folder.mkdir()
    with needs.small_disk(folder, 4096, "noexec", "mode=700"):
        layout = dataclasses.replace(layout, cache=folder)
        with pytest.raises(LibraryNotFoundError, match=f"{folder} is mounted noexec"):
            find.load(layout)
        assert lines == [] and list(folder.iterdir()) == []
    assert trust.forbidden(folder / "libanepy.so") is None
