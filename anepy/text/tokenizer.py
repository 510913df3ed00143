"""What every tokenizer can do, and finding out of what kind a file is.

Kinds: llama2.c's `tokenizer.bin` and the SentencePiece kind of GGUF files (`tokenizer_pieces.py`,
no package needed), SentencePiece's `.model` and `tokenizer.json` (`tokenizer_packages.py`, extra
`hf`), and what came with a model (`tokenizer_stored.py`).
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import TokenizerError
from ..models.stored_tokenizer import StoredTokenizer

# Inside the class the name `bytes` means its method.
Raw: TypeAlias = bytes
Text: TypeAlias = str | bytes
Ids: TypeAlias = npt.NDArray[np.uint32]
PathLike: TypeAlias = str | os.PathLike[str]

# A long text is cut beside a line end or a blank that stands between two letters, where the ids of
# this many characters around it show that nothing depends on what is beyond.
_CUTS = ((re.compile(r"(?<=\w)\n(?=\w)"), 0), (re.compile(r"(?<=\w) (?=\w)"), 0),
         (re.compile(r"(?<=\w) (?=\w)"), 1))  # fmt: skip
_AROUND = 64
_SEARCHED = 4096
_TRIES = 16


class Tokenizer(ABC):
    """Encode text to token ids and back.

    Attributes:
        name: what messages and sidecar files call it.
        vocab_size: ids are below it.
        bos_id: the token it begins a text with; None if it has no such habit.
        eos_id: the token that ends a text; None if there is none.
        stop_ids: tokens after which a model has nothing more to say: end of text, of a turn.
        specials: text -> id of tokens that steer a model and have no place in ordinary text.
        chat_template: how a conversation becomes text (jinja2); None if it came without one.
        stored: how a model keeps it; None for the kind that `Pieces` describes.

    Example:
        >>> Tokenizer.bytes().encode("Hi")
        [1, 35, 75, 108]
    """

    name: str
    vocab_size: int
    bos_id: int | None = None
    eos_id: int | None = None
    stop_ids: frozenset[int] = frozenset()
    specials: Mapping[str, int] = {}
    chat_template: str | None = None
    stored: StoredTokenizer | None = None
    _lead: list[int] | None = None

    @staticmethod
    def load(path: PathLike, vocab_size: int | None = None) -> Tokenizer:
        """Read a tokenizer; its kind is told by its content.

        Args:
            path: llama2.c's `tokenizer.bin`, SentencePiece's `.model`, a `tokenizer.json`, a GGUF
                file, or a folder of a Hugging Face model.
            vocab_size: the vocabulary of the model it is for; a smaller tokenizer is no error, for
                models may have more rows than tokens.

        Raises:
            TokenizerError: the file is missing, malformed, or has more tokens than the model, or a
                package that reads it is missing.
        """
        from .tokenizer_stored import open_tokenizer

        tokenizer = open_tokenizer(Path(path))
        tokenizer.check(vocab_size)
        return tokenizer

    @staticmethod
    def bytes() -> Tokenizer:
        """Return the byte-level tokenizer: three special tokens and the 256 byte values."""
        from .tokenizer_pieces import byte_tokenizer

        return byte_tokenizer()

    @abstractmethod
    def encode(
        self, text: Text, bos: bool = True, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Encode one text.

        Args:
            text: a string, or UTF-8 bytes.
            bos: begin with `bos_id`, if there is one.
            eos: finish with `eos_id`, if there is one.
            special: take the names of special tokens in the text for these tokens; without it,
                `</s>` in a text is four characters like any others.

        Returns:
            Token ids in 0..vocab_size-1.

        Raises:
            TokenizerError: the string holds half of a surrogate pair, which has no UTF-8 form.
        """

    @abstractmethod
    def piece(self, prev: int, token: int) -> Raw:
        """Return the raw bytes of one token, for streaming and for counting bytes.

        Args:
            prev: the token before it, -1 if there is none: a blank that `encode` put in front of
                the text is dropped there.
            token: the token to spell; a special one gives nothing.

        Raises:
            TokenizerError: the id is outside the vocabulary.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of token ids; special ones give nothing, broken UTF-8 gives U+FFFD.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        pieces = []
        previous = -1
        for token in ids:
            pieces.append(self.piece(previous, token))
            previous = token
        return b"".join(pieces).decode("utf-8", "replace")

    @property
    def start_id(self) -> int:
        """The token that a text without a begin of its own goes on from: BOS, else EOS.

        Raises:
            TokenizerError: there is neither.
        """
        start = self.eos_id if self.bos_id is None else self.bos_id
        if start is None:
            raise TokenizerError(
                f"{self.name} has no token that begins a text: give the begin of one (--prompt)"
            )
        return start

    def template_words(self) -> dict[str, str]:
        """Return what a chat template may ask for: the texts of `bos_token` and `eos_token`."""
        texts = {token: text for text, token in self.specials.items()}
        ends = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {key: texts[i] for key, i in ends.items() if i is not None and i in texts}

    def check(self, vocab_size: int | None) -> None:
        """Compare with the vocabulary of a model, None for none.

        Raises:
            TokenizerError: there are ids that the model does not have.
        """
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise TokenizerError(
                f"{self.name} has {self.vocab_size} tokens, but the model's vocabulary has "
                f"{vocab_size}; use the tokenizer the model was trained with"
            )

    # Texts larger than memory

    def divide(self, text: str, near: int) -> tuple[int, int] | None:
        """Find where a text can be cut so that its halves have the ids of the whole.

        Args:
            text: some text, more of which may follow.
            near: the cut is before this character.

        Returns:
            The end of the first half, and the begin of the second one, which `encode_rest` takes;
            None if no such place is known.
        """
        begin = max(_AROUND, near - _SEARCHED)
        for pattern, dropped in _CUTS:
            found = [match.start() for match in pattern.finditer(text, begin, near)]
            for at in reversed(found[-_TRIES:]):
                before, after = text[at - _AROUND : at], text[at : at + _AROUND]
                whole = self.encode(before + after, bos=False)
                if whole == self.encode(before, bos=False) + self.encode_rest(after[dropped:]):
                    return at, at + dropped
        return None

    def encode_rest(self, text: str) -> list[int]:
        """Encode the second half of a text that `divide` cut."""
        return self._without_lead(text, self.encode(text, bos=False))

    def _without_lead(self, text: str, ids: list[int]) -> list[int]:
        """Drop what `encode` puts in front of a text from one that is none of its own."""
        if not text.startswith("\n"):
            return ids
        if self._lead is None:
            self._lead = self.encode("\n", bos=False)[:-1]
        return ids[len(self._lead) :] if ids[: len(self._lead)] == self._lead else ids

    def encode_all(self, texts: Sequence[tuple[str, bool]]) -> Iterator[Ids]:
        """Yield the ids of several texts, without BOS and EOS, on as many threads as it can.

        Args:
            texts: each with whether it is a text of its own, not a half from `divide`.
        """
        for text, whole in texts:
            ids = self.encode(text, bos=False) if whole else self.encode_rest(text)
            yield packed(ids)


def packed(ids: list[int]) -> Ids:
    """Return ids as an array; NumPy takes five times as long to read a list."""
    return np.frombuffer(array("I", ids), np.uint32)


def utf8(text: Text) -> bytes:
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


def unicode(text: Text) -> str:
    """Return a text as a string that every library accepts; stray bytes become U+FFFD."""
    if isinstance(text, str) and text.isascii():
        return text
    return utf8(text).decode("utf-8", "replace")


def outside(name: str, token: int, size: int) -> TokenizerError:
    """Return the error of an id that a tokenizer does not have."""
    return TokenizerError(
        f"{name}: token {token} is outside its {size} tokens;"
        " use the tokenizer the model was trained with"
    )
