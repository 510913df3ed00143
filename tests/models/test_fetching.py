"""Fetching by name, from a server on this machine that holds what is wanted, or something else."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import needs
import pytest
from commands import Run, assert_one_line_error, runner
from http_server import Answer, FileServer

from anepy.errors import ChecksumError, ConfigError, DownloadError
from anepy.models import catalog, fetching
from anepy.system import download

MODEL, TEXT = b"model" * 1000, b"once upon a time\n" * 500
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def source(name: str, body: bytes, **changes: object) -> catalog.Source:
    made = catalog.Source(name, catalog.HUB, f"a/b/{name}", len(body), sha256(body))
    return replace(made, **changes)  # type: ignore[arg-type]


def item(*sources: catalog.Source, folder: str = "") -> catalog.Item:
    return catalog.Item("thing", "data", "MIT", "tests", sources, folder)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FileServer]:
    with FileServer() as server:
        for name in ("http_proxy", "https_proxy", "all_proxy", "ANEPY_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv("ANEPY_MIRROR", server.url())
        monkeypatch.setenv("ANEPY_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(download, "_sleep", lambda seconds: None)
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "here"
    made.mkdir()
    return made


@pytest.fixture
def run(
    server: FileServer,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    monkeypatch.chdir(folder)
    return runner(capsys, monkeypatch)


def bring(what: catalog.Item, folder: Path, force: bool = False) -> list[fetching.Fetched]:
    return fetching.fetch(what, folder, download.progress_bar, force)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------- the catalogue


def test_catalogue_is_well_formed() -> None:
    known = [entry.name for entry in catalog.ITEMS]
    assert len(set(known)) == len(known) and {"stories260K", "stories110M"} <= set(known)
    for entry in catalog.ITEMS:
        assert entry.kind in ("model", "tokenizer", "data") and entry.licence and entry.purpose
        assert entry.nbytes > 0 and entry.files
        for file in entry.files:
            assert "/" not in file.name and file.base.startswith("https://")
            # A commit, not a branch: what is behind the address cannot change.
            assert re.search(r"/[0-9a-f]{40}/", file.path), file.path
            assert file.size or file.about
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        if entry.folder:
            assert "config.json" in {file.name for file in entry.files}


def test_catalogue_finds_by_name_file_and_folder() -> None:
    assert catalog.find("stories110M") is catalog.find("stories110M.bin")
    assert catalog.find("smollm2-135m") is catalog.find("SmolLM2-135M")
    tokenizer = catalog.find("tokenizer.bin")
    assert tokenizer is not None and tokenizer.name == "tokenizer"
    assert catalog.find("nonsense") is None


def test_sizes_of_models_are_those_of_their_shapes() -> None:
    from anepy import PRESETS, Model

    for name in ("stories260K", "stories15M"):
        entry, config = catalog.find(name), PRESETS[name]
        assert entry is not None
        tables = config.seq_len * config.head_width
        assert entry.files[0].size == 28 + 4 * (Model(config).n_parameters + tables)


def test_known_copies_have_the_pinned_hashes() -> None:
    for name in ("stories260K.bin", "tok512.bin", "tokenizer.bin"):
        path = needs.data(name)
        entry = catalog.find(name)
        assert entry is not None and entry.files[0].sha256 == download.file_sha256(path)
        assert entry.files[0].size == path.stat().st_size


# ------------------------------------------------------------------------------------- downloads


def test_fetch_brings_files_and_leaves_right_ones_alone(server: FileServer, folder: Path) -> None:
    server.answers["/a/b/m.bin"] = [Answer(MODEL)]
    server.answers["/a/b/t.bin"] = [Answer(TEXT)]
    what = item(source("m.bin", MODEL), source("t.bin", TEXT), folder="model")
    first = bring(what, folder)
    assert [(f.state, f.checked) for f in first] == [("downloaded", "pinned")] * 2
    assert names(folder / "model") == ["m.bin", "t.bin"]
    asked = len(server.requests)
    again = bring(what, folder)
    assert [f.state for f in again] == ["already there"] * 2 and len(server.requests) == asked


def test_fetch_replaces_another_file_only_if_told(server: FileServer, folder: Path) -> None:
    server.answers["/a/b/m.bin"] = [Answer(MODEL)]
    (folder / "m.bin").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="add --force to replace it"):
        bring(item(source("m.bin", MODEL)), folder)
    assert (folder / "m.bin").read_bytes() == b"mine" and server.requests == []
    bring(item(source("m.bin", MODEL)), folder, force=True)
    assert (folder / "m.bin").read_bytes() == MODEL


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Answer(MODEL[:-1]), "instead of 5,000"),
        (Answer(b"x" + MODEL[1:]), "SHA-256"),
        (Answer(b"", 404), "404"),
        (Answer(b"<html>", kind="text/html"), "web page"),
        (Answer(MODEL, cut=100), "the same command goes on"),
    ],
)
def test_fetch_puts_nothing_under_its_name_unless_right(
    server: FileServer, folder: Path, answer: Answer, words: str
) -> None:
    server.answers["/a/b/m.bin"] = [answer]
    with pytest.raises(DownloadError, match=words) as caught:
        bring(item(source("m.bin", MODEL)), folder)
    assert "\n" not in str(caught.value) and not (folder / "m.bin").exists()


def test_fetch_without_known_hash_records_the_first_and_checks_ever_after(
    server: FileServer, folder: Path
) -> None:
    server.answers["/a/b/t.txt"] = [Answer(TEXT)]
    what = item(source("t.txt", TEXT, size=None, sha256=None))
    (first,) = bring(what, folder)
    assert (first.checked, first.sha256) == ("first", sha256(TEXT))
    (there,) = bring(what, folder)
    assert (there.state, there.checked) == ("already there", "recorded")
    (folder / "t.txt").unlink()
    server.answers["/a/b/t.txt"] = [Answer(TEXT + b"and more")]
    with pytest.raises(ChecksumError, match=r"first fetched on 20\d\d.*remove its entry") as caught:
        bring(what, folder)
    assert "fetched.json" in str(caught.value) and names(folder) == []
    server.answers["/a/b/t.txt"] = [Answer(TEXT)]
    assert bring(what, folder)[0].checked == "recorded"


def test_damaged_record_is_named(server: FileServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "fetched.json").write_text('{"x": {"sha256": 1}}')
    with pytest.raises(ConfigError, match=r"fetched\.json.*damaged"):
        bring(item(source("t.txt", TEXT, sha256=None)), folder)


# -------------------------------------------------------------------------------------- archives


def archive(*members: tuple[str, bytes | str]) -> bytes:
    """Return a .tar.gz; a member whose content is a text is a link to that name."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            if isinstance(body, str):
                info.type, info.linkname = tarfile.SYMTYPE, body
                tar.addfile(info)
            else:
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return raw.getvalue()


def packed(body: bytes) -> catalog.Item:
    return item(
        source(
            "d.bin", b"", path="a/b/x.tar.gz", size=None, sha256=None, about=len(body),
            member="data00.bin", member_size=len(TEXT),
        )
    )  # fmt: skip


def test_archive_gives_its_one_member(server: FileServer, folder: Path) -> None:
    body = archive(("../../escape", b"no"), ("x/data00.bin", TEXT), ("x/data01.bin", MODEL))
    server.answers["/a/b/x.tar.gz"] = [Answer(body)]
    (first,) = bring(packed(body), folder)
    assert (folder / "d.bin").read_bytes() == TEXT and names(folder) == ["d.bin"]
    assert (first.size, first.sha256, first.checked) == (len(TEXT), sha256(body), "first")
    assert (
        not (folder.parent / "escape").exists() and not (folder.parent.parent / "escape").exists()
    )
    (again,) = bring(packed(body), folder)
    assert again.state == "already there"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("other.bin", TEXT)], "holds no file data00.bin"),
        ([("data00.bin", "/etc/passwd")], "holds no file data00.bin"),
        ([("data00.bin", TEXT[:-1])], r"8,499 bytes instead of 8,500"),
        ([("big", bytes(1 << 24)), ("data00.bin", TEXT)], "expands to too much"),
    ],
)
def test_archive_of_other_contents_is_refused(
    server: FileServer, folder: Path, members: list[tuple[str, bytes | str]], words: str
) -> None:
    body = archive(*members)
    server.answers["/a/b/x.tar.gz"] = [Answer(body)]
    with pytest.raises(DownloadError, match=words):
        bring(packed(body), folder)
    assert not (folder / "d.bin").exists()


def test_archive_that_is_damaged_is_named_and_removed(server: FileServer, folder: Path) -> None:
    whole = archive(("data00.bin", TEXT * 1))
    for body in (whole[: len(whole) // 2], gzip.compress(b"no tar" * 1000), b"no gzip" * 1000):
        server.answers["/a/b/x.tar.gz"] = [Answer(body)]
        with pytest.raises(DownloadError, match=r"damaged|holds no file"):
            bring(packed(body), folder)
        assert not (folder / "d.bin").exists()


# --------------------------------------------------------------------------- the Hugging Face Hub


def listing(*files: tuple[str, bytes, bool], **changes: object) -> Answer:
    siblings = [
        {"rfilename": name, "size": len(body)}
        | ({"lfs": {"sha256": sha256(body)}} if large else {})
        for name, body, large in files
    ]
    facts = {"sha": COMMIT, "siblings": siblings, "cardData": {"license": "mit"}} | changes
    return Answer(json.dumps(facts).encode(), kind="application/json")


def publish(server: FileServer, *files: tuple[str, bytes, bool]) -> None:
    server.answers["/api/models/o/n/revision/main?blobs=true"] = [listing(*files)]
    for name, body, _ in files:
        server.answers[f"/o/n/resolve/{COMMIT}/{name}"] = [Answer(body)]


def test_model_of_the_hub_brings_only_what_a_model_needs(
    server: FileServer, folder: Path, run: Run
) -> None:
    publish(
        server,
        ("config.json", b"{}", False),
        ("model.safetensors", MODEL, True),
        ("tokenizer.json", b"{}", False),
        ("pytorch_model.bin", b"pickle", True),
        ("../escape.json", b"{}", False),
        ("onnx/model.onnx", b"x", True),
        ("README.md", b"hello", False),
    )
    result = run("fetch", "hf:o/n")
    assert result.code == 0, result.err
    assert names(folder) == ["n"]
    assert names(folder / "n") == ["config.json", "model.safetensors", "tokenizer.json"]
    assert "licence mit" in result.out and "that the server told" in result.out
    assert "recorded" in result.out
    # The second time nothing is transferred but the listing.
    asked = len(server.requests)
    assert run("fetch", "hf:o/n").code == 0 and len(server.requests) == asked + 1


def test_model_of_the_hub_with_wrong_weights_is_refused(
    server: FileServer, folder: Path, run: Run
) -> None:
    publish(server, ("config.json", b"{}", False), ("model.safetensors", MODEL, True))
    wrong = Answer(b"x" + MODEL[1:])
    server.answers[f"/o/n/resolve/{COMMIT}/model.safetensors"] = [wrong]
    assert_one_line_error(run("fetch", "hf:o/n"), "SHA-256")
    assert names(folder / "n") == ["config.json"]


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("hf:o/n", listing(("README.md", b"x", False)), "holds no model folder"),
        ("hf:o/n", Answer(b"[1]"), "did not answer as the Hugging Face Hub"),
        ("hf:o/n", listing(("config.json", b"", False), sha="main"), "did not answer as"),
        ("hf:o/n", Answer(b"{}", 401), "permission"),
        ("hf:o/n", Answer(b"{}", 404), "404"),
        ("hf:o", None, "names no model"),
        ("hf:../n", None, "names no model"),
        ("hf:o/n@../x", None, "names no model"),
        ("hf:o/n/x", None, "names no model"),
        ("story", None, "choose one of stories260K"),
    ],
)
def test_what_is_no_model_of_the_hub_is_one_line(
    server: FileServer, folder: Path, run: Run, name: str, answer: Answer | None, words: str
) -> None:
    if answer is not None:
        server.answers["/api/models/o/n/revision/main?blobs=true"] = [answer]
    assert_one_line_error(run("fetch", name), words)
    assert names(folder) == []


# ------------------------------------------------------------------------------ what train names


def test_train_without_model_or_data_names_commands_that_exist(run: Run) -> None:
    result = run("train", "stories110M.bin")
    assert_one_line_error(
        result,
        "`anepy fetch stories110M tinystories-valid`",
        "`anepy prepare TinyStoriesV2-GPT4-valid.txt -o tinystories.bin --tokenizer tokenizer.bin`",
        "`anepy train stories110M.bin --data tinystories.bin`",
    )
    for command in re.findall("`anepy ([^`]+)`", result.err):
        words = command.split()
        assert run(words[0], "--help").code == 0
        assert all(catalog.find(name) for name in words[1:] if words[0] == "fetch")


def test_train_names_only_what_is_missing(run: Run, folder: Path) -> None:
    result = run("train", "stories15M.bin", "--data", "d.bin")
    assert_one_line_error(result, "`anepy fetch stories15M`, then `anepy train stories15M.bin --d")
    (folder / "stories260K.bin").write_bytes(b"")
    result = run("train", "stories260K.bin")
    assert_one_line_error(
        result, "`anepy fetch tinystories-valid tok512`", "--tokenizer tok512.bin"
    )
    (folder / "tok512.bin").write_bytes(b"")
    (folder / "TinyStoriesV2-GPT4-valid.txt").write_bytes(b"")
    assert "anepy fetch" not in run("train", "stories260K.bin").err
    assert_one_line_error(run("train", "SmolLM2-135M"), "`anepy fetch smollm2-135m`")
    assert_one_line_error(run("train", "own.bin"), "training needs tokens")
