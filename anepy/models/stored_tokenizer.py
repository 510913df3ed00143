"""The tokenizer that came with a model, kept as it was stored for saving to write again.

`text/tokenizer_stored.py` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

# SentencePiece's kinds of tokens, which GGUF files use, too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclass(frozen=True)
class StoredTokenizer:
    """A tokenizer as a file of a model holds it, not read.

    Attributes:
        format: "huggingface" or "gguf".
        files: name -> content of the files beside a Hugging Face model that are its tokenizer's.
        fields: key -> (GGUF value types, value) of a GGUF file's `tokenizer.` metadata.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id` of a `config.json`, as far as given.
    """

    format: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    fields: Mapping[str, tuple[tuple[int, ...], Any]] = field(default_factory=dict)
    ids: Mapping[str, Any] = field(default_factory=dict)


def from_json(path: Path) -> StoredTokenizer | None:
    """Keep a `tokenizer.json` under whatever name; None if there is no such file."""
    try:
        return StoredTokenizer("huggingface", {"tokenizer.json": path.read_bytes()})
    except FileNotFoundError:
        return None


@runtime_checkable
class Pieces(Protocol):
    """A tokenizer of pieces with scores, as llama2.c's and SentencePiece's."""

    bos_id: int | None
    eos_id: int | None

    def pieces(self) -> tuple[Sequence[bytes], Sequence[float]]:
        """Return the bytes and the score of each token, by id."""

    def kinds(self) -> Sequence[int]:
        """Return the kind of each token, by id."""
