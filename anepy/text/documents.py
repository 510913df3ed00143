"""Documents in texts: files, pipes and standard input, packed or not, found block by block."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import DataError
from ..system.files import parsed
from .data import reason_of
from .tokenizer import Tokenizer

STDIN = "-"
_READ_BYTES = 1 << 20
# A longer document is cut where its ids allow it, so that memory stays small and cores busy.
_PART_CHARS = 1 << 17
_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Part:
    """A document or a part of one.

    Attributes:
        text: to be encoded; of an instruction the whole conversation is in `line`.
        begins, ends: whether the document begins, ends with it.
        line: what a line of JSON holds, if it is an instruction.
        where: file and line, for messages.
    """

    text: str
    begins: bool = True
    ends: bool = True
    line: dict[str, Any] | None = None
    where: str = ""


class Source:
    """One text, opened.

    Args:
        path: a file, a pipe, or `-` for standard input; `.gz` is unpacked.
        advance: called with the bytes read, as they are stored.

    Attributes:
        name: what messages call it.
        size: bytes as stored; 0 if nobody knows before the end.
        instructions: whether it holds lines of JSON with `messages` or `prompt`.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self.path = path
        self.name = "standard input" if str(path) == STDIN else str(path)
        self._advance = advance
        self.size = 0
        try:
            if str(path) == STDIN:
                self._stored: IO[bytes] = sys.stdin.buffer
            else:
                info = path.stat()
                if stat.S_ISDIR(info.st_mode):
                    raise DataError(f"cannot read text file {path}: it is a folder; give a file")
                self.size = info.st_size if stat.S_ISREG(info.st_mode) else 0
                self._stored = path.open("rb")
        except OSError as error:
            raise DataError(f"cannot read text file {path}: {reason_of(error)}") from error
        try:
            self._blocks = self._read()
            self._first = next(self._blocks, b"")
        except BaseException:
            self.close()
            raise
        self.shape = self._find_shape()

    @property
    def instructions(self) -> bool:
        """Whether answers and prompts are told apart in it."""
        return self.shape in ("messages", "prompt")

    def close(self) -> None:
        """Close the file; standard input stays open."""
        if self._stored is not sys.stdin.buffer:
            self._stored.close()

    def _read(self) -> Iterator[bytes]:
        """Yield the blocks of the text, unpacked."""
        stored, at = self._stored, 0
        try:
            raw: IO[bytes] = stored
            if self.path.suffix == ".gz":
                raw = gzip.GzipFile(fileobj=stored)  # type: ignore[assignment]
            while block := raw.read(_READ_BYTES):
                if self.path.suffix == ".gz" and self.size:
                    now = stored.tell()
                else:
                    now = at + len(block)
                self._advance(now - at)
                at = now
                yield block
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{self.name} is no whole gzip file: {error}; get it again") from None
        except OSError as error:
            raise DataError(f"cannot read text file {self.name}: {reason_of(error)}") from error

    def _find_shape(self) -> str | None:
        """Tell by the first line: `messages`, `prompt` or `text` of JSON, None for plain text."""
        named = any(suffix in _LINES for suffix in self.path.suffixes[-2:])
        first = self._first.removeprefix(codecs.BOM_UTF8).lstrip().split(b"\n", 1)[0]
        if not first.startswith(b"{") and not named:
            return None
        try:
            found = parsed(first)
        except ValueError:
            return "text" if named else None
        shape = shape_of(found)
        return shape or ("text" if named else None)

    def _text(self) -> Iterator[str]:
        """Yield the text in blocks, without its byte order mark; line ends stay as they are."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, at_start = 0, True
        blocks = self._all()
        try:
            while True:
                raw = next(blocks, b"")
                unfinished = len(decoder.getstate()[0])
                text = decoder.decode(raw, final=not raw)
                if text:
                    yield text.removeprefix("\ufeff") if at_start else text
                    at_start = False
                if not raw:
                    return
                offset += len(raw)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.name} is not UTF-8 text: bad byte at offset"
                f" {offset - unfinished + error.start}; convert the file to UTF-8"
            ) from error

    def _all(self) -> Iterator[bytes]:
        if self._first:
            yield self._first
            self._first = b""
            yield from self._blocks

    def parts(self, separator: str | None, tokenizer: Tokenizer | None) -> Iterator[Part]:
        """Yield the documents, stripped and not empty.

        Args:
            separator: text between documents; None or "" makes the whole text one. Lines of JSON
                are a document each.
            tokenizer: cuts long documents where their ids allow it; None: at any blank.
        """
        if self.shape is not None:
            yield from self._lines(self.shape, tokenizer)
            return
        waiting, begins, tried = "", True, 0
        for block in self._text():
            waiting += block
            if separator:
                *ended, waiting = waiting.split(separator)
                for end in ended:
                    yield from _parts(end, begins, tokenizer)
                    begins, tried = True, 0
            # A separator may straddle two blocks: what is cut off is far from the end.
            while len(waiting) > max(2 * tried, 4 * _PART_CHARS):
                waiting = waiting.lstrip() if begins else waiting
                cut = _cut(waiting, _PART_CHARS if not tried else len(waiting) // 2, tokenizer)
                if cut is None:
                    tried = len(waiting)
                    break
                yield Part(waiting[: cut[0]], begins, False)
                waiting, begins, tried = waiting[cut[1] :], False, 0
        yield from _parts(waiting, begins, tokenizer)

    def _lines(self, shape: str, tokenizer: Tokenizer | None) -> Iterator[Part]:
        """Yield the documents of lines of JSON."""
        waiting, number = "", 0

        def one(text: str) -> Iterator[Part]:
            if not text.strip():
                return
            where = f"{self.name}, line {number}"
            try:
                line = parsed(text)
            except ValueError as error:
                reason = getattr(error, "msg", str(error))
                raise DataError(f"{where}: it is no JSON ({reason}); repair or remove it") from None
            found = shape_of(line)
            if found is None:
                raise DataError(
                    f"{where}: it has none of messages, text, or prompt with completion; "
                    "repair or remove it"
                )
            if found == "text":
                if not isinstance(line["text"], str):
                    raise DataError(f"{where}: its text is no string; repair or remove it")
                yield from _parts(line["text"], True, tokenizer)
            elif shape == "text":
                raise DataError(
                    f"{where}: it has {found}, the first line has text; put lines that tell "
                    "prompts from answers into a file of their own"
                )
            else:
                yield Part("", line=line, where=where)

        for block in self._text():
            *ended, waiting = (waiting + block).split("\n")
            for end in ended:
                number += 1
                yield from one(end)
        number += 1
        yield from one(waiting)


def shape_of(line: Any) -> str | None:
    """Return which of the three shapes an object has: `messages`, `prompt` or `text`."""
    if not isinstance(line, dict):
        return None
    if "messages" in line:
        return "messages"
    if "prompt" in line and "completion" in line:
        return "prompt"
    return "text" if "text" in line else None


def _parts(text: str, begins: bool, tokenizer: Tokenizer | None) -> Iterator[Part]:
    """Yield what is left of a document."""
    text = text.strip() if begins else text.rstrip()
    if not text:
        return
    while len(text) > 2 * _PART_CHARS:
        cut = _cut(text, _PART_CHARS, tokenizer)
        if cut is None:
            break
        yield Part(text[: cut[0]], begins, False)
        text, begins = text[cut[1] :], False
    yield Part(text, begins)


def _cut(text: str, near: int, tokenizer: Tokenizer | None) -> tuple[int, int] | None:
    if tokenizer is not None:
        return tokenizer.divide(text, near)
    at = text.rfind(" ", 0, near)
    return (at, at) if at > 0 else None


@contextlib.contextmanager
def opened(path: Path, advance: Callable[[int], None]) -> Iterator[Source]:
    """Open a text and close it at the end; errors are those of `Source`."""
    source = Source(path, advance)
    try:
        yield source
    finally:
        source.close()


def stored_size(path: Path) -> int:
    """Return the bytes of a text as stored, 0 where nobody can know.

    Raises:
        DataError: there is no such file, or it is a folder.
    """
    if str(path) == STDIN:
        return 0
    try:
        info = os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read text file {path}: {reason_of(error)}") from error
    if stat.S_ISDIR(info.st_mode):
        raise DataError(f"cannot read text file {path}: it is a folder; give a file")
    return info.st_size if stat.S_ISREG(info.st_mode) else 0
