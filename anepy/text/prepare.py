"""From text to token files: documents found block by block, tokenized, written with their facts."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..system.files import replacing, write_failure
from .data import DTYPES, SIDECAR_FORMAT, PathLike, file_size, reason_of, sidecar_path
from .tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"
_UINT16_IDS = 1 << 16
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote.

    Attributes:
        path: the token file.
        sidecar: the JSON file beside it.
        tokens: ids in the file.
        documents: documents, each begun by BOS.
        vocab_size: vocabulary of the tokenizer.
        dtype: "uint16" or "uint32".
    """

    path: Path
    sidecar: Path
    tokens: int
    documents: int
    vocab_size: int
    dtype: str


def prepare(
    texts: PathLike | Iterable[PathLike],
    tokenizer: Tokenizer | PathLike,
    out: PathLike,
    separator: str | None = SEPARATOR,
    progress: Callable[[int, int], None] | None = None,
) -> Prepared:
    """Tokenize UTF-8 text files into one token file and its JSON sidecar.

    Documents end at the separator and at the end of a file, lose surrounding white space, and
    begin with BOS; empty ones are left out. Only one document is held in memory at a time.

    Args:
        texts: one text file or several.
        tokenizer: a tokenizer, or a llama2.c `tokenizer.bin`.
        out: token file to write; replaced only when everything has worked.
        separator: text between documents; None or "" makes every file one document.
        progress: called now and then with text bytes read and their total.

    Returns:
        Where the tokens are and how many.

    Raises:
        TokenizerError: the tokenizer file is unusable.
        DataError: a text is missing, not UTF-8 or empty, or the output cannot be written; nothing
            is left behind then.

    Example:
        >>> prepare("stories.txt", "tok512.bin", "stories.bin").tokens  # doctest: +SKIP
        1809
    """
    paths = [Path(p) for p in ([texts] if isinstance(texts, (str, os.PathLike)) else texts)]
    out = Path(out)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.load(tokenizer)
    sidecar = sidecar_path(out)
    total = 0
    for path in paths:
        total += file_size(path, "text")
        for target in (out, sidecar):
            if target.exists() and os.path.samefile(path, target):
                raise DataError(f"{path} would be overwritten; write the tokens to another file")
    dtype = "uint16" if tokenizer.vocab_size <= _UINT16_IDS else "uint32"
    count = documents = read = 0

    def advance(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        if progress:
            progress(read, total)

    try:
        # Both files are complete on disk before either old one is replaced.
        with replacing(sidecar) as note, replacing(out) as file:
            for path in paths:
                for document in _documents(path, separator, advance):
                    documents += 1
                    ids = tokenizer.encode(document)
                    count += len(ids)
                    file.write(np.array(ids, dtype=DTYPES[dtype]).tobytes())
            if not documents:
                names = ", ".join(map(str, paths)) or "no file given"
                raise DataError(f"there is no text to tokenize in {names}; give files with text")
            facts = {
                "format": SIDECAR_FORMAT,
                "tokenizer": tokenizer.name,
                "vocab_size": tokenizer.vocab_size,
                "dtype": dtype,
                "tokens": count,
                "files": [path.name for path in paths],
                "documents": documents,
            }
            note.write(json.dumps(facts, indent=2).encode() + b"\n")
            note.flush()
            os.fsync(note.fileno())
    except OSError as error:
        raise DataError(write_failure(out, "token file", error)) from error
    return Prepared(out, sidecar, count, documents, tokenizer.vocab_size, dtype)


def _documents(path: Path, separator: str | None, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield the stripped, non-empty documents of one file, reading it block by block."""
    # A separator may straddle two blocks: this many characters wait for the next one.
    overlap = len(separator) - 1 if separator else 0
    parts: list[str] = []
    waiting = ""
    for block in _text(path, advance):
        waiting += block
        if separator:
            *ended, waiting = waiting.split(separator)
            for end in ended:
                document = "".join([*parts, end]).strip()
                parts.clear()
                if document:
                    yield document
        if len(waiting) > overlap:
            at = len(waiting) - overlap
            parts.append(waiting[:at])
            waiting = waiting[at:]
    document = "".join([*parts, waiting]).strip()
    if document:
        yield document


def _text(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield a UTF-8 file in blocks, without its byte order mark; line ends stay as they are."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = unfinished = 0
    at_start = True
    try:
        with path.open("rb") as file:
            while True:
                raw = file.read(_READ_BYTES)
                unfinished = len(decoder.getstate()[0])
                text = decoder.decode(raw, final=not raw)
                if text:
                    yield text.removeprefix("\ufeff") if at_start else text
                    at_start = False
                if not raw:
                    return
                offset += len(raw)
                advance(len(raw))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: bad byte at offset {offset - unfinished + error.start};"
            " convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read text file {path}: {reason_of(error)}") from error
