"""Training data: flat token files, random windows for training, fixed windows for evaluation.

A token file is nothing but uint16 or uint32 ids, little-endian, the documents one after another,
each begun by BOS. `prepare` writes one from text, with a small JSON file beside it that says how;
files of other programs (llama2.c, nanoGPT) work without that.
"""

from __future__ import annotations

import codecs
import json
import operator
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, ConfigError, DataError
from ..system.files import replacing, write_failure
from .tokenizer import Tokenizer

PathLike: TypeAlias = str | os.PathLike[str]
Tokens: TypeAlias = npt.NDArray[np.integer[Any]]
Window: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]

SEPARATOR = "<|endoftext|>"
SIDECAR_FORMAT = "anepy-tokens-1"

_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_UINT16_IDS = 1 << 16
# Large enough to be fast, small enough that checking many gigabytes stays cheap in memory.
_CHECK_TOKENS = 1 << 22
_READ_BYTES = 1 << 20


class TokenData:
    """Tokens of a file, memory-mapped and read-only, or of an array.

    Args:
        path: a flat file of token ids.
        dtype: "uint16", "uint32", or "auto": what `<path>.json` of `anepy prepare` says, else
            uint16.

    Attributes:
        tokens: (n,) ids, little-endian, read-only.
        path: the file, None for an array.
        name: what messages call this data.
        vocab_size: vocabulary the file was prepared for, None if unknown.

    Raises:
        ConfigError: `dtype` is none of these names.
        DataError: the file is missing, empty, of odd length, or contradicts its `.json`.

    Example:
        >>> data = TokenData.from_array(np.arange(100))
        >>> train, held_out = data.split(0.1)
        >>> len(train), len(held_out)
        (90, 10)
    """

    tokens: Tokens
    path: Path | None
    name: str
    vocab_size: int | None

    def __init__(self, path: PathLike, dtype: str = "auto") -> None:
        path = Path(path)
        if dtype != "auto" and dtype not in _DTYPES:
            raise ConfigError(f"unknown token type {dtype!r}; use auto, uint16 or uint32")
        nbytes = _size(path)
        vocab_size = None
        if dtype == "auto":
            sidecar = _read_sidecar(path)
            dtype = sidecar["dtype"] if sidecar else "uint16"
            if sidecar:
                vocab_size = sidecar["vocab_size"]
                expected = sidecar["tokens"] * _DTYPES[dtype].itemsize
                if nbytes != expected:
                    raise DataError(
                        f"{path} has {nbytes} bytes, but {_sidecar(path).name} says {expected};"
                        " run anepy prepare again"
                    )
        kind = _DTYPES[dtype]
        if nbytes == 0:
            raise DataError(f"{path} is empty; write token data with anepy prepare")
        if nbytes % kind.itemsize:
            raise DataError(
                f"{path} has {nbytes} bytes, not a multiple of the {kind.itemsize} of a {dtype}"
                " token; the file is cut off or not token data, write it with anepy prepare"
            )
        try:
            tokens = np.memmap(path, dtype=kind, mode="r")
        except OSError as error:
            raise DataError(f"cannot read token file {path}: {_reason(error)}") from error
        self._set(tokens, path, str(path), vocab_size)

    @classmethod
    def from_array(
        cls, array: npt.ArrayLike, name: str = "the token array", vocab_size: int | None = None
    ) -> TokenData:
        """Wrap a one-dimensional integer array without copying it.

        Raises:
            DataError: the array is not one-dimensional or not of integers.
        """
        tokens = np.asarray(array)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise DataError(
                f"{name} has shape {tokens.shape} and type {tokens.dtype};"
                " give a one-dimensional array of integers"
            )
        view = tokens.view()
        view.flags.writeable = False
        return cls._of(view, None, name, vocab_size)

    @classmethod
    def _of(cls, tokens: Tokens, path: Path | None, name: str, vocab: int | None) -> TokenData:
        data = cls.__new__(cls)
        data._set(tokens, path, name, vocab)
        return data

    def _set(self, tokens: Tokens, path: Path | None, name: str, vocab: int | None) -> None:
        self.tokens, self.path, self.name, self.vocab_size = tokens, path, name, vocab

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"TokenData({self.name!r}, {len(self)} tokens of {self.tokens.dtype.name})"

    def check(self, vocab_size: int) -> None:
        """Read every token once and verify it against a vocabulary.

        Raises:
            DataError: an id is outside 0..vocab_size-1; names the first one.
        """
        for start in range(0, len(self), _CHECK_TOKENS):
            chunk = self.tokens[start : start + _CHECK_TOKENS]
            if 0 <= chunk.min() and chunk.max() < vocab_size:
                continue
            at = int(np.argmax((chunk < 0) | (chunk >= vocab_size)))
            raise DataError(
                f"{self.name}: token {start + at} is {int(chunk[at])}, but the model's vocabulary"
                f" has {vocab_size}; prepare the data with the tokenizer of the model"
            )

    def split(self, held_out: float) -> tuple[TokenData, TokenData | None]:
        """Split off the end of the data, for evaluation.

        Args:
            held_out: fraction of the tokens, in [0, 1); 0 holds nothing out.

        Returns:
            The training part and the held-out part, views of the same tokens.

        Raises:
            ConfigError: the fraction is out of range.
        """
        if not 0 <= held_out < 1:
            raise ConfigError(f"the held-out fraction is {held_out}; use at least 0, less than 1")
        if held_out == 0:
            return self, None
        at = len(self) - round(len(self) * held_out)
        return (
            self._of(
                self.tokens[:at], self.path, f"the training part of {self.name}", self.vocab_size
            ),
            self._of(
                self.tokens[at:], self.path, f"the held-out part of {self.name}", self.vocab_size
            ),
        )


class Sampler:
    """Draw random windows; draw number i depends on the seed and on i alone.

    Args:
        data: where to draw from; every window start is equally likely.
        seq_len: tokens per window.
        seed: 0 or more.

    Raises:
        ConfigError: `seq_len` or `seed` is out of range.
        DataError: the data is shorter than one window and its last target.

    Example:
        >>> sampler = Sampler(TokenData.from_array(np.arange(100)), seq_len=8, seed=0)
        >>> tokens, targets = sampler.next()
        >>> bool((targets == tokens + 1).all())
        True
    """

    def __init__(self, data: TokenData, seq_len: int, seed: int) -> None:
        _need(data, seq_len)
        self.data = data
        self.seq_len = seq_len
        self._seed = _counter(seed, "seed")
        self._index = 0

    def next(self) -> Window:
        """Return the next window.

        Returns:
            (seq_len,) int32 tokens and (seq_len,) int32 targets, each the token that follows;
            both contiguous and owned by the caller.
        """
        start = _draw(len(self.data) - self.seq_len, self._seed, self._index)
        self._index += 1
        return _window(self.data, start, self.seq_len)

    def state(self) -> dict[str, int]:
        """Return what `restore` needs to continue with the same windows."""
        return {"seed": self._seed, "index": self._index}

    def restore(self, state: Mapping[str, SupportsIndex]) -> None:
        """Continue where `state` was taken; its seed replaces this sampler's.

        Raises:
            CheckpointError: the state is not one that `state` returned.
        """
        try:
            seed = _counter(state["seed"], "seed")
            index = _counter(state["index"], "index")
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(
                f"the sampler state {dict(state)} is damaged; resume from another checkpoint"
            ) from error
        self._seed, self._index = seed, index


def windows(data: TokenData, seq_len: int, count: int) -> Iterator[Window]:
    """Yield evenly spaced windows that never overlap, the same ones each time.

    Args:
        data: what to evaluate on.
        seq_len: tokens per window.
        count: windows wanted; fewer come from data that cannot hold that many.

    Returns:
        An iterator of tokens and targets as from `Sampler.next`.

    Raises:
        ConfigError: `seq_len` or `count` is below 1.
        DataError: the data is shorter than one window and its last target.

    Example:
        >>> data = TokenData.from_array(np.arange(100))
        >>> [int(tokens[0]) for tokens, _ in windows(data, seq_len=9, count=4)]
        [0, 30, 60, 90]
    """
    _need(data, seq_len)
    if count < 1:
        raise ConfigError(f"{count} evaluation windows make no sense; use 1 or more")
    last = len(data) - seq_len - 1
    count = min(count, (len(data) - 1) // seq_len)
    starts = [i * last // max(count - 1, 1) for i in range(count)]
    return (_window(data, start, seq_len) for start in starts)


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
    sidecar = _sidecar(out)
    total = 0
    for path in paths:
        total += _size(path, "text")
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
                    for ids in tokenizer.encode_parts(document):
                        count += len(ids)
                        file.write(np.array(ids, dtype=_DTYPES[dtype]).tobytes())
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
        raise DataError(f"cannot read text file {path}: {_reason(error)}") from error


def _draw(count: int, seed: int, index: int) -> int:
    """Return one of 0..count-1, all equally likely, from Philox keyed by seed at block `index`.

    Raw bits are reduced here because numpy fixes those for ever, but not what it makes of them.
    """
    # The low counter word is left to Philox, so that draws never share bits.
    bits = np.random.Philox(key=seed, counter=index << 64)
    whole = (1 << 64) - (1 << 64) % count
    while True:
        value = int(bits.random_raw())
        if value < whole:
            return value % count


def _window(data: TokenData, start: int, seq_len: int) -> Window:
    """Return the int32 copies of one window and of the tokens that follow each of its own."""
    both = data.tokens[start : start + seq_len + 1].astype(np.int32)
    return both[:-1].copy(), both[1:].copy()


def _need(data: TokenData, seq_len: int) -> None:
    """Raise unless the data holds one window and the target of its last token."""
    if seq_len < 1:
        raise ConfigError(f"the sequence length is {seq_len}; use 1 or more")
    if len(data) < seq_len + 1:
        raise DataError(
            f"{data.name} has {len(data)} tokens, but a sequence of {seq_len} needs {seq_len + 1};"
            " use shorter sequences or more data"
        )


def _counter(value: SupportsIndex, what: str) -> int:
    """Return an integer that fits 64 unsigned bits."""
    number = operator.index(value)
    if not 0 <= number < 1 << 64:
        raise ConfigError(f"the {what} is {number}; use 0 or more, below 2**64")
    return number


def _size(path: Path, kind: str = "token") -> int:
    """Return the bytes of a regular file."""
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {kind} file {path}: {_reason(error)}") from error
    if not stat.S_ISREG(info.st_mode):
        what = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        raise DataError(f"cannot read {kind} file {path}: it is {what}; give a file")
    return info.st_size


def _sidecar(path: Path) -> Path:
    """Return the path of the JSON file beside a token file."""
    return path.with_name(path.name + ".json")


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    """Return the checked facts beside a token file, None if there are none."""
    sidecar = _sidecar(path)
    try:
        facts = json.loads(sidecar.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {sidecar}: {_reason(error)}") from error
    except ValueError:
        facts = None
    if (
        isinstance(facts, dict)
        and facts.get("format") == SIDECAR_FORMAT
        and facts.get("dtype") in tuple(_DTYPES)
        and all(type(facts.get(key)) is int and facts[key] > 0 for key in ("tokens", "vocab_size"))
    ):
        return facts
    raise DataError(
        f"{sidecar} does not describe token data; run anepy prepare again, or remove it if"
        f" {path.name} holds uint16 tokens"
    )


def _reason(error: OSError) -> str:
    """Return what the operating system said, in one line."""
    return error.strerror or str(error)
