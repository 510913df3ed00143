"""Tokenizers from one file format to another, as data: `tokenizer.json`, SentencePiece, GGUF.

A format that cannot hold a tokenizer so that its ids stay the same is refused. Sources: the file
`tokenizer.json` as the package tokenizers writes it, SentencePiece's `sentencepiece_model.proto`,
and llama.cpp's `conversion/base.py` and `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError, TokenizerError
from ..system.files import parsed
from .stored_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    StoredTokenizer,
)

JSON, MODEL = "tokenizer.json", "tokenizer.model"
SETTINGS, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
KIND = "tokenizer.ggml.model"
MARK = "\u2581"  # SentencePiece's blank
# What ends a text in the models there are, where no file of theirs says it.
ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
Fields = dict[str, tuple[tuple[int, ...], Any]]

# ----------------------------------------------------------------- how byte-level BPE cuts words

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2: Mapping[str, Any] = {
    "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True,
}  # fmt: skip


def _split(pattern: str) -> dict[str, Any]:
    """Return the step that cuts a text into these words, then bytes into letters."""
    words = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [words, {**GPT2, "use_regex": False}]}


_DIGITS = {"type": "Digits", "individual_digits": True}
# How the families' own tokenizer.json cuts a text into words, under llama.cpp's names for that;
# llama.cpp leaves Qwen's normalization out.
WORDS_OF: Mapping[str, dict[str, Any]] = {
    "gpt-2": dict(GPT2),
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, dict(GPT2)]},
    "llama-bpe": _split(_WORDS % r"\p{N}{1,3}"),
    "qwen2": _split(_WORDS % r"\p{N}"),
}
# The same pattern as Llama 3's and Qwen's files spell it.
_SPELLED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def _plain(step: Any) -> Any:
    """Return a step without what changes no id, patterns spelled in one way."""
    if isinstance(step, list):
        return [_plain(each) for each in step]
    if isinstance(step, dict):
        left = {"trim_offsets", "invert"}
        return {key: _plain(value) for key, value in step.items() if key not in left}
    return step.replace(_SPELLED, _CONTRACTIONS) if isinstance(step, str) else step


# --------------------------------------------------------------------------- one form for pieces


@dataclass(frozen=True)
class PieceList:
    """A vocabulary of pieces with scores, as SentencePiece's and llama2.c's.

    Attributes:
        names: text of each token, `MARK` for a blank.
        scores: higher ones are joined first.
        kinds: SentencePiece's.
        bos_id, eos_id: None if there is none.
        adds_bos: whether a text begins with BOS.
        blank_first: whether a text gets a blank of its own in front.
        chat_template: None without one.
    """

    names: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool = True
    blank_first: bool = True
    chat_template: str | None = None


def of_pieces(tokenizer: Pieces) -> PieceList:
    """Return the pieces of a tokenizer of llama2.c's kind.

    Raises:
        TokenizerError: one is no text.
    """
    entries, scores = tokenizer.pieces()
    kinds = list(tokenizer.kinds())
    names = []
    for entry, kind in zip(entries, kinds, strict=True):
        # llama2.c's own exporter writes spaces for SentencePiece's mark and lines around names.
        bare = entry.strip(b"\n") if kind == CONTROL else entry
        try:
            names.append(bare.decode() if kind == CONTROL else bare.decode().replace(" ", MARK))
        except UnicodeDecodeError:
            raise TokenizerError(f"token {len(names)} is no UTF-8 text") from None
    bos = tokenizer.bos_id
    return PieceList(names, list(scores), kinds, bos, tokenizer.eos_id, bos is not None)


def of_sentencepiece(content: bytes, settings: Mapping[str, Any], template: Any) -> PieceList:
    """Read SentencePiece's `.model`.

    Raises:
        TokenizerError: it is no BPE model, or changes a text before it is cut.
    """
    names, scores, kinds = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _message(content):
            if number == 1:
                piece = dict(_message(value))
                names.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                kinds.append(piece.get(3, NORMAL))
            elif number == 2:
                trainer = dict(_message(value))
            elif number == 3:
                normalizer = dict(_message(value))
    except (ValueError, IndexError, TypeError, KeyError, struct.error) as error:
        raise TokenizerError(f"{MODEL} is no SentencePiece model ({error})") from None
    if trainer.get(3, 1) != 2:
        raise TokenizerError(f"{MODEL} is no BPE model of SentencePiece")
    if normalizer.get(2) or normalizer.get(4, 1):
        raise TokenizerError(f"{MODEL} changes a text before it is cut, and nothing else does so")
    bos, eos = trainer.get(41, 1), trainer.get(42, 2)
    bos_id, eos_id = (i if i < len(names) else None for i in (bos, eos))  # -1: none
    adds = bool(settings.get("add_bos_token", True)) and bos_id is not None
    first = bool(normalizer.get(3, 1))
    return PieceList(names, scores, kinds, bos_id, eos_id, adds, first, template)


def _message(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of the fields of a message of protocol buffers."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(raw):
        tag = varint()
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"field of type {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(raw):
            raise ValueError("it is cut off")
        yield number, raw[at : at + size]
        at += size


def _of_fields(fields: Mapping[str, Any]) -> PieceList:
    plain = {key: value for key, (_, value) in fields.items()}
    names = plain["tokenizer.ggml.tokens"]
    bos, eos = (plain.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos"))
    return PieceList(
        names,
        plain["tokenizer.ggml.scores"],
        plain.get("tokenizer.ggml.token_type") or [NORMAL] * len(names),
        bos,
        eos,
        bool(plain.get("tokenizer.ggml.add_bos_token", True)) and bos is not None,
        bool(plain.get("tokenizer.ggml.add_space_prefix", True)),
        plain.get("tokenizer.chat_template"),
    )


# ---------------------------------------------------------------------------------- to GGUF files


def gguf_fields(tokenizer: StoredTokenizer | Pieces, rows: int) -> Fields:
    """Return the metadata by which a GGUF file holds a tokenizer.

    Args:
        tokenizer: of any format.
        rows: of the model; those that no token has get names.

    Raises:
        TokenizerError: it cannot be held so.
        ModelError: it has more tokens than the model rows.
    """
    if isinstance(tokenizer, StoredTokenizer):
        if tokenizer.format == "gguf":
            return dict(tokenizer.fields)
        files = tokenizer.files
        if JSON not in files and MODEL not in files:
            raise TokenizerError("it has none")
        settings = _object(files[SETTINGS]) if SETTINGS in files else {}
        template = _template(files, settings)
        if JSON not in files:
            return _piece_fields(of_sentencepiece(files[MODEL], settings, template), rows)
        return _json_fields(_Json(files[JSON], settings, tokenizer.ids), template, rows)
    return _piece_fields(of_pieces(tokenizer), rows)


def _piece_fields(pieces: PieceList, rows: int) -> Fields:
    """Write pieces as SentencePiece's, which llama2.c's were made from."""
    spare = _spare(len(pieces.names), rows)
    fields: Fields = {
        KIND: ((8,), "llama"),
        "tokenizer.ggml.pre": ((8,), "default"),
        "tokenizer.ggml.tokens": ((9, 8), [*pieces.names, *spare]),
        "tokenizer.ggml.scores": ((9, 6), [*map(float, pieces.scores), *[0.0] * len(spare)]),
        "tokenizer.ggml.token_type": ((9, 5), [*pieces.kinds, *[UNUSED] * len(spare)]),
        "tokenizer.ggml.add_space_prefix": ((7,), pieces.blank_first),
    }
    if UNKNOWN in pieces.kinds:
        fields["tokenizer.ggml.unknown_token_id"] = ((4,), list(pieces.kinds).index(UNKNOWN))
    ends = pieces.bos_id, pieces.eos_id
    return fields | _end_fields(*ends, pieces.adds_bos, pieces.chat_template)


def _end_fields(bos: int | None, eos: int | None, adds: bool, template: str | None) -> Fields:
    fields: Fields = {}
    for key, token in (("bos", bos), ("eos", eos)):
        if token is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = (4,), token
    fields["tokenizer.ggml.add_bos_token"] = (7,), adds
    fields["tokenizer.ggml.add_eos_token"] = (7,), False
    if template is not None:
        fields["tokenizer.chat_template"] = (8,), template
    return fields


def _spare(used: int, rows: int) -> list[str]:
    if used > rows:
        raise ModelError(
            f"its tokenizer has {used} tokens, the model {rows}; give it the tokenizer it was "
            "trained with"
        )
    return [f"[PAD{i}]" for i in range(used, rows)]


@dataclass
class _Json:
    """A `tokenizer.json`, and what the files beside it say of its ends."""

    content: bytes
    settings: Mapping[str, Any]
    given: Mapping[str, Any]
    bos: int | None = field(init=False)
    eos: int | None = field(init=False)
    adds_bos: bool = field(init=False)

    def __post_init__(self) -> None:
        self.read = _object(self.content)
        self.model = self.read.get("model") or {}
        if self.model.get("type") != "BPE":
            raise TokenizerError(f"{JSON} holds a model of type {self.model.get('type')}, not BPE")
        self.added = self.read.get("added_tokens") or []
        self.ids: dict[str, int] = dict(self.model["vocab"])
        self.ids |= {token["content"]: int(token["id"]) for token in self.added}
        first = _first_special(self.read.get("post_processor"))
        named = self._named("bos_token")
        self.adds_bos = first is not None
        if named is not None and isinstance(self.settings.get("add_bos_token"), bool):
            self.adds_bos = self.settings["add_bos_token"]
        self.bos = self.ids.get(first, named) if first is not None else named
        eos = self._named("eos_token")
        if eos is None:
            listed = self.given.get("eos_token_id")
            listed = listed if isinstance(listed, list) else [listed]
            eos = next((i for i in listed if type(i) is int), None)
        if eos is None:
            eos = next((self.ids[name] for name in ENDS if name in self.ids), None)
        self.eos = eos

    def _named(self, key: str) -> int | None:
        token = self.settings.get(key)
        name = token.get("content") if isinstance(token, Mapping) else token
        return self.ids.get(name) if isinstance(name, str) else None

    def merges(self) -> list[tuple[str, str]]:
        pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in self.model["merges"])
        return [(left, right) for left, right in pairs]


def _first_special(step: Any) -> str | None:
    """Return the name of the special token that a post-processor puts before a text."""
    if not isinstance(step, dict):
        return None
    for each in step.get("processors", []):
        if (found := _first_special(each)) is not None:
            return found
    single = step.get("single") or [{}]
    name = single[0].get("SpecialToken", {}).get("id")
    return name if isinstance(name, str) else None


def _json_fields(found: _Json, template: str | None, rows: int) -> Fields:
    names: list[str | None] = [None] * (max(found.ids.values(), default=-1) + 1)
    for name, i in found.ids.items():
        names[i] = name
    spare = _spare(len(names), rows)
    kinds = [UNUSED if name is None else NORMAL for name in names]
    for token in found.added:
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    tokens = [f"[PAD{i}]" if name is None else name for i, name in enumerate(names)]
    if found.model.get("byte_fallback"):
        return _piece_fields(_pieces_of_json(found, tokens, kinds, template), rows)
    cut = _plain(found.read.get("pre_tokenizer"))
    pre = next((name for name, step in WORDS_OF.items() if _plain(step) == cut), None)
    normalizer = found.read.get("normalizer")
    usual = {"type": "NFC"} if pre == "qwen2" else None
    ignores = bool(found.model.get("ignore_merges")) == (pre == "llama-bpe")
    if pre is None or normalizer not in (None, usual) or not ignores:
        raise TokenizerError(f"{JSON} cuts words in a way that llama.cpp has no name for")
    for token in found.added:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise TokenizerError(f"{JSON} takes blanks around {token['content']}")
    fields: Fields = {
        KIND: ((8,), "gpt2"),
        "tokenizer.ggml.pre": ((8,), pre),
        "tokenizer.ggml.tokens": ((9, 8), [*tokens, *spare]),
        "tokenizer.ggml.token_type": ((9, 5), [*kinds, *[UNUSED] * len(spare)]),
        "tokenizer.ggml.merges": ((9, 8), [" ".join(pair) for pair in found.merges()]),
    }
    return fields | _end_fields(found.bos, found.eos, found.adds_bos, template)


def _pieces_of_json(
    found: _Json, tokens: list[str], kinds: list[int], template: str | None
) -> PieceList:
    """Return the pieces of which a BPE with byte fallback, as Llama 2's, was made."""
    steps = _steps(found.read.get("normalizer"), "normalizers")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    prepends = {"type": "Prepend", "prepend": MARK}
    if found.read.get("pre_tokenizer") is not None or steps not in (
        [prepends, replaces],
        [replaces],
    ):
        raise TokenizerError(f"{JSON} cuts words in a way that llama.cpp has no name for")
    unknown = found.model.get("unk_token")
    for i, name in enumerate(tokens):
        if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            kinds[i] = BYTE
        elif name == unknown:
            kinds[i] = UNKNOWN
    normal = {name: i for i, name in enumerate(tokens) if kinds[i] == NORMAL and name}
    if {(name[:at], name[at:]) for name, at in _splits(normal)} != set(found.merges()):
        raise TokenizerError(f"{JSON} has not all merges of its pieces, which scores would bring")
    scores = [-1e9] * len(tokens)
    for rank, (left, right) in enumerate(found.merges()):
        i = found.ids[left + right]
        scores[i] = max(scores[i], -float(rank))
    blank = steps[0] == prepends
    return PieceList(tokens, scores, kinds, found.bos, found.eos, found.adds_bos, blank, template)


def _steps(step: Any, name: str) -> list[Any]:
    if step is None:
        return []
    return list(step[name]) if step.get("type") == "Sequence" else [step]


# ------------------------------------------------------------------------ to Hugging Face folders


def folder_files(tokenizer: StoredTokenizer | Pieces) -> dict[str, bytes]:
    """Return the files by which a Hugging Face folder holds a tokenizer; empty if there is none.

    Raises:
        TokenizerError: it cannot be held so.
    """
    if isinstance(tokenizer, StoredTokenizer):
        if tokenizer.format != "gguf":
            return dict(tokenizer.files)
        kind = tokenizer.fields.get(KIND, ((), None))[1]
        if kind in (None, "no_vocab"):
            return {}
        if kind == "gpt2":
            content, settings = json_of_merges({k: v for k, (_, v) in tokenizer.fields.items()})
        elif kind == "llama":
            content, settings = _json_of_pieces(_of_fields(tokenizer.fields))
        else:
            raise TokenizerError(f"it is of kind {kind!r}")
        template = tokenizer.fields.get("tokenizer.chat_template", ((), None))[1]
        settings |= {"chat_template": template} if template is not None else {}
    else:
        content, settings = _json_of_pieces(of_pieces(tokenizer))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {JSON: _bytes(content), SETTINGS: _bytes(settings)}


def json_of_merges(fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the `tokenizer.json` of a GGUF file's "gpt2", and settings that name its ends.

    Args:
        fields: key -> value.

    Raises:
        TokenizerError: how it cuts words is not known.
    """
    tokens = fields["tokenizer.ggml.tokens"]
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    pre = _OTHER_NAMES.get(pre, pre)
    if pre not in WORDS_OF:
        raise TokenizerError(f"cuts words as {pre!r}; anepy knows {', '.join(WORDS_OF)}")
    kinds = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    # A token may hold a blank only behind its first letter: none is empty.
    merges = [
        [pair[: pair.index(" ", 1)], pair[pair.index(" ", 1) + 1 :]]
        for pair in fields.get("tokenizer.ggml.merges", [])
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, kinds, (CONTROL, USER_DEFINED)),
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": WORDS_OF[pre],
        "post_processor": {**GPT2, "trim_offsets": False},
        "decoder": dict(GPT2),
        "model": _bpe(tokens, merges, ignore_merges=pre == "llama-bpe"),
    }
    bos, eos = (fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos"))
    adds = bool(fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"))
    if adds and bos is not None:
        content["post_processor"] = _begins_with(tokens[bos], bos)
    return content, _settings(tokens, bos, eos, adds)


def _json_of_pieces(pieces: PieceList) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the `tokenizer.json` of pieces: merges are all ways to make one out of two."""
    names = list(pieces.names)
    normal = {
        name: i for i, name in enumerate(names) if pieces.kinds[i] in (NORMAL, UNUSED) and name
    }
    merges = []
    for name, at in _splits(normal):
        left, right = name[:at], name[at:]
        merges.append(((-pieces.scores[normal[name]], normal[left], normal[right]), [left, right]))
    kinds = list(pieces.kinds)
    unknown = names[kinds.index(UNKNOWN)] if UNKNOWN in kinds else None
    steps: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": MARK}]
    ends: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if pieces.blank_first:
        steps.insert(0, {"type": "Prepend", "prepend": MARK})
        ends.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(names, pieces.kinds, (UNKNOWN, CONTROL, USER_DEFINED)),
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": ends},
        "model": _bpe(names, [pair for _, pair in sorted(merges)], unknown=unknown, fallback=True),
    }
    if pieces.adds_bos and pieces.bos_id is not None:
        content["post_processor"] = _begins_with(names[pieces.bos_id], pieces.bos_id)
    return content, _settings(names, pieces.bos_id, pieces.eos_id, pieces.adds_bos)


def _splits(names: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Yield each name, and where it is made of two others."""
    for name in names:
        for at in range(1, len(name)):
            if name[:at] in names and name[at:] in names:
                yield name, at


def _added(names: Sequence[str], kinds: Sequence[int], which: Sequence[int]) -> list[Any]:
    return [
        {
            "id": i, "content": names[i], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind != USER_DEFINED,
        }
        for i, kind in enumerate(kinds) if kind in which
    ]  # fmt: skip


def _bpe(
    names: Sequence[str],
    merges: Sequence[Sequence[str]],
    unknown: str | None = None,
    fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    return {
        "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": fallback, "byte_fallback": fallback,
        "ignore_merges": ignore_merges, "vocab": {name: i for i, name in enumerate(names)},
        "merges": merges,
    }  # fmt: skip


def _begins_with(name: str, token: int) -> dict[str, Any]:
    begin = {"SpecialToken": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            begin,
            {"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }


def _settings(names: Sequence[str], bos: int | None, eos: int | None, adds: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"add_bos_token": adds}
    for key, token in (("bos_token", bos), ("eos_token", eos)):
        if token is not None:
            settings[key] = names[token]
    return settings


def _template(files: Mapping[str, bytes], settings: Mapping[str, Any]) -> str | None:
    if TEMPLATE in files:
        return files[TEMPLATE].decode("utf-8", "replace")
    found = settings.get("chat_template")
    return found if isinstance(found, str) else None


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = parsed(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise TokenizerError("a file of it is no JSON object")
    return found


def _bytes(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode()
