"""Tokenizers that a package computes: `tokenizer.json` by tokenizers, `.model` by sentencepiece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import TokenizerError
from ..models.stored_tokenizer import StoredTokenizer
from ..models.tokenizer_formats import ENDS
from ..system.files import parsed
from .tokenizer import Ids, Raw, Text, Tokenizer, outside, packed, unicode

# What ends a turn in the models there are, where no file of theirs says it.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")


def package(name: str, what: str) -> Any:
    """Import a package of the extra `hf`.

    Raises:
        TokenizerError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise TokenizerError(f"{what} needs the package {name}; pip install 'anepy[hf]'") from None


def byte_letters() -> dict[str, int]:
    """Return the letter that stands for each byte in byte-level vocabularies.

    Bytes that print stand for themselves, the others for the letters from U+0100 on (GPT-2,
    Radford et al. 2019).
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(value): value for value in printed}
    for value in range(256):
        if value not in printed:
            letters[chr(0x100 + len(letters) - len(printed))] = value
    return letters


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`: the ids of the package tokenizers.

    Args:
        content: the file.
        name: what messages call it.
        settings: of a `tokenizer_config.json`, empty if there is none.
        ends: further ids that end a text, of the model's other files; the first one ends documents
            if `settings` names none.
        chat_template: of a file of its own; None: that of `settings`.
        stored: how a model keeps it; None: these two files.

    Raises:
        TokenizerError: the package is not installed or cannot read the file.
    """

    def __init__(
        self,
        content: bytes,
        name: str,
        settings: Mapping[str, Any] | None = None,
        ends: Sequence[int] = (),
        chat_template: str | None = None,
        stored: StoredTokenizer | None = None,
    ) -> None:
        settings = settings or {}
        library = package("tokenizers", "a tokenizer.json")
        self.name = name
        try:
            described = parsed(content)
            # Two objects, for whether names of special tokens count is a state of them.
            self._aware = library.Tokenizer.from_buffer(content)
            self._plain = library.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises nothing more specific
            reason = " ".join(str(error).split())
            raise TokenizerError(
                f"{name} is no tokenizer.json that the package tokenizers {library.__version__} "
                f"can read: {reason[:200]}; get it again"
            ) from None
        for each in (self._aware, self._plain):
            each.no_truncation()
            each.no_padding()
        self._plain.encode_special_tokens = True
        vocabulary = self._aware.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._aware.get_added_tokens_decoder()
        self.specials = {token.content: i for i, token in added.items() if token.special}
        self._texts = {i: token.content.encode() for i, token in added.items()}
        self._settings = settings
        self._read_ends(settings, ends)
        template = settings.get("chat_template") if chat_template is None else chat_template
        self.chat_template = _template(template)
        self.stored = stored or _stored(content, settings)
        self._read_decoder(described)

    def _read_ends(self, settings: Mapping[str, Any], ends: Sequence[int]) -> None:
        """Find which tokens begin and end a text."""
        begin, probe = (
            self._aware.encode("a").ids,
            self._plain.encode("a", add_special_tokens=False),
        )
        at = next((i for i in range(len(begin)) if begin[i : i + len(probe)] == probe.ids), 0)
        self.bos_id = begin[0] if at == 1 else None
        named = self._named(settings.get("bos_token"))
        if named is not None and isinstance(settings.get("add_bos_token"), bool):
            self.bos_id = named if settings["add_bos_token"] else None
        eos = self._named(settings.get("eos_token"))
        if eos is None:
            eos = next(iter(ends), None)
        if eos is None:
            eos = next((self.specials[name] for name in ENDS if name in self.specials), None)
        self.eos_id = eos
        turns = {self.specials[name] for name in _TURN_ENDS if name in self.specials}
        self.stop_ids = frozenset({*ends, *turns, *([] if eos is None else [eos])})

    def _named(self, token: Any) -> int | None:
        """Return the id of a token as a settings file names it."""
        name = token.get("content") if isinstance(token, Mapping) else token
        found: int | None = self._aware.token_to_id(name) if isinstance(name, str) else None
        return found

    def template_words(self) -> dict[str, str]:
        """Return the texts of special tokens by the names that settings give them."""
        named = {}
        for key, value in self._settings.items():
            text = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(text, str):
                named[key] = text
        return super().template_words() | named

    def _read_decoder(self, described: Mapping[str, Any]) -> None:
        """Find how a token is spelled: in letters for bytes, in marks for blanks, or otherwise."""
        decoder = described.get("decoder") or {}
        parts = decoder.get("decoders", [decoder])
        kinds = {part.get("type") for part in parts}
        self._letters = byte_letters() if "ByteLevel" in kinds else None
        self._marked = self._letters is None and bool({"ByteFallback", "Metaspace"} & kinds)
        self._strips = any(
            (part.get("type") == "Strip" and part.get("start"))
            or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
            for part in parts
        )

    def encode(
        self, text: Text, bos: bool = True, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Encode one text; the package decides about everything but BOS, EOS and `special`."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        coder = self._aware if special else self._plain
        ids += coder.encode(unicode(text), add_special_tokens=False).ids
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def encode_all(self, texts: Sequence[tuple[str, bool]]) -> Iterator[Ids]:
        """Yield the ids of several texts; the package encodes them on all cores."""
        found = self._plain.encode_batch_fast([t for t, _ in texts], add_special_tokens=False)
        for (text, whole), each in zip(texts, found, strict=True):
            yield packed(each.ids if whole else self._without_lead(text, each.ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that the package makes of the ids, without special tokens."""
        wanted = [self._checked(token) for token in ids]
        text: str = self._aware.decode(wanted, skip_special_tokens=True)
        return text

    def piece(self, prev: int, token: int) -> Raw:
        """Return the raw bytes of one token."""
        token = self._checked(token)
        if token in self._texts:
            text = self._texts[token]
            return b"" if text.decode() in self.specials else text
        name = self._aware.id_to_token(token)
        if name is None:
            return b""
        if self._letters is not None:
            letters = self._letters
            if all(letter in letters for letter in name):
                return bytes(letters[letter] for letter in name)
            return str(name).encode()
        if not self._marked:
            return str(self._aware.decode([token])).encode()
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            return bytes([int(name[3:5], 16)])
        first = prev < 0 or prev == self.bos_id
        return _unmarked(name, first and self._strips)

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise outside(self.name, token, self.vocab_size)
        return int(token)


class SentencePieceTokenizer(Tokenizer):
    """SentencePiece's `.model`: the ids of the package sentencepiece.

    Args:
        content: the file.
        name: what messages call it.
        settings: of a `tokenizer_config.json`, empty if there is none.
        chat_template: of a file of its own; None: that of `settings`.
        stored: how a model keeps it; None: this file.

    Raises:
        TokenizerError: the package is not installed or cannot read the file.
    """

    def __init__(
        self,
        content: bytes,
        name: str,
        settings: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        stored: StoredTokenizer | None = None,
    ) -> None:
        settings = settings or {}
        library = package("sentencepiece", "a SentencePiece model")
        self.name = name
        try:
            self._model = library.SentencePieceProcessor(model_proto=content)
        except Exception as error:  # the package raises nothing more specific
            reason = " ".join(str(error).split())
            raise TokenizerError(
                f"{name} is no SentencePiece model: {reason[:200]}; get it again"
            ) from None
        model = self._model
        self.vocab_size = model.get_piece_size()
        begins = model.bos_id() if settings.get("add_bos_token", True) else -1
        self.bos_id = begins if begins >= 0 else None
        self.eos_id = model.eos_id() if model.eos_id() >= 0 else None
        control = [i for i in range(self.vocab_size) if model.is_control(i)]
        self.specials = {model.id_to_piece(i): i for i in control}
        turns = {self.specials[text] for text in _TURN_ENDS if text in self.specials}
        self.stop_ids = frozenset({*turns, *([] if self.eos_id is None else [self.eos_id])})
        self.chat_template = _template(
            settings.get("chat_template") if chat_template is None else chat_template
        )
        self.stored = stored or StoredTokenizer("huggingface", files={"tokenizer.model": content})
        self._strips = "".join(model.encode("a", out_type=str)).startswith("\u2581")

    def encode(
        self, text: Text, bos: bool = True, eos: bool = False, special: bool = False
    ) -> list[int]:
        """Encode one text; the model decides what becomes of blanks and characters.

        After a special token another text begins, as in Llama 2's own code for conversations.
        """
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        words = unicode(text)
        for part in _parts(words, self.specials) if special else [words]:
            known = self.specials.get(part) if special else None
            ids += self._model.encode(part) if known is None else [known]
        return [*ids, self.eos_id] if eos and self.eos_id is not None else ids

    def encode_all(self, texts: Sequence[tuple[str, bool]]) -> Iterator[Ids]:
        """Yield the ids of several texts; the package encodes them on all cores."""
        found = self._model.encode([text for text, _ in texts], num_threads=-1)
        for (text, whole), ids in zip(texts, found, strict=True):
            yield packed(ids if whole else self._without_lead(text, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text that the package makes of the ids."""
        wanted = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise outside(self.name, token, self.vocab_size)
            wanted.append(int(token))
        text: str = self._model.decode(wanted)
        return text

    def piece(self, prev: int, token: int) -> Raw:
        """Return the raw bytes of one token."""
        if not 0 <= token < self.vocab_size:
            raise outside(self.name, token, self.vocab_size)
        token, model = int(token), self._model
        if model.is_control(token):
            return b""
        name = model.id_to_piece(token)
        if model.is_byte(token):
            return bytes([int(name[3:5], 16)])
        if model.is_unknown(token):
            return " \u2047 ".encode()
        return _unmarked(name, self._strips and (prev < 0 or prev == self.bos_id))


def _parts(text: str, names: Mapping[str, int]) -> list[str]:
    """Cut a text around these names; parts that are empty are left out."""
    import re

    if not names:
        return [text]
    longest_first = sorted(names, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
    return [part for part in pattern.split(text) if part]


def _unmarked(name: str, begins: bool) -> bytes:
    text = name.replace("\u2581", " ")
    return (text[1:] if begins and text.startswith(" ") else text).encode("utf-8", "replace")


def _template(found: Any) -> str | None:
    """Return the template of a settings file, which may hold several by name."""
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _stored(content: bytes, settings: Mapping[str, Any]) -> StoredTokenizer:
    files = {"tokenizer.json": content}
    if settings:
        files["tokenizer_config.json"] = json.dumps(dict(settings), indent=2).encode()
    return StoredTokenizer("huggingface", files=files)
