"""Byte-pair tokenizer over llama2.c's `tokenizer.bin`: the same ids as run.c, at any text length.

run.c rescans the whole sequence for every merge. Here the text is first cut wherever no vocabulary
entry could ever span the cut, and each piece is merged with a linked list and a heap ordered by
(score, position), which picks the same pairs in the same order (tests/text/test_tokenizer.py keeps
the rescanning form and compares).

Entries are compared as whole byte strings. Where a file repeats an entry the lowest id wins; run.c
leaves that case to its sort. Zero bytes in a text are encoded like any byte; a C string ends there.
"""

from __future__ import annotations

import heapq
import os
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import TokenizerError
from ..system.files import replacing, write_failure

# Inside the class the name `bytes` means its method.
Raw: TypeAlias = bytes
Text: TypeAlias = str | bytes

BOS_ID = 1
EOS_ID = 2
FIRST_BYTE_ID = 3
MIN_VOCAB = FIRST_BYTE_ID + 256

# run.c starts its search for the best pair at this score, so nothing below it is ever merged.
LOWEST_SCORE = -1e10
# run.c stops collecting a code point after this many bytes.
MAX_GROUP_BYTES = 4

_RAW_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{1,2})")
_BLOCK_BYTES = 1 << 20
# Words repeat, long pieces hardly do; both bounds keep the cache at a few megabytes.
_CACHED_PIECE_BYTES = 32
_CACHED_PIECES = 1 << 16


class Tokenizer:
    """Encode text to token ids and back, exactly as llama2.c does.

    Args:
        entries: the bytes of each token; 0, 1, 2 are unknown, begin and end of a sequence, and
            3..258 stand for the 256 byte values.
        scores: merge priority of each entry (float32); higher merges first.
        name: what messages and sidecar files call this tokenizer.
        max_token_length: longest entry in bytes as the file states it; computed if None.

    Raises:
        TokenizerError: the vocabulary cannot encode every text.

    Example:
        >>> Tokenizer.bytes().encode("Hi")
        [1, 35, 75, 108]
    """

    bos_id = BOS_ID
    eos_id = EOS_ID

    def __init__(
        self,
        entries: Sequence[bytes],
        scores: Sequence[float] | npt.NDArray[np.float32],
        name: str = "tokenizer",
        max_token_length: int | None = None,
    ) -> None:
        if len(entries) != len(scores):
            raise TokenizerError(f"{name}: {len(entries)} entries but {len(scores)} scores")
        if len(entries) < MIN_VOCAB:
            raise TokenizerError(
                f"{name}: {len(entries)} entries, but three special and 256 byte tokens are needed;"
                " use a llama2.c tokenizer.bin with byte fallback"
            )
        if not all(entries):
            raise TokenizerError(f"{name}: token {entries.index(b'')} is empty; give it some bytes")
        self.name = name
        self._entries = list(entries)
        self._scores = np.asarray(scores, dtype=np.float32)
        longest = max(map(len, self._entries))
        self._max_token_length = longest if max_token_length is None else max_token_length
        # Filled from the back, so that the lowest id of a repeated entry stays.
        self._ids = {entry: i for i, entry in reversed(list(enumerate(self._entries)))}
        # Negated so that the smallest heap item is the best merge.
        self._merges = {
            entry: (-float(self._scores[i]), i)
            for entry, i in self._ids.items()
            if self._scores[i] > LOWEST_SCORE
        }
        self._joinable: npt.NDArray[np.bool_] | None = None
        self._cache: dict[bytes, list[int]] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer:
        """Read a llama2.c `tokenizer.bin`.

        Args:
            path: int32 longest entry, then per entry float32 score, int32 length and that many
                bytes, little-endian, to the end of the file (the count is not stored).
            vocab_size: entries the model expects; any number if None.

        Returns:
            The tokenizer, named after the file.

        Raises:
            TokenizerError: the file is missing, malformed, or of another vocabulary size.
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
        if vocab_size is not None and len(entries) != vocab_size:
            raise TokenizerError(
                f"{path} has {len(entries)} tokens, but the model's vocabulary has {vocab_size};"
                " use the tokenizer the model was trained with"
            )
        return cls(entries, scores, name=path.name, max_token_length=longest)

    @classmethod
    def bytes(cls) -> Tokenizer:
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
        return cls(entries, np.zeros(len(entries), dtype=np.float32), name="bytes")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._entries)

    def pieces(self) -> tuple[list[Raw], list[float]]:
        """Return the bytes and the score of each token, by id."""
        return list(self._entries), self._scores.tolist()

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

    def encode(self, text: Text, bos: bool = True, eos: bool = False) -> list[int]:
        """Encode one text.

        Args:
            text: a string, or UTF-8 bytes; stray bytes become byte tokens. A text that is not
                empty gets llama2.c's leading space.
            bos: begin with the BOS token.
            eos: finish with the EOS token.

        Returns:
            Token ids in 0..vocab_size-1.

        Raises:
            TokenizerError: the string holds half of a surrogate pair, which has no UTF-8 form.
        """
        ids: list[int] = []
        for part in self.encode_parts(text, bos, eos):
            ids += part
        return ids

    def encode_parts(self, text: Text, bos: bool = True, eos: bool = False) -> Iterator[list[int]]:
        """Yield the ids of `encode` in consecutive parts, so that a long text needs no long list.

        Args and errors are those of `encode`.
        """
        head = [BOS_ID] if bos else []
        data = _utf8(text)
        if not data:
            yield [*head, EOS_ID] if eos else head
            return
        # A vocabulary without " " has no defined prefix in run.c; its byte token is meant.
        head.append(self._ids.get(b" ", FIRST_BYTE_ID + ord(" ")))
        for start, cuts in self._cuts(data):
            part: list[int] = []
            for cut in cuts:
                piece = data[start:cut]
                start = cut
                if head:
                    part += self._merge(head + self._symbols(piece))
                    head = []
                    continue
                known = self._cache.get(piece)
                if known is None:
                    known = self._merge(self._symbols(piece))
                    if len(piece) <= _CACHED_PIECE_BYTES:
                        if len(self._cache) >= _CACHED_PIECES:
                            self._cache.clear()
                        self._cache[piece] = known
                part += known
            yield part
        if eos:
            yield [EOS_ID]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; BOS and EOS give nothing, broken UTF-8 gives U+FFFD.

        The space that `encode` puts in front is removed after BOS, as in llama2.c.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        pieces = []
        previous = -1
        for token in ids:
            if token not in (BOS_ID, EOS_ID):
                pieces.append(self.piece(previous, token))
            previous = token
        return b"".join(pieces).decode("utf-8", "replace")

    def piece(self, prev: int, token: int) -> Raw:
        """Return the raw bytes of one token, for streaming.

        Args:
            prev: the token before it; after BOS one leading space is dropped.
            token: the token to spell; a `<0x..>` entry becomes its byte.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """
        if not 0 <= token < len(self._entries):
            raise TokenizerError(
                f"{self.name}: token {token} is outside its {len(self._entries)} tokens;"
                " use the tokenizer the model was trained with"
            )
        entry = self._entries[token]
        if prev == BOS_ID and entry.startswith(b" "):
            entry = entry[1:]
        raw = _RAW_BYTE.match(entry)
        return bytes([int(raw[1], 16)]) if raw else entry

    def _symbols(self, data: Raw) -> list[int]:
        """Return one id per code point of the vocabulary, else one per byte."""
        ids = self._ids
        symbols: list[int] = []
        start, size = 0, len(data)
        while start < size:
            end = start + 1
            # Whatever the first byte is, up to three continuation bytes join it, as in run.c.
            while end < size and data[end] & 0xC0 == 0x80 and end - start < MAX_GROUP_BYTES:
                end += 1
            token = ids.get(data[start:end])
            if token is not None:
                symbols.append(token)
            else:
                symbols += [byte + FIRST_BYTE_ID for byte in data[start:end]]
            start = end
        return symbols

    def _merge(self, symbols: list[int]) -> list[int]:
        """Merge the best-scored neighbours (leftmost of equals) until no pair is an entry."""
        if len(symbols) < 2:
            return symbols
        entries, merges = self._entries, self._merges
        size = len(symbols)
        after = list(range(1, size + 1))
        before = list(range(-1, size - 1))
        # Item: negated score, left position, left id, right position, right id, merged id.
        heap: list[tuple[float, int, int, int, int, int]] = []
        for i in range(size - 1):
            left, right = symbols[i], symbols[i + 1]
            found = merges.get(entries[left] + entries[right])
            if found:
                heap.append((found[0], i, left, i + 1, right, found[1]))
        heapq.heapify(heap)
        while heap:
            _, i, left, j, right, merged = heapq.heappop(heap)
            # Stale once either side was merged: a position's id never returns, as its text only
            # grows, and a swallowed position holds -1. Both unchanged are still neighbours.
            if symbols[i] != left or symbols[j] != right:
                continue
            symbols[i], symbols[j] = merged, -1
            k = after[i] = after[j]
            if k < size:
                before[k] = i
                right = symbols[k]
                found = merges.get(entries[merged] + entries[right])
                if found:
                    heapq.heappush(heap, (found[0], i, merged, k, right, found[1]))
            h = before[i]
            if h >= 0:
                left = symbols[h]
                found = merges.get(entries[left] + entries[merged])
                if found:
                    heapq.heappush(heap, (found[0], h, left, i, merged, found[1]))
        return [token for token in symbols if token >= 0]

    def _cuts(self, data: Raw) -> Iterator[tuple[int, list[int]]]:
        """Yield (start, ends) of consecutive pieces that can be merged independently.

        No entry holds the two bytes around a cut side by side, so no merge spans one; and merges
        on one side never change those on the other.
        """
        if self._joinable is None:
            self._joinable = _joinable_bytes(self._entries, self._ids)
        start, block, size = 0, _BLOCK_BYTES, len(data)
        while start < size:
            end = min(start + block, size)
            # One byte of look-ahead: a continuation byte may follow the last one of the block.
            seen = np.frombuffer(data, np.uint8, min(end + 1, size) - start, start)
            goes_on = (seen & 0xC0) == 0x80
            followed = np.append(goes_on[1:], False)
            # Text that is not UTF-8 can hide an ASCII byte at the head of a byte-fallback group.
            starts = ~goes_on & ~(followed & (seen < 0x80))
            cut = starts[1:] & ~self._joinable[seen[:-1], seen[1:]]
            ends: list[int] = (np.flatnonzero(cut[: end - start - 1]) + (start + 1)).tolist()
            if end == size:
                ends.append(size)
            if ends:
                yield start, ends
                start, block = ends[-1], _BLOCK_BYTES
            else:
                block *= 2


def _utf8(text: Text) -> bytes:
    """Return the UTF-8 bytes of a text; bytes smuggled through `str` come back as they were."""
    if isinstance(text, bytes):
        return text
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"cannot encode text: half a surrogate pair at character {error.start};"
            " remove it or give the text as UTF-8 bytes"
        ) from error


def _parse(raw: bytes, path: Path) -> tuple[list[bytes], list[float], int]:
    """Return entries, scores and longest length of a tokenizer file, all checked."""

    def broken(what: str) -> TokenizerError:
        return TokenizerError(f"{path} is not a llama2.c tokenizer: {what}; fetch the file again")

    if len(raw) < 4:
        raise broken(f"it has {len(raw)} bytes")
    (longest,) = struct.unpack_from("<i", raw)
    if longest < 1:
        raise broken(f"its longest token has {longest} bytes")
    entries: list[bytes] = []
    scores: list[float] = []
    offset = 4
    while offset < len(raw):
        where = f"token {len(entries)} at byte {offset}"
        if offset + 8 > len(raw):
            raise broken(f"{where} is cut off")
        score, length = struct.unpack_from("<fi", raw, offset)
        offset += 8
        if not np.isfinite(score):
            raise broken(f"{where} has score {score}")
        if not 1 <= length <= longest:
            raise broken(f"{where} has length {length}, allowed is 1 to {longest}")
        if offset + length > len(raw):
            raise broken(f"{where} is cut off")
        entries.append(raw[offset : offset + length])
        scores.append(score)
        offset += length
    if len(entries) < MIN_VOCAB:
        raise broken(f"it has {len(entries)} tokens, at least {MIN_VOCAB} are needed")
    return entries, scores, longest


def _joinable_bytes(entries: Sequence[bytes], ids: dict[bytes, int]) -> npt.NDArray[np.bool_]:
    """Return a (256, 256) table: whether a merge may span two neighbouring bytes of a text.

    A text byte stands in the merge as itself or, where its code point is not an entry, as the
    spelling of its byte token (`<0x..>`); both are considered.
    """
    inside = np.zeros((256, 256), dtype=np.bool_)
    for entry in entries:
        codes = np.frombuffer(entry, np.uint8)
        inside[codes[:-1], codes[1:]] = True
    # Row: text byte; column: byte it may end, or begin, with.
    lasts = np.zeros((256, 256), dtype=np.bool_)
    firsts = np.zeros((256, 256), dtype=np.bool_)
    for byte in range(256):
        spelled = entries[FIRST_BYTE_ID + byte]
        is_entry = bytes([byte]) in ids
        # Alone it is a code point only below 0x80; above, its code point may be an entry or not.
        if is_entry or byte >= 0x80:
            lasts[byte, byte] = firsts[byte, byte] = True
        if not is_entry or byte >= 0x80:
            lasts[byte, spelled[-1]] = firsts[byte, spelled[0]] = True
    # A boolean product is an or over ands.
    table: npt.NDArray[np.bool_] = lasts @ inside @ firsts.T
    return table
