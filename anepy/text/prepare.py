"""From text to token files: documents found, encoded on all cores, written with their facts.

A few megabytes of text are in memory at a time, whatever the size of the text and of its documents.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from ..system.files import replacing, write_failure
from .data import DTYPES, SIDECAR_FORMAT, PathLike, beside, sidecar_path
from .documents import STDIN, Part, opened, stored_size
from .instructions import Mask, encode_line
from .tokenizer import Ids, Tokenizer, packed
from .tokenizer_training import train_tokenizer

SEPARATOR = "<|endoftext|>"
_UINT16_IDS = 1 << 16
# Two batches are on their way: one is encoded while the ids of the other are written.
_BATCH_CHARS = 1 << 21
_AHEAD = 2
_COPIED = 1 << 20

Progress = Callable[[int, int], None]
Encoded = list[tuple[Part, Ids, Mask | None]]


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote.

    Attributes:
        path: the token file.
        sidecar: the JSON file beside it.
        tokens: ids in the file.
        documents: documents in it.
        vocab_size: vocabulary of the tokenizer.
        dtype: "uint16" or "uint32".
        validation: the token file of the documents that were split off; None if none were.
        validation_tokens, validation_documents: of that file, 0 without.
        tokenizer_file: the tokenizer that was trained; None if one was given.
        masked: whether a mask beside the tokens tells which of them are to be learned.
    """

    path: Path
    sidecar: Path
    tokens: int
    documents: int
    vocab_size: int
    dtype: str
    validation: Path | None = None
    validation_tokens: int = 0
    validation_documents: int = 0
    tokenizer_file: Path | None = None
    masked: bool = False


def prepare(
    texts: PathLike | Iterable[PathLike],
    tokenizer: Tokenizer | PathLike | int,
    out: PathLike,
    separator: str | None = SEPARATOR,
    progress: Progress | None = None,
    split: float = 0.0,
    mask_prompt: bool = False,
    eos: bool = True,
) -> Prepared:
    """Tokenize UTF-8 texts into one token file, its JSON sidecar, and where its documents begin.

    Documents end at the separator and at the end of a text, lose surrounding white space, begin
    with the tokenizer's BOS and end with its EOS, if it has them; empty ones are left out. Lines of
    JSON (`.jsonl`, or text that begins so) are a document each: `{"text"}`, `{"messages"}` through
    the chat template, `{"prompt", "completion"}`.

    Args:
        texts: one text or several: files, pipes, `-` for standard input; `.gz` is unpacked.
        tokenizer: a tokenizer, the path of one, or a number: a byte-level BPE vocabulary of so many
            tokens is trained on the texts and kept beside the tokens (extra `hf`).
        out: token file to write; replaced only when everything has worked.
        separator: text between documents; None or "" makes every text one document.
        progress: called now and then with text bytes read and their total, 0 if unknown.
        split: part of the documents that goes to `NAME.val.bin`, at equal distances; of a single
            document its end.
        mask_prompt: of instructions only the answers count as targets.
        eos: end documents with the tokenizer's EOS.

    Returns:
        Where the tokens are and how many.

    Raises:
        TokenizerError: the tokenizer is unusable, or a package that it needs is missing.
        DataError: a text is missing, not UTF-8 or empty, a line is malformed, or the output cannot
            be written; nothing is left behind then.

    Example:
        >>> prepare("stories.txt", "tok512.bin", "stories.bin").tokens  # doctest: +SKIP
        1814
    """
    paths = [Path(p) for p in ([texts] if isinstance(texts, (str, os.PathLike)) else texts)]
    out = Path(out)
    if not 0 <= split < 1:
        raise DataError(f"the part split off is {split}; use at least 0, less than 1")
    total = sum(map(stored_size, paths)) * (2 if isinstance(tokenizer, int) else 1)
    targets = [out, sidecar_path(out), beside(out, "docs"), beside(out, "mask")]
    targets += [beside(out, "val"), beside(out, "tokenizer", ".json")]
    for path in paths:
        for target in targets:
            if str(path) != STDIN and target.exists() and os.path.samefile(path, target):
                raise DataError(f"{path} would be overwritten; write the tokens to another file")
    read = 0

    def advance(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress:
            progress(read, total)

    try:
        with ExitStack() as stack:
            trained: bytes | None = None
            if isinstance(tokenizer, int):
                tokenizer, trained = train_tokenizer(paths, tokenizer, separator, advance)
                name = beside(out, "tokenizer", ".json")
                stack.enter_context(replacing(name)).write(trained)
            elif not isinstance(tokenizer, Tokenizer):
                tokenizer = Tokenizer.load(tokenizer)
            train = _TokenFile(stack, out, tokenizer, eos)
            held = _TokenFile(stack, beside(out, "val"), tokenizer, eos) if split else None
            drawn = 0
            for path in paths:
                with opened(path, advance) as source:
                    if source.instructions:
                        train.begin_mask()
                        if held is not None:
                            held.begin_mask()
                    parts = source.parts(separator, tokenizer)
                    for part, ids, mask in _encoded(parts, tokenizer, mask_prompt):
                        drawn += part.begins
                        to_held = int(drawn * split) > int((drawn - 1) * split)
                        (held if held is not None and to_held else train).add(part, ids, mask)
            names = [source_name(path) for path in paths]
            if not train.starts and (held is None or not held.starts):
                told = ", ".join(map(str, paths)) or "no file given"
                raise DataError(f"there is no text to tokenize in {told}; give files with text")
            if held is not None and not held.starts:
                train.give_end(held, split)
            facts: dict[str, Any] = {
                "format": SIDECAR_FORMAT,
                "tokenizer": beside(out, "tokenizer", ".json").name if trained else tokenizer.name,
                "tokenizer_file": beside(out, "tokenizer", ".json").name if trained else None,
                "files": names,
            }
            for file in filter(None, (train, held)):
                file.finish(facts)
            return Prepared(
                path=out,
                sidecar=sidecar_path(out),
                tokens=train.tokens,
                documents=len(train.starts),
                vocab_size=tokenizer.vocab_size,
                dtype=train.dtype,
                validation=held.path if held is not None else None,
                validation_tokens=held.tokens if held is not None else 0,
                validation_documents=len(held.starts) if held is not None else 0,
                tokenizer_file=beside(out, "tokenizer", ".json") if trained else None,
                masked=train.masked,
            )
    except OSError as error:
        raise DataError(write_failure(out, "token file", error)) from error


class _TokenFile:
    """A token file that is being written, and what lies beside it.

    All of them appear when `stack` closes, the sidecar, which names the others, last.
    """

    def __init__(self, stack: ExitStack, path: Path, tokenizer: Tokenizer, eos: bool) -> None:
        self.path = path
        self.dtype = "uint16" if tokenizer.vocab_size <= _UINT16_IDS else "uint32"
        self.starts = array("q")
        self.tokens = 0
        self._vocab_size = tokenizer.vocab_size
        self._stack = stack
        self._sidecar = stack.enter_context(replacing(sidecar_path(path)))
        self._docs = stack.enter_context(replacing(beside(path, "docs")))
        self._file = stack.enter_context(replacing(path))
        self._mask: BinaryIO | None = None
        ends = (tokenizer.bos_id, tokenizer.eos_id if eos else None)
        self._before, self._after = (self._bytes([] if end is None else [end]) for end in ends)

    @property
    def masked(self) -> bool:
        """Whether a mask is written."""
        return self._mask is not None

    def begin_mask(self) -> None:
        """Write a mask from now on; what was written before counts but for the first tokens."""
        if self._mask is not None:
            return
        self._mask = self._stack.enter_context(replacing(beside(self.path, "mask")))
        ends = [*self.starts[1:], self.tokens] if self.starts else []
        for begin, end in zip(self.starts, ends, strict=True):
            self._mask.write(b"\0" + b"\1" * (end - begin - 1))

    def add(self, part: Part, ids: Ids, mask: Mask | None) -> None:
        """Write a part of a document."""
        before = len(self._before) if part.begins and mask is None else 0
        raw = self._bytes(ids)
        if mask is None:
            raw = (self._before if before else b"") + raw + (self._after if part.ends else b"")
        if part.begins:
            self.starts.append(self.tokens)
        count = len(raw) // DTYPES[self.dtype].itemsize
        self._file.write(raw)
        if self._mask is not None:
            if mask is None:
                mask = np.ones(count, np.uint8)
                mask[:1] = 0 if part.begins else 1
            self._mask.write(mask.tobytes())
        self.tokens += count

    def give_end(self, other: _TokenFile, share: float) -> None:
        """Move the last document to another file, or this share of the only one."""
        at = self.starts[-1] if len(self.starts) > 1 else self.tokens - int(self.tokens * share)
        if not 0 < at < self.tokens - 1:
            raise DataError(
                f"{self.path} has {self.tokens} tokens, too few to split any off; leave that out"
            )
        if len(self.starts) > 1:
            self.starts.pop()
        size = DTYPES[self.dtype].itemsize
        _move_end(self._file, other._file, at * size)
        if self._mask is not None and other._mask is not None:
            _move_end(self._mask, other._mask, at)
        other.starts.append(0)
        other.tokens, self.tokens = self.tokens - at, at

    def finish(self, facts: dict[str, Any]) -> None:
        """Write where documents begin, and the sidecar."""
        self._docs.write(np.array(self.starts, "<i8").tobytes())
        own = {
            "vocab_size": self._vocab_size,
            "dtype": self.dtype,
            "tokens": self.tokens,
            "documents": len(self.starts),
            "document_starts": beside(self.path, "docs").name,
            "mask": beside(self.path, "mask").name if self.masked else None,
        }
        self._sidecar.write(json.dumps(facts | own, indent=2).encode() + b"\n")

    def _bytes(self, ids: Ids | list[int]) -> bytes:
        return np.asarray(ids).astype(DTYPES[self.dtype]).tobytes()


def _move_end(source: BinaryIO, target: BinaryIO, at: int) -> None:
    """Move what a file holds from a byte on to the end of another one."""
    source.flush()
    with open(source.name, "rb") as again:
        again.seek(at)
        while block := again.read(_COPIED):
            target.write(block)
    source.seek(at)
    source.truncate()


def _encoded(
    parts: Iterator[Part], tokenizer: Tokenizer, mask_prompt: bool
) -> Iterator[tuple[Part, Ids, Mask | None]]:
    """Yield each part with its ids; a batch is encoded while another one is used."""
    waiting: deque[Future[Encoded]] = deque()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            for batch in _batches(parts):
                waiting.append(pool.submit(partial(_encode, batch, tokenizer, mask_prompt)))
                if len(waiting) >= _AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _encode(batch: list[Part], tokenizer: Tokenizer, mask_prompt: bool) -> Encoded:
    texts = iter(tokenizer.encode_all([(p.text, p.begins) for p in batch if p.line is None]))
    found: Encoded = []
    for part in batch:
        if part.line is None:
            found.append((part, next(texts), None))
        else:
            ids, mask = encode_line(tokenizer, part.line, part.where, mask_prompt)
            found.append((part, packed(ids), mask))
    return found


def _batches(parts: Iterator[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        # A line of JSON is worth a text of a few hundred characters.
        size += len(part.text) + 512
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def source_name(path: Path) -> str:
    """Return what a sidecar calls a text."""
    return "standard input" if str(path) == STDIN else path.name
