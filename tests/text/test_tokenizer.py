"""Tokenizer: run.c's ids, its file format, and errors that name the file."""

from __future__ import annotations

import doctest
import random
import struct
from pathlib import Path

import needs
import pytest

import anepy.text.tokenizer
import anepy.text.tokenizer_pieces
from anepy.errors import TokenizerError
from anepy.text.tokenizer import Tokenizer
from anepy.text.tokenizer_pieces import PieceTokenizer

REAL = ["tok512.bin", "tokenizer.bin"]
SPECIALS = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256))]


def rescan(entries: list[bytes], scores: list[float], text: bytes, bos: bool) -> list[int]:
    """Encode as SentencePiece describes it: for every merge, look at every pair again."""

    def find(piece: bytes) -> int:
        return entries.index(piece)

    known, letters = set(entries[259:]), [b" "] if text else []
    group = b""
    for at, byte in enumerate(text):
        if byte & 0xC0 != 0x80:
            group = b""
        group += bytes([byte])
        if text[at + 1 : at + 2] and text[at + 1] & 0xC0 == 0x80 and len(group) < 4:
            continue
        letters.append(group)
        group = b""
    while True:
        best, best_at = -1e10, -1
        for at in range(len(letters) - 1):
            merged = letters[at] + letters[at + 1]
            if merged in known and scores[find(merged)] > best:
                best, best_at = scores[find(merged)], at
        if best_at < 0:
            break
        letters[best_at : best_at + 2] = [letters[best_at] + letters[best_at + 1]]
    ids = [1] if bos else []
    for letter in letters:
        ids += [find(letter)] if letter in known else [3 + value for value in letter]
    return ids


def write(path: Path, entries: list[bytes], scores: list[float], longest: int = 0) -> Path:
    """Write a tokenizer.bin, without the code under test."""
    raw = struct.pack("<i", longest or max(map(len, entries)))
    for entry, score in zip(entries, scores, strict=True):
        raw += struct.pack("<fi", score, len(entry)) + entry
    path.write_bytes(raw)
    return path


def read(path: Path) -> tuple[list[bytes], list[float]]:
    """Read a tokenizer.bin, without the code under test."""
    raw, offset = path.read_bytes(), 4
    entries, scores = [], []
    while offset < len(raw):
        score, length = struct.unpack_from("<fi", raw, offset)
        entries.append(raw[offset + 8 : offset + 8 + length])
        scores.append(score)
        offset += 8 + length
    return entries, scores


def random_text(rng: random.Random, entries: list[bytes]) -> bytes:
    """Return a short text of one of several kinds: words, symbols, scripts, stray bytes."""
    size = rng.randrange(60)
    kind = rng.randrange(6)
    if kind == 0:
        return rng.randbytes(size)
    if kind == 1:
        return bytes(rng.choice(b"A \x80\xbf\xc3\xa9\xe2\xf0<>0x\n") for _ in range(size))
    if kind == 2:
        words = [
            "the",
            " ",
            "  ",
            "\n",
            "\t",
            "é",
            "世界",
            "🙂",
            "Привет",
            "</",
            ">",
            "0x41",
            "it's",
        ]
        return "".join(rng.choice(words) for _ in range(size // 2)).encode()
    if kind == 3:
        ranges = [(1, 0x80), (0x80, 0x800), (0x800, 0xD800), (0x10000, 0x110000)]
        return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(size)).encode()
    if kind == 4:
        return rng.choice([b"a", b"e ", b"=", b" ", b"the ", b"<0x41>"]) * size
    return b"".join(rng.choice(entries) for _ in range(size // 4))


@pytest.mark.parametrize("name", REAL)
def test_encode_random_texts_equals_rescanning(name: str) -> None:
    path = needs.data(name)
    entries, scores = read(path)
    tokenizer = PieceTokenizer.read(path)
    # `list.index` over 32000 entries is slow: give the rescanning form a short vocabulary lookup.
    rng = random.Random(7)
    lookup = _Indexed(entries)
    for _ in range(400):
        text, bos = random_text(rng, entries), rng.random() < 0.5
        assert tokenizer.encode(text, bos=bos) == rescan(lookup, scores, text, bos), text


class _Indexed(list[bytes]):
    """A list whose `index` is a dictionary lookup, lowest index first."""

    def __init__(self, items: list[bytes]) -> None:
        super().__init__(items)
        self._at = {item: i for i, item in reversed(list(enumerate(items)))}

    def index(self, item: bytes, *_: object) -> int:  # type: ignore[override]
        return self._at[item]


def made_up(rng: random.Random) -> tuple[list[bytes], list[float]]:
    """Return a vocabulary with ties, repeats and entries across spaces and byte spellings."""
    alphabet = [b"a", b"b", b" ", b">", b"<", "é".encode(), b"\xc3", b"\xa9"]
    entries = list(SPECIALS)
    entries += [letter for letter in alphabet if rng.random() < 0.7]
    for _ in range(rng.choice([0, 2, 10, 60])):
        entries.append(b"".join(rng.choice(alphabet) for _ in range(rng.randrange(2, 5))))
    # Names of bytes and of BOS are no text: pieces that begin or end like them are never made so.
    spelled = [b"<0xC3><0xA9>", b"\n<s>\n ", b"a<0x0A>", b"b<0x61>", b"a<0xC3>", b"<0xA9>b"]
    entries += rng.sample(spelled, 4)
    scores = [float(rng.randrange(-4, 4)) for _ in entries]
    scores[-5] = -2e10
    return entries, scores


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_encode_made_up_vocabularies_equals_rescanning(
    monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(anepy.text.tokenizer_pieces, "_BLOCK_BYTES", block)
    rng = random.Random(block)
    for _ in range(60):
        entries, scores = made_up(rng)
        tokenizer = PieceTokenizer(entries, scores)
        for _ in range(8):
            text = b"".join(
                rng.choice([b"a", b"b", b" ", b"\n", b"<", b">", "é".encode(), b"\xa9", b"\xc3"])
                for _ in range(rng.randrange(30))
            )
            bos = rng.random() < 0.5
            assert tokenizer.encode(text, bos) == rescan(entries, scores, text, bos), text


def test_encode_stray_continuation_bytes_group_by_four_as_run_c() -> None:
    tokenizer = PieceTokenizer([*SPECIALS, b"\xa9", b"a\xa9\xa9\xa9", b" "], [0.0] * 262)
    assert tokenizer.encode(b"\xa9" * 5, bos=False) == [261, *[172] * 4, 259]
    assert tokenizer.encode(b"a" + b"\xa9" * 4, bos=False) == [261, 260, 259]


@pytest.mark.parametrize("name", REAL)
def test_encode_long_text_equals_merging_it_in_one_piece(name: str) -> None:
    tokenizer = PieceTokenizer.read(needs.data(name))
    text = needs.data("tinyshakespeare.txt").read_bytes()[:200_000]
    whole = tokenizer._joined(anepy.text.tokenizer_pieces._characters(b" " + text))
    assert tokenizer.encode(text, bos=False) == whole


@pytest.mark.parametrize(("name", "count"), [("tok512.bin", 693364), ("tokenizer.bin", 368634)])
def test_encode_whole_shakespeare_decodes_to_itself(name: str, count: int) -> None:
    tokenizer = PieceTokenizer.read(needs.data(name))
    text = needs.data("tinyshakespeare.txt").read_bytes().decode()
    ids = tokenizer.encode(text)
    assert len(ids) == count
    assert tokenizer.decode(ids) == text


def test_encode_text_without_any_cut_finishes() -> None:
    tokenizer = PieceTokenizer([*SPECIALS, b"a", b" ", b"aa", b"aaaa"], [0.0] * 259 + [0, 0, 1, 2])
    # Rescanning needs 10**10 steps for this.
    assert tokenizer.encode("a" * 100_000) == [1, 260] + [262] * 25_000


def test_encode_sample_stories_gives_the_published_counts() -> None:
    tokenizer = Tokenizer.load(needs.data("tok512.bin"), vocab_size=512)
    stories = needs.data("tinystories_sample.txt").read_text("utf-8").split("<|endoftext|>")
    counts = [len(tokenizer.encode(story.strip())) for story in stories if story.strip()]
    assert counts == [374, 330, 223, 425, 457]


def test_encode_known_sentence_gives_run_c_ids() -> None:
    """Ids as printed by llama2.c's own test program for this sentence."""
    tokenizer = PieceTokenizer.read(needs.data("tokenizer.bin"))
    ids = [1, 306, 4658, 278, 6593, 310, 2834, 338]
    assert tokenizer.encode("I believe the meaning of life is") == ids
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", bos=False, eos=True) == [2]
    assert tokenizer.encode("Hi", eos=True)[-1] == 2


def test_encode_twice_gives_the_same_ids_and_fresh_lists() -> None:
    tokenizer = Tokenizer.bytes()
    first = tokenizer.encode("to be or not to be")
    expected = list(first)
    first.clear()
    assert tokenizer.encode("to be or not to be") == expected


def test_encode_beyond_the_cache_bound_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anepy.text.tokenizer_pieces, "_CACHED_PARTS", 3)
    tokenizer = Tokenizer.bytes()
    text = "the quick brown fox jumps over the lazy dog"
    assert tokenizer.encode(text) == [1, 35, *(byte + 3 for byte in text.encode())]
    assert len(tokenizer._cache) <= 3


def test_encode_repeated_entry_takes_the_lowest_id() -> None:
    tokenizer = PieceTokenizer([*SPECIALS, b" ", b"a", b"a"], [0.0] * 262)
    assert tokenizer.encode("a") == [1, 259, 260]


def test_encode_argument_bytes_come_back_and_half_surrogate_is_refused() -> None:
    tokenizer = Tokenizer.bytes()
    argument = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert tokenizer.encode(argument) == tokenizer.encode(b"caf\xe9") == [1, 35, 102, 100, 105, 236]
    with pytest.raises(TokenizerError, match="surrogate pair at character 1"):
        tokenizer.encode("a\ud800")


def test_bytes_has_259_entries_and_encodes_by_fallback_alone() -> None:
    tokenizer = Tokenizer.bytes()
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (259, 1, 2)
    text = "Näh, 世界 <0x41>\n"
    assert tokenizer.encode(text) == [1, 35, *(byte + 3 for byte in text.encode())]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    every = bytes(range(256))
    assert b"".join(tokenizer.piece(0, token) for token in range(3, 259)) == every


def test_decode_strips_one_space_after_bos_only() -> None:
    tokenizer = Tokenizer.bytes()
    assert tokenizer.decode(tokenizer.encode("  two")) == "  two"
    assert tokenizer.decode(tokenizer.encode("mid", bos=False)) == " mid"
    assert tokenizer.decode([*tokenizer.encode("one.", eos=True), *tokenizer.encode("two")]) == (
        "one.two"
    )
    assert tokenizer.decode([1, 3 + 0xC3]) == "\ufffd"


@pytest.mark.parametrize(
    ("prev", "entry", "piece"),
    [
        (1, b" a", b"a"),
        (5, b" a", b" a"),
        (1, b"  a", b" a"),
        (0, b"<0x41>", b"A"),
        (0, b"<0xff>", b"\xff"),
        (1, b" <0x41>", b"A"),
        (0, b"<0xZZ>", b"<0xZZ>"),
        (0, b"x<0x41>", b"x<0x41>"),
    ],
)
def test_piece_spells_tokens_as_run_c(prev: int, entry: bytes, piece: bytes) -> None:
    tokenizer = PieceTokenizer([*SPECIALS, entry], [0.0] * 260)
    assert tokenizer.piece(prev, 259) == piece


@pytest.mark.parametrize("token", [-1, 259])
def test_piece_id_outside_vocabulary_raises(token: int) -> None:
    with pytest.raises(TokenizerError, match=f"token {token} is outside its 259 tokens"):
        Tokenizer.bytes().piece(0, token)


@pytest.mark.parametrize("name", REAL)
def test_save_then_file_is_identical(tmp_path: Path, name: str) -> None:
    path = needs.data(name)
    PieceTokenizer.read(path).save(tmp_path / "copy.bin")
    assert (tmp_path / "copy.bin").read_bytes() == path.read_bytes()


def test_save_bytes_then_load_encodes_alike(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    tokenizer.save(tmp_path / "bytes.bin")
    again = Tokenizer.load(tmp_path / "bytes.bin", vocab_size=259)
    assert again.encode("Hello, world") == tokenizer.encode("Hello, world")
    assert again.name == "bytes.bin"
    # run.c looks " " up without checking that it is there.
    assert b" " in read(tmp_path / "bytes.bin")[0]


def test_save_where_it_cannot_write_raises_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"cannot write tokenizer .*nowhere"):
        Tokenizer.bytes().save(tmp_path / "nowhere" / "t.bin")
    with pytest.raises(TokenizerError, match="it is a folder"):
        Tokenizer.bytes().save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def good() -> bytes:
    """Return the bytes of a smallest valid file."""
    raw = struct.pack("<i", 6)
    for entry in SPECIALS:
        raw += struct.pack("<fi", 0.0, len(entry)) + entry
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it has 0 bytes"),
        (b"\1\0", "it has 2 bytes"),
        (struct.pack("<i", 0) + good()[4:-1], "longest token has 0 bytes"),
        (struct.pack("<i", -5) + good()[4:], "longest token has -5 bytes"),
        (good()[:-1], "token 258 at byte .* is cut off"),
        (good() + b"\0", "token 259 at byte .* is cut off"),
        (good() + struct.pack("<fi", 0.0, -1), "has length -1"),
        (good() + struct.pack("<fi", 0.0, 7) + b"1234567", "has length 7, allowed is 0 to 6"),
        (good() + struct.pack("<fi", 0.0, 6) + b"12345", "token 259 .* is cut off"),
        (good() + struct.pack("<fi", float("nan"), 1) + b"x", "has score nan"),
        (good() + struct.pack("<fi", float("-inf"), 1) + b"x", "has score -inf"),
        (good()[: -(8 + 6)], "no token for 1 of the 256 bytes, the first of them <0xFF>"),
    ],
)
def test_load_malformed_file_raises_one_line_with_its_name(
    tmp_path: Path, raw: bytes, message: str
) -> None:
    path = tmp_path / "bad.bin"
    path.write_bytes(raw)
    with pytest.raises(TokenizerError, match=message) as caught:
        PieceTokenizer.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_smallest_valid_file_works(tmp_path: Path) -> None:
    (tmp_path / "good.bin").write_bytes(good())
    assert Tokenizer.load(tmp_path / "good.bin").vocab_size == 259


def test_load_missing_file_or_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"cannot read tokenizer .*none.bin: No such file"):
        Tokenizer.load(tmp_path / "none.bin")
    with pytest.raises(TokenizerError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.load(tmp_path)


def test_load_other_vocabulary_size_raises(tmp_path: Path) -> None:
    path = write(tmp_path / "t.bin", [*SPECIALS, b"x"], [0.0] * 260)
    assert Tokenizer.load(path, vocab_size=260).vocab_size == 260
    assert Tokenizer.load(path, vocab_size=512).vocab_size == 260  # rows without a token
    with pytest.raises(TokenizerError, match="has 260 tokens, but the model's vocabulary has 259"):
        Tokenizer.load(path, vocab_size=259)


def test_constructor_bad_vocabulary_raises() -> None:
    with pytest.raises(TokenizerError, match="3 entries but 2 scores"):
        PieceTokenizer([b"a", b"b", b"c"], [0.0, 0.0])
    with pytest.raises(TokenizerError, match="no token for 1 of the 256 bytes"):
        PieceTokenizer(SPECIALS[:-1], [0.0] * 258)
    with pytest.raises(TokenizerError, match=r"token 3, '<sep>', may be a special token"):
        PieceTokenizer([*SPECIALS[:3], b"<sep>", *SPECIALS[3:]], [0.0] * 260)


def test_docstring_examples_run() -> None:
    assert doctest.testmod(anepy.text.tokenizer).attempted > 0
    assert doctest.testmod(anepy.text.tokenizer).failed == 0
