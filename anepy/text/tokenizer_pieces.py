"""Byte-pair tokenizer over pieces with scores: llama2.c's `tokenizer.bin`, and "llama" in GGUF.

A text begins with a blank of its own, is cut into characters, and the best-scored neighbours are
joined until no pair is a piece; what is no piece then becomes byte tokens. So does SentencePiece
(https://arxiv.org/abs/1808.06226, BPE with byte fallback and no normalization), which all of these
were made with. Byte and special tokens are found by their names, wherever they stand.

For every join the whole sequence could be looked through. Here the text is first cut wherever no
piece could ever span the cut, and each part is joined with a linked list and a heap ordered by
(score, position), which picks the same pairs in the same order (tests/text/test_tokenizer.py keeps
the rescanning form and compares).

Pieces are compared as whole byte strings. Where a file repeats one the lowest id wins; run.c leaves
that case to its sort. Zero bytes in a text are encoded like any byte; a C string ends there.
"""

from __future__ import annotations

import heapq
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import TokenizerError
from ..models.stored_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    StoredTokenizer,
)
from ..system.files import replacing, write_failure
from .tokenizer import PathLike, Raw, Text, Tokenizer, outside, utf8

# The layout of the byte-level tokenizer, and of llama2.c's own files.
BOS_ID = 1
FIRST_BYTE_ID = 3
MIN_VOCAB = FIRST_BYTE_ID + 256

# run.c starts its search for the best pair at this score, so nothing below it is ever joined.
LOWEST_SCORE = -1e10
# run.c stops collecting a code point after this many bytes.
MAX_GROUP_BYTES = 4
# What SentencePiece writes for a blank.
MARK = "\u2581".encode()

_RAW_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{1,2})")
_BYTE_NAME = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
_NAMES = {
    b"<unk>": UNKNOWN,
    b"<s>": CONTROL,
    b"</s>": CONTROL,
    b"<pad>": CONTROL,
}
_BLOCK_BYTES = 1 << 20
# Words repeat, long parts hardly do; both bounds keep the cache at a few megabytes.
_CACHED_PART_BYTES = 32
_CACHED_PARTS = 1 << 16


class PieceTokenizer(Tokenizer):
    """Encode text to token ids and back, as SentencePiece and llama2.c do.

    Args:
        entries: the bytes of each token, a blank for SentencePiece's mark; special ones under their
            names, with or without the line ends that llama2.c puts around them.
        scores: priority of each piece (float32); higher ones are joined first.
        name: what messages and sidecar files call this tokenizer.
        max_token_length: longest entry in bytes as a file states it; computed if None.
        kinds: SentencePiece's kind of each token; None: by the names.
        bos_id: begins a text; None: the token `<s>`, if there is one.
        eos_id: ends a text; None: the token `</s>`, if there is one.
        stop_ids: after which a model has nothing more to say; None: these two.
        blank_first: whether a text gets a blank of its own in front.
        marks: whether a mark in a text means a blank, as for SentencePiece.

    Raises:
        TokenizerError: the vocabulary cannot encode every text, or does not say of a token whether
            it may stand in a text.
    """

    def __init__(
        self,
        entries: Sequence[bytes],
        scores: Sequence[float] | npt.NDArray[np.float32],
        name: str = "tokenizer",
        max_token_length: int | None = None,
        *,
        kinds: Sequence[int] | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        stop_ids: frozenset[int] | None = None,
        blank_first: bool = True,
        marks: bool = False,
        chat_template: str | None = None,
        stored: StoredTokenizer | None = None,
    ) -> None:
        if len(entries) != len(scores):
            raise TokenizerError(f"{name}: {len(entries)} entries but {len(scores)} scores")
        self.name, self.vocab_size = name, len(entries)
        self.chat_template, self.stored = chat_template, stored
        self._entries = list(entries)
        self._scores = np.asarray(scores, dtype=np.float32)
        longest = max(map(len, self._entries), default=0)
        self._max_token_length = longest if max_token_length is None else max_token_length
        self._named = kinds is None
        self._kinds = _kinds(self._entries, name) if kinds is None else list(kinds)
        by_kind: dict[int, dict[bytes, int]] = {kind: {} for kind in range(7)}
        # Filled from the back, so that the lowest id of a repeated entry stays.
        for i, (entry, kind) in reversed(
            list(enumerate(zip(self._entries, self._kinds, strict=True)))
        ):
            by_kind[kind if kind in by_kind else NORMAL][entry] = i
        self._user = by_kind[USER_DEFINED]
        # Like llama.cpp, which joins pieces that are marked as unused, too.
        self._ids = by_kind[UNUSED] | by_kind[NORMAL]
        self.specials = {
            e.decode("utf-8", "replace").strip("\n"): i for e, i in by_kind[CONTROL].items()
        }
        self._bytes = _byte_ids(by_kind[BYTE], self._ids, name)
        # Negated so that the smallest heap item is the best pair.
        self._joins = {
            entry: -float(self._scores[i])
            for entry, i in self._ids.items()
            if self._scores[i] > LOWEST_SCORE
        }
        known = self.specials.get
        self.bos_id = known("<s>") if bos_id is None and self._named else bos_id
        self.eos_id = known("</s>") if eos_id is None and self._named else eos_id
        ends = {self.bos_id, self.eos_id} - {None} if stop_ids is None else stop_ids
        self.stop_ids = frozenset(i for i in ends if i is not None)
        self.blank_first = blank_first
        self._blank = b" " if blank_first else b""
        self._marks = marks
        self._joinable = _joinable_bytes(self._joins)
        self._splits = _either(self._user)
        self._special_splits = _either(
            {text.encode(): i for text, i in self.specials.items()} | self._user
        )
        self._cache: dict[bytes, list[int]] = {}

    @classmethod
    def read(cls, path: PathLike) -> PieceTokenizer:
        """Read a llama2.c `tokenizer.bin`.

        Args:
            path: int32 longest entry, then per entry float32 score, int32 length and that many
                bytes, little-endian, to the end of the file (the count is not stored). Files of
                llama2.c's first days lack the longest entry.

        Returns:
            The tokenizer, named after the file.

        Raises:
            TokenizerError: the file is missing or malformed.
        """
        path = Path(path)
        try:
            raw = path.read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise TokenizerError(
                f"cannot read tokenizer {path}: {reason}; give a llama2.c tokenizer.bin"
            ) from error
        entries, scores, longest = _parse(raw, path)
        try:
            return cls(entries, scores, path.name, longest)
        except TokenizerError as error:
            where = str(error).removeprefix(f"{path.name}: ")
            raise TokenizerError(f"{path}: {where}") from None

    def pieces(self) -> tuple[list[Raw], list[float]]:
        """Return the bytes and the score of each token, by id."""
        return list(self._entries), self._scores.tolist()

    def kinds(self) -> list[int]:
        """Return SentencePiece's kind of each token, by id."""
        return list(self._kinds)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write llama2.c's `tokenizer.bin` format, through a temporary file.

        Raises:
            TokenizerError: the file cannot be written; nothing is left behind.
        """
        try:
            with replacing(path) as file:
                file.write(struct.pack("<i", self._max_token_length))
                for entry, score in zip(self._entries, self._scores.tolist(), strict=True):
                    file.write(struct.pack("<fi", score, len(entry)) + entry)
        except OSError as error:
            raise TokenizerError(write_failure(path, "tokenizer", error)) from error

    def encode(
        self, text: Text, bos: bool = True, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Encode one text; stray bytes become byte tokens.

        A text that is not empty gets the blank in front of it, and one after a special token too,
        as in llama.cpp.
        """
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        data = utf8(text)
        if self._marks:
            data = data.replace(MARK, b" ")
        if special and self._special_splits is not None:
            begin = 0
            for found in self._special_splits.finditer(data):
                ids += self._plain(data[begin : found.start()])
                name, begin = found[0], found.end()
                known = self.specials.get(name.decode("utf-8", "replace"))
                ids.append(self._user[name] if known is None else known)
            data = data[begin:]
        ids += self._plain(data)
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def _plain(self, data: Raw) -> list[int]:
        """Return the ids of a text without special tokens."""
        if not data:
            return []
        if data[0] & 0xC0 == 0x80 and self._blank:
            # No text: run.c keeps its blank and the stray bytes apart.
            return self._joined([self._blank, *_characters(data)])
        data = self._blank + data
        if self._splits is None:
            return self._part(data)
        ids: list[int] = []
        begin = 0
        for found in self._splits.finditer(data):
            ids += self._part(data[begin : found.start()])
            ids.append(self._user[found[0]])
            begin = found.end()
        return ids + self._part(data[begin:])

    def _part(self, data: Raw) -> list[int]:
        """Return the ids of a text that holds no piece of the user's."""
        ids: list[int] = []
        cache = self._cache
        for start, cuts in self._cuts(data):
            for cut in cuts:
                part = data[start:cut]
                start = cut
                known = cache.get(part)
                if known is None:
                    known = self._joined(_characters(part))
                    if len(part) <= _CACHED_PART_BYTES:
                        if len(cache) >= _CACHED_PARTS:
                            cache.clear()
                        cache[part] = known
                ids += known
        return ids

    def piece(self, prev: int, token: int) -> Raw:
        """Return the raw bytes of one token; `<0x..>` becomes its byte, as in run.c."""
        if not 0 <= token < len(self._entries):
            raise outside(self.name, token, len(self._entries))
        kind = self._kinds[token]
        if kind == CONTROL:
            return b""
        entry = self._entries[token]
        if self._blank and entry.startswith(b" "):
            begins = prev == self.bos_id if self.bos_id is not None else prev < 0
            entry = entry[1:] if begins else entry
        raw = _RAW_BYTE.match(entry) if self._named or kind == BYTE else None
        return bytes([int(raw[1], 16)]) if raw else entry

    def _joined(self, symbols: list[Raw]) -> list[int]:
        """Join the best-scored neighbours (leftmost of equals) until no pair is a piece."""
        if len(symbols) > 1:
            self._join(symbols)
        ids: list[int] = []
        for symbol in filter(None, symbols):
            token = self._ids.get(symbol)
            if token is not None:
                ids.append(token)
            else:
                ids += [self._bytes[byte] for byte in symbol]
        return ids

    def _join(self, symbols: list[Raw]) -> None:
        joins = self._joins
        size = len(symbols)
        after = list(range(1, size + 1))
        before = list(range(-1, size - 1))
        # Item: negated score, left position, its bytes, right position, its bytes.
        heap: list[tuple[float, int, bytes, int, bytes]] = []
        for i in range(size - 1):
            left, right = symbols[i], symbols[i + 1]
            score = joins.get(left + right)
            if score is not None:
                heap.append((score, i, left, i + 1, right))
        heapq.heapify(heap)
        while heap:
            _, i, left, j, right = heapq.heappop(heap)
            # Stale once either side was joined: a position's bytes only grow, and one that was
            # swallowed holds none. Both unchanged are still neighbours.
            if symbols[i] != left or symbols[j] != right:
                continue
            joined = symbols[i] = left + right
            symbols[j] = b""
            k = after[i] = after[j]
            if k < size:
                before[k] = i
                score = joins.get(joined + symbols[k])
                if score is not None:
                    heapq.heappush(heap, (score, i, joined, k, symbols[k]))
            h = before[i]
            if h >= 0:
                score = joins.get(symbols[h] + joined)
                if score is not None:
                    heapq.heappush(heap, (score, h, symbols[h], i, joined))

    def _cuts(self, data: Raw) -> Iterator[tuple[int, list[int]]]:
        """Yield (start, ends) of consecutive parts that can be joined independently.

        No piece holds the two bytes around a cut side by side, so none spans it; and joins on one
        side never change those on the other.
        """
        start, block, size = 0, _BLOCK_BYTES, len(data)
        while start < size:
            end = min(start + block, size)
            seen = np.frombuffer(data, np.uint8, end - start, start)
            cut = ((seen[1:] & 0xC0) != 0x80) & ~self._joinable[seen[:-1], seen[1:]]
            ends: list[int] = (np.flatnonzero(cut) + (start + 1)).tolist()
            if end == size:
                ends.append(size)
            if ends:
                yield start, ends
                start, block = ends[-1], _BLOCK_BYTES
            else:
                block *= 2


def byte_tokenizer() -> PieceTokenizer:
    """Return the byte-level tokenizer: three special tokens and the 256 byte values.

    The space is written as itself, not `<0x20>`: run.c looks its leading space up by that
    spelling and strips it again after BOS, so a saved file works there too.
    """
    entries = [
        b"<unk>",
        b"\n<s>\n",
        b"\n</s>\n",
        *(b"<0x%02X>" % value for value in range(256)),
    ]
    entries[FIRST_BYTE_ID + ord(" ")] = b" "
    return PieceTokenizer(entries, np.zeros(len(entries), dtype=np.float32), name="bytes")


def _characters(data: bytes) -> list[bytes]:
    """Return the code points of a text; stray continuation bytes join what is before."""
    if data.isascii():
        return [data[i : i + 1] for i in range(len(data))]
    symbols: list[bytes] = []
    start, size = 0, len(data)
    while start < size:
        end = start + 1
        while end < size and data[end] & 0xC0 == 0x80 and end - start < MAX_GROUP_BYTES:
            end += 1
        symbols.append(data[start:end])
        start = end
    return symbols


def _kinds(entries: Sequence[bytes], name: str) -> list[int]:
    """Return the kind of each token, told by its name."""
    kinds = []
    for entry in entries:
        bare = entry[1:-1] if len(entry) > 2 and entry[:1] == entry[-1:] == b"\n" else entry
        kinds.append(_NAMES.get(bare, BYTE if _BYTE_NAME.fullmatch(entry) else NORMAL))
    # SentencePiece places what is no piece of the training text before the bytes.
    first = kinds.index(BYTE) if BYTE in kinds else 0
    for i in range(first):
        if kinds[i] == NORMAL and len(entries[i]) > 1:
            text = entries[i].decode("utf-8", "backslashreplace")
            raise TokenizerError(
                f"{name}: token {i}, {text!r}, may be a special token or one of the user's, and a"
                " tokenizer.bin does not say which; use SentencePiece's .model that it was made of"
            )
    return kinds


def _byte_ids(named: Mapping[bytes, int], pieces: Mapping[bytes, int], name: str) -> list[int]:
    """Return the token of each byte value: by its name, or the character itself."""
    found = {int(entry[3:5], 16): i for entry, i in named.items() if _BYTE_NAME.fullmatch(entry)}
    for value in range(256):
        alone = pieces.get(bytes([value]))
        if value not in found and alone is not None and value < 0x80:
            found[value] = alone
    missing = [value for value in range(256) if value not in found]
    if missing:
        raise TokenizerError(
            f"{name}: there is no token for {len(missing)} of the 256 bytes, the first of them"
            f" <0x{missing[0]:02X}>, so it cannot encode every text; use a tokenizer with byte"
            " fallback, or SentencePiece's .model"
        )
    return [found[value] for value in range(256)]


def _joinable_bytes(pieces: Mapping[bytes, float]) -> npt.NDArray[np.bool_]:
    """Return a (256, 256) table: whether some piece holds these two bytes side by side."""
    inside = np.zeros((256, 256), dtype=np.bool_)
    found = [piece for piece in pieces if piece]
    codes = np.frombuffer(b"".join(found), np.uint8)
    within = np.ones(len(codes), np.bool_)
    within[np.cumsum([len(piece) for piece in found], dtype=np.int64) - 1] = False
    first = np.flatnonzero(within)
    inside[codes[first], codes[first + 1]] = True
    return inside


def _either(names: Mapping[bytes, int]) -> re.Pattern[bytes] | None:
    """Return what finds the longest of these names at its first place, None if there are none."""
    found = sorted(filter(None, names), key=len, reverse=True)
    return re.compile(b"|".join(map(re.escape, found))) if found else None


def _parse(raw: bytes, path: Path) -> tuple[list[bytes], list[float], int]:
    """Return entries, scores and longest length of a tokenizer file, all checked."""

    def broken(what: str) -> TokenizerError:
        return TokenizerError(f"{path} is not a llama2.c tokenizer: {what}; fetch the file again")

    if len(raw) < 4:
        raise broken(f"it has {len(raw)} bytes")
    (longest,) = struct.unpack_from("<i", raw)
    if raw[:4] == bytes(4):
        # Files of the first days begin with the score of the first token, 0, or have no scores.
        try:
            entries, scores = _entries(raw, 0, None, broken)
        except TokenizerError:
            raise broken(f"its longest token has {longest} bytes") from None
        return entries, scores, max(map(len, entries))
    if longest < 1:
        raise broken(f"its longest token has {longest} bytes")
    try:
        entries, scores = _entries(raw, 4, longest, broken)
    except TokenizerError:
        if _has_no_scores(raw):
            raise TokenizerError(
                f"{path} is a tokenizer of llama2.c's first days, which has no scores and cannot "
                "encode; get a newer tokenizer.bin"
            ) from None
        raise
    return entries, scores, longest


def _entries(
    raw: bytes, offset: int, longest: int | None, broken: Callable[[str], TokenizerError]
) -> tuple[list[bytes], list[float]]:
    entries: list[bytes] = []
    scores: list[float] = []
    allowed = len(raw) if longest is None else longest

    def wrong(what: str) -> TokenizerError:
        return broken(f"token {len(entries)} at byte {offset} {what}")

    while offset < len(raw):
        if offset + 8 > len(raw):
            raise wrong("is cut off")
        score, length = struct.unpack_from("<fi", raw, offset)
        if not math.isfinite(score):
            raise wrong(f"has score {score}")
        if not 0 <= length <= allowed:
            raise wrong(f"has length {length}, allowed is 0 to {allowed}")
        if offset + 8 + length > len(raw):
            raise wrong("is cut off")
        offset += 8
        entries.append(raw[offset : offset + length])
        scores.append(score)
        offset += length
    if len(entries) < 256:
        raise broken(f"it has {len(entries)} tokens, at least 256 are needed")
    return entries, scores


def _has_no_scores(raw: bytes) -> bool:
    """Say whether a file is nothing but lengths and as many bytes."""
    offset = count = 0
    while offset + 4 <= len(raw):
        (length,) = struct.unpack_from("<i", raw, offset)
        if not 0 <= length <= 1 << 16:
            return False
        offset += 4 + length
        count += 1
    return offset == len(raw) and count >= 256
