"""`prepare`: from texts to token files, with every way they can be wrong."""

from __future__ import annotations

import gzip
import json
import os
import resource
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import needs
import numpy as np
import pytest
from cases import one_line

import anepy.text.data
import anepy.text.documents
from anepy.errors import DataError, TokenizerError
from anepy.text.data import TokenData
from anepy.text.prepare import prepare
from anepy.text.tokenizer import Tokenizer
from anepy.text.tokenizer_pieces import PieceTokenizer


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Return a function that makes writing beyond a size fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- prepare -------------------------------------------------------------------------------------


def encoded(*documents: str) -> list[int]:
    tokenizer = Tokenizer.bytes()
    return [token for document in documents for token in tokenizer.encode(document, eos=True)]


def test_prepare_writes_tokens_and_sidecar(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" one \n<|endoftext|>\n\n<|endoftext|>two, 世界<|endoftext|>")
    (tmp_path / "b.txt").write_text("three\r\nlines\n", newline="")
    out = tmp_path / "d.bin"
    result = prepare([tmp_path / "a.txt", str(tmp_path / "b.txt")], Tokenizer.bytes(), out)
    ids = encoded("one", "two, 世界", "three\r\nlines")
    assert out.read_bytes() == np.array(ids, "<u2").tobytes()
    assert json.loads((tmp_path / "d.bin.json").read_text()) == {
        "format": "anepy-tokens-1",
        "tokenizer": "bytes",
        "tokenizer_file": None,
        "vocab_size": 259,
        "dtype": "uint16",
        "tokens": len(ids),
        "files": ["a.txt", "b.txt"],
        "documents": 3,
        "document_starts": "d.docs.bin",
        "mask": None,
    }
    assert (result.path, result.sidecar) == (out, tmp_path / "d.bin.json")
    assert (result.tokens, result.documents, result.dtype) == (len(ids), 3, "uint16")
    data = TokenData(out)
    assert (data.tokens.tolist(), data.vocab_size) == (ids, 259)
    names = ["a.txt", "b.txt", "d.bin", "d.bin.json", "d.docs.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert data.starts is not None and data.mask is None
    assert [ids[at] for at in data.starts.tolist()] == [1, 1, 1]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
def test_prepare_block_size_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(anepy.text.documents, "_READ_BYTES", block)
    text = tmp_path / "a.txt"
    text.write_text("\ufeff 世界 one<|end<|endoftext|>  <|endoftext|><|endof\ntwo é <|endoftext|")
    prepare(text, Tokenizer.bytes(), tmp_path / "d.bin")
    expected = encoded("世界 one<|end", "<|endof\ntwo é <|endoftext|")
    assert TokenData(tmp_path / "d.bin").tokens.tolist() == expected


@pytest.mark.parametrize(
    ("separator", "documents"),
    [
        (None, ["a<|endoftext|>b\n\nc"]),
        ("", ["a<|endoftext|>b\n\nc"]),
        ("\n\n", ["a<|endoftext|>b", "c"]),
        ("b", ["a<|endoftext|>", "c"]),
    ],
)
def test_prepare_separator_divides_documents(
    tmp_path: Path, separator: str | None, documents: list[str]
) -> None:
    (tmp_path / "a.txt").write_text("a<|endoftext|>b\n\nc\n")
    prepare(tmp_path / "a.txt", Tokenizer.bytes(), tmp_path / "d.bin", separator=separator)
    assert TokenData(tmp_path / "d.bin").tokens.tolist() == encoded(*documents)


@pytest.mark.parametrize(("size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_prepare_vocabulary_size_decides_the_type(tmp_path: Path, size: int, dtype: str) -> None:
    entries = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256)), b" "]
    entries += [b"word%d" % i for i in range(size - len(entries) - 1)] + [b"z"]
    (tmp_path / "a.txt").write_text("z")
    tokenizer = PieceTokenizer(entries, np.zeros(size, np.float32))
    result = prepare(tmp_path / "a.txt", tokenizer, tmp_path / "d.bin")
    assert result.dtype == dtype
    data = TokenData(tmp_path / "d.bin")
    assert data.tokens.tolist() == [1, 259, size - 1, 2]
    assert data.tokens.dtype == dtype


def test_prepare_sample_stories_with_their_tokenizer(tmp_path: Path) -> None:
    text, tokenizer = needs.data("tinystories_sample.txt"), needs.data("tok512.bin")
    result = prepare(text, tokenizer, tmp_path / "d.bin")
    assert (result.tokens, result.documents) == (374 + 330 + 223 + 425 + 457 + 5, 5)
    data = TokenData(tmp_path / "d.bin")
    data.check(512)
    assert np.flatnonzero(data.tokens == 1).tolist() == [0, 375, 706, 930, 1356]
    assert json.loads(result.sidecar.read_text())["tokenizer"] == "tok512.bin"


def test_prepare_reports_progress_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anepy.text.documents, "_READ_BYTES", 4)
    (tmp_path / "a.txt").write_text("0123456789")
    (tmp_path / "b.txt").write_text("abc")
    seen: list[tuple[int, int]] = []
    prepare(
        [tmp_path / "a.txt", tmp_path / "b.txt"],
        Tokenizer.bytes(),
        tmp_path / "d.bin",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 13), (8, 13), (10, 13), (13, 13)]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("raw", "offset"),
    [(b"abc\xff", 3), ("é世界".encode() + b"\x80x", 8), (b"ab\xe4\xb8", 2), (b"ab\xe4\xb8cd", 2)],
)
def test_prepare_bad_utf8_names_file_and_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, raw: bytes, offset: int
) -> None:
    monkeypatch.setattr(anepy.text.documents, "_READ_BYTES", block)
    text = tmp_path / "a.txt"
    text.write_bytes(raw)
    with pytest.raises(DataError, match=rf"not UTF-8 text: bad byte at offset {offset};") as caught:
        prepare(text, Tokenizer.bytes(), tmp_path / "d.bin")
    assert str(text) in one_line(caught)
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("content", ["", " \n\t", "<|endoftext|>\n<|endoftext|>"])
def test_prepare_no_text_raises_and_keeps_the_old_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    (tmp_path / "d.bin").write_bytes(b"old!")
    with pytest.raises(DataError, match=r"no text to tokenize in .*a.txt") as caught:
        prepare(tmp_path / "a.txt", Tokenizer.bytes(), tmp_path / "d.bin")
    one_line(caught)
    assert (tmp_path / "d.bin").read_bytes() == b"old!"
    assert len(list(tmp_path.iterdir())) == 2


def test_prepare_missing_text_or_tokenizer_raises_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    out = tmp_path / "d.bin"
    with pytest.raises(DataError, match=r"cannot read text file .*none.txt: No such file"):
        prepare([tmp_path / "a.txt", tmp_path / "none.txt"], Tokenizer.bytes(), out)
    with pytest.raises(DataError, match="it is a folder"):
        prepare(tmp_path, Tokenizer.bytes(), out)
    with pytest.raises(DataError, match="no file given"):
        prepare([], Tokenizer.bytes(), out)
    with pytest.raises(TokenizerError, match=r"none.bin"):
        prepare(tmp_path / "a.txt", tmp_path / "none.bin", out)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_prepare_output_that_cannot_be_written_raises(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("text")
    (tmp_path / "folder").mkdir()
    for out in ("nowhere/d.bin", "a.txt/d.bin", "folder"):
        with pytest.raises(DataError, match="cannot write token file") as caught:
            prepare(text, Tokenizer.bytes(), tmp_path / out)
        assert out in one_line(caught)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.txt", "folder"]


def test_prepare_read_only_folder_raises(tmp_path: Path) -> None:
    needs.held_by_permissions()
    text = tmp_path / "a.txt"
    text.write_text("text")
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    with pytest.raises(DataError, match="Permission denied"):
        prepare(text, Tokenizer.bytes(), folder / "d.bin")


def test_prepare_disk_full_raises_and_keeps_the_old_files(
    tmp_path: Path, file_size_limit: Callable[[int], None]
) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "d.bin"
    text.write_text("first")
    prepare(text, Tokenizer.bytes(), out)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != text}
    text.write_text("long " * 50_000)
    file_size_limit(100_000)
    with pytest.raises(
        DataError, match=r"cannot write token file .*d.bin: File too large"
    ) as caught:
        prepare(text, Tokenizer.bytes(), out)
    one_line(caught)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p != text} == before


def test_prepare_interrupted_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "a.txt", Tokenizer.bytes(), tmp_path / "d.bin", progress=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("name", ["d.bin", "d.bin.json"])
def test_prepare_onto_one_of_its_texts_raises(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(DataError, match="would be overwritten"):
        prepare(tmp_path / name, Tokenizer.bytes(), tmp_path / "d.bin")
    assert (tmp_path / name).read_text() == "precious"


def test_prepare_through_a_link_replaces_its_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "d.bin").symlink_to(tmp_path / "real" / "d.bin")
    prepare(tmp_path / "a.txt", Tokenizer.bytes(), tmp_path / "d.bin")
    assert (tmp_path / "d.bin").is_symlink()
    assert len(TokenData(tmp_path / "d.bin")) == len(encoded("text"))


# --- prepare: pipes, packed texts, splits ---------------------------------------------------------


def test_prepare_reads_gzip_and_pipes(tmp_path: Path) -> None:
    text = "one day\n<|endoftext|>\nanother day\n<|endoftext|>\n" * 50
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    expected = encoded(*["one day", "another day"] * 50)
    for name in ("a.txt", "a.txt.gz", "pipe"):
        prepare(tmp_path / name, Tokenizer.bytes(), tmp_path / "d.bin")
        assert TokenData(tmp_path / "d.bin").tokens.tolist() == expected
    writer.join()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    with pytest.raises(DataError, match=r"cut\.gz is no whole gzip file") as caught:
        prepare(tmp_path / "cut.gz", Tokenizer.bytes(), tmp_path / "e.bin")
    one_line(caught)
    assert not (tmp_path / "e.bin").exists()


@pytest.mark.parametrize(("count", "held"), [(40, 4), (3, 1)])
def test_prepare_splits_by_documents(tmp_path: Path, count: int, held: int) -> None:
    stories = [f"story number {n}" for n in range(count)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(stories))
    done = prepare(tmp_path / "a.txt", Tokenizer.bytes(), tmp_path / "d.bin", split=0.1)
    assert (done.documents, done.validation_documents) == (count - held, held)
    found = []
    for path in (done.path, tmp_path / "d.val.bin"):
        data = TokenData(path)
        assert data.starts is not None
        for begin, end in zip(data.starts, [*data.starts[1:], len(data)], strict=True):
            found.append(Tokenizer.bytes().decode(data.tokens[begin:end].tolist()))
    assert sorted(found) == sorted(stories)


def test_prepare_splits_the_end_off_a_single_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 400)
    done = prepare(tmp_path / "a.txt", Tokenizer.bytes(), tmp_path / "d.bin", split=0.1)
    both = [*TokenData(done.path).tokens, *TokenData(tmp_path / "d.val.bin").tokens]
    assert both == encoded("word " * 399 + "word") and done.validation_tokens == 200


def test_prepare_long_document_has_the_ids_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anepy.text.documents, "_PART_CHARS", 3000)
    monkeypatch.setattr(anepy.text.documents, "_READ_BYTES", 7000)
    words = Tokenizer.load(needs.data("tok512.bin"))
    text = needs.data("tinyshakespeare.txt").read_text("utf-8")[:100_000]
    (tmp_path / "a.txt").write_text(text)
    done = prepare(tmp_path / "a.txt", words, tmp_path / "d.bin")
    assert done.documents == 1
    assert TokenData(done.path).tokens.tolist() == words.encode(text.strip(), eos=True)


def test_prepare_trains_a_tokenizer_and_keeps_it(tmp_path: Path) -> None:
    needs.module("tokenizers")
    (tmp_path / "a.txt").write_text(
        "the cat sat on the mat\n<|endoftext|>\nthe dog sat\n<|endoftext|>" * 60
    )
    done = prepare(tmp_path / "a.txt", 300, tmp_path / "d.bin")
    assert done.tokenizer_file == tmp_path / "d.tokenizer.json"
    words = Tokenizer.load(done.tokenizer_file)
    data = TokenData(done.path)
    assert data.tokenizer_file == done.tokenizer_file and data.vocab_size == words.vocab_size
    ids = words.encode("the cat sat on the mat", eos=True) + words.encode("the dog sat", eos=True)
    assert data.tokens.tolist() == ids * 60
    assert words.decode(ids) == "the cat sat on the matthe dog sat"
    with pytest.raises(TokenizerError, match="vocabulary of 100 tokens cannot hold all bytes"):
        prepare(tmp_path / "a.txt", 100, tmp_path / "d.bin")
