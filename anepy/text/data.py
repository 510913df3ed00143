"""Training data: flat token files, random windows for training, fixed windows for evaluation.

A token file is nothing but ids, little-endian, the documents one after another. A small JSON file
beside it, which `anepy prepare` writes, may say how it was made, and name two more: where documents
begin, and which tokens count as targets. Files of other programs (llama2.c, nanoGPT) work without.
`document_windows.py` draws whole documents.
"""

from __future__ import annotations

import operator
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsIndex, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, ConfigError, DataError
from ..system.files import parsed

PathLike: TypeAlias = str | os.PathLike[str]
Tokens: TypeAlias = npt.NDArray[np.integer[Any]]
Window: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]

SIDECAR_FORMAT = "anepy-tokens-1"

DTYPES: dict[str, np.dtype[Any]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
}
UNCOUNTED = -100  # a target that is not counted
# No vocabulary has as many tokens: upper halves of wider ids are smaller.
_UPPER_HALF = 16
_TELLING = 32
# Large enough to be fast, small enough that checking many gigabytes stays cheap in memory.
_CHECK_TOKENS = 1 << 22


class _Source:
    """A file read by calls: one that gets shorter is an error, while mapped it ends the process."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path, self.dtype = path, dtype
        self._file = open(path, "rb", buffering=0)

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Return a copy of some elements.

        Raises:
            DataError: the file ends before, or cannot be read.
        """
        size = self.dtype.itemsize
        offset, left = start * size, max(0, stop - start) * size
        parts = []
        while left:
            try:
                part = os.pread(self._file.fileno(), left, offset)
            except OSError as error:
                raise DataError(f"cannot read {self.path}: {reason_of(error)}") from error
            if not part:
                raise DataError(
                    f"{self.path} has become shorter while it was read: restore it, then resume"
                )
            parts.append(part)
            offset, left = offset + len(part), left - len(part)
        return np.frombuffer(b"".join(parts), self.dtype)


class TokenData:
    """Tokens of a file, memory-mapped and read-only, or of an array.

    Args:
        path: a flat file of token ids.
        dtype: "uint16", "uint32", "int32", "int64", or "auto": what `<path>.json` of `anepy
            prepare` says, else uint16.

    Attributes:
        tokens: (n,) ids, little-endian, read-only.
        path: the file, None for an array.
        name: what messages call this data.
        vocab_size: vocabulary the file was prepared for, None if unknown.
        starts: (documents,) int64, the first token of each document; None if unknown.
        mask: (n,) uint8, 1 for a token that counts as a target; None: all do.
        tokenizer_file: the tokenizer that was trained for this data, None if none was.
        checksum: CRC-32 of the ids as they are stored; None before `check`.

    Raises:
        ConfigError: `dtype` is none of these names.
        DataError: the file is missing, empty, of odd length, holds wider ids than it is read with,
            or contradicts its `.json` or the files that this names.

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
    starts: npt.NDArray[np.int64] | None = None
    mask: npt.NDArray[np.uint8] | None = None
    tokenizer_file: Path | None = None
    checksum: int | None = None
    _source: _Source | None = None
    _mask_source: _Source | None = None
    _begin: int = 0  # of a part, in its file

    def __init__(self, path: PathLike, dtype: str = "auto") -> None:
        path = Path(path)
        if dtype != "auto" and dtype not in DTYPES:
            raise ConfigError(f"unknown token type {dtype!r}; use auto, {', '.join(DTYPES)}")
        nbytes = file_size(path)
        vocab_size = None
        guessed = dtype == "auto"
        sidecar = _read_sidecar(path) if guessed else None
        if guessed:
            guessed = sidecar is None
            dtype = sidecar["dtype"] if sidecar else "uint16"
            if sidecar:
                vocab_size = sidecar["vocab_size"]
                expected = sidecar["tokens"] * DTYPES[dtype].itemsize
                if nbytes != expected:
                    raise DataError(
                        f"{path} has {nbytes} bytes, but {sidecar_path(path).name} says {expected};"
                        " run anepy prepare again"
                    )
        kind = DTYPES[dtype]
        if nbytes == 0:
            raise DataError(f"{path} is empty; write token data with anepy prepare")
        if nbytes % kind.itemsize:
            raise DataError(
                f"{path} has {nbytes} bytes, not a multiple of the {kind.itemsize} of a {dtype}"
                " token; the file is cut off or not token data, write it with anepy prepare"
            )
        try:
            tokens = np.memmap(path, dtype=kind, mode="r")
            self._source = _Source(path, kind)
        except OSError as error:
            raise DataError(f"cannot read token file {path}: {reason_of(error)}") from error
        if guessed:
            _refuse_wider_ids(path, tokens)
        self._set(tokens, path, str(path), vocab_size)
        if sidecar is not None:
            self._read_beside(path, sidecar)

    def _read_beside(self, path: Path, sidecar: Mapping[str, Any]) -> None:
        """Map the files that the sidecar names."""
        for field, dtype, count in (
            ("document_starts", "<i8", int(sidecar.get("documents") or 0)),
            ("mask", "u1", len(self)),
        ):
            name = sidecar.get(field)
            if name is None:
                continue
            other = path.with_name(str(name))
            if file_size(other) != count * np.dtype(dtype).itemsize:
                raise DataError(
                    f"{other} does not fit {path}, which its {sidecar_path(path).name} was written "
                    "for; run anepy prepare again"
                )
            found = np.memmap(other, dtype=dtype, mode="r")
            if field == "mask":
                self.mask, self._mask_source = found, _Source(other, found.dtype)
            else:
                self.starts = found.astype(np.int64)
        if sidecar.get("tokenizer_file"):
            self.tokenizer_file = path.with_name(str(sidecar["tokenizer_file"]))

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
        """Read every token once, verify it against a vocabulary, and note the checksum.

        Raises:
            DataError: an id is outside 0..vocab_size-1; names the first one.
        """
        checksum = 0
        for start in range(0, len(self), _CHECK_TOKENS):
            chunk = self.read(start, min(len(self), start + _CHECK_TOKENS))
            checksum = zlib.crc32(np.ascontiguousarray(chunk).data, checksum)
            if 0 <= chunk.min() and chunk.max() < vocab_size:
                continue
            at = int(np.argmax((chunk < 0) | (chunk >= vocab_size)))
            raise DataError(
                f"{self.name}: token {start + at} is {int(chunk[at])}, but the model's vocabulary"
                f" has {vocab_size}; prepare the data with the tokenizer of the model"
            )
        self.checksum = checksum

    def read(self, start: int, stop: int) -> Tokens:
        """Return some ids, (stop - start,).

        Raises:
            DataError: the file has become shorter, or cannot be read.
        """
        if self._source is None:
            return self.tokens[start:stop]
        return self._source.read(self._begin + start, self._begin + stop)

    def counts(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Return which of some tokens count as targets, (stop - start,); None: all do.

        Raises:
            DataError: as `read` says.
        """
        if self.mask is None:
            return None
        if self._mask_source is None:
            return self.mask[start:stop].astype(np.bool_)
        return self._mask_source.read(self._begin + start, self._begin + stop).astype(np.bool_)

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
        if self.starts is not None and self.mask is not None:
            # Prompts and answers belong together.
            near = int(np.searchsorted(self.starts, at))
            at = int(self.starts[min(len(self.starts) - 1, near)])
        return (
            self._slice(0, at, f"the training part of {self.name}"),
            self._slice(at, len(self), f"the held-out part of {self.name}"),
        )

    def _slice(self, begin: int, end: int, name: str) -> TokenData:
        part = self._of(self.tokens[begin:end], self.path, name, self.vocab_size)
        part.tokenizer_file = self.tokenizer_file
        part._source, part._mask_source = self._source, self._mask_source
        part._begin = self._begin + begin
        if self.mask is not None:
            part.mask = self.mask[begin:end]
        if self.starts is not None:
            inside = self.starts[(self.starts >= begin) & (self.starts < end)] - begin
            if not len(inside) or inside[0]:
                inside = np.insert(inside, 0, 0)
            part.starts = inside
        return part


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

    def next(self) -> tuple[npt.NDArray[Any], ...]:
        """Return the next window.

        Returns:
            (seq_len,) int32 tokens and (seq_len,) int32 targets, each the token that follows;
            both contiguous and owned by the caller.
        """
        start = _draw(len(self.data) - self.seq_len, self._seed, self._index)
        self._index += 1
        return window_at(self.data, start, self.seq_len)

    def skip(self, count: int) -> None:
        """Leave out the next windows."""
        self._index += count

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
    return (window_at(data, start, seq_len) for start in starts)


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


def window_at(data: TokenData, start: int, seq_len: int) -> Window:
    """Return the int32 copies of one window and of the tokens that follow each of its own."""
    both = data.read(start, start + seq_len + 1).astype(np.int32)
    targets = both[1:].copy()
    counts = data.counts(start + 1, start + seq_len + 1)
    if counts is not None:
        targets[~counts] = UNCOUNTED
    return both[:-1].copy(), targets


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


def _refuse_wider_ids(path: Path, tokens: Tokens) -> None:
    """Raise if a file without a sidecar, read as uint16, shows that its ids are wider.

    Raises:
        DataError: every second number is so small that it must be the upper half of an id.
    """
    seen = np.asarray(tokens[:_CHECK_TOKENS])
    if len(seen) % 2 or len(seen) < _TELLING or seen[::2].max() < _UPPER_HALF:
        return
    if seen[1::2].max() >= _UPPER_HALF:
        return
    long = len(seen) % 4 == 0 and not seen[2::4].any() and not seen[3::4].any()
    raise DataError(
        f"{path} has no {sidecar_path(path).name} to say of which type its ids are, and they look "
        f"like {'int64' if long else 'uint32'}, not uint16: pass --dtype "
        f"{'int64' if long else 'uint32'}, or --dtype uint16 if they are that"
    )


def file_size(path: Path, kind: str = "token") -> int:
    """Return the bytes of a regular file."""
    try:
        info = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {kind} file {path}: {reason_of(error)}") from error
    if not stat.S_ISREG(info.st_mode):
        what = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        raise DataError(f"cannot read {kind} file {path}: it is {what}; give a file")
    return info.st_size


def beside(path: Path, what: str, ending: str = ".bin") -> Path:
    """Return the path of a file that belongs to a token file: `D.what.bin` of `D.bin`."""
    return path.with_name(f"{path.stem if path.suffix else path.name}.{what}{ending}")


def sidecar_path(path: Path) -> Path:
    """Return the path of the JSON file beside a token file."""
    return path.with_name(path.name + ".json")


def _read_sidecar(path: Path) -> dict[str, Any] | None:
    """Return the checked facts beside a token file, None if there are none."""
    sidecar = sidecar_path(path)
    try:
        facts = parsed(sidecar.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {sidecar}: {reason_of(error)}") from error
    except ValueError:
        facts = None
    if (
        isinstance(facts, dict)
        and facts.get("format") == SIDECAR_FORMAT
        and facts.get("dtype") in tuple(DTYPES)
        and all(_is_count(facts.get(key)) and facts[key] for key in ("tokens", "vocab_size"))
        and _is_count(facts.get("documents") or 0)
        and all(
            facts.get(key) is None or _is_name(facts[key])
            for key in ("document_starts", "mask", "tokenizer_file")
        )
    ):
        return facts
    raise DataError(
        f"{sidecar} does not describe token data; run anepy prepare again, or remove it if"
        f" {path.name} holds uint16 tokens"
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_name(value: Any) -> bool:
    """Say whether a value names a file beside another, and none anywhere else."""
    plain = isinstance(value, str) and value not in ("", "..") and "\0" not in value
    return plain and value == Path(value).name


def reason_of(error: OSError) -> str:
    """Return what the operating system said, in one line."""
    return error.strerror or str(error)
