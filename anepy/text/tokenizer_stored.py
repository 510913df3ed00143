"""Tokenizers from files and from models: of which kind they are, and the one that a model has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, TokenizerError
from ..models import gguf, huggingface
from ..models.model import Model
from ..models.stored_tokenizer import CONTROL, USER_DEFINED, Pieces, StoredTokenizer
from .tokenizer import PathLike, Tokenizer
from .tokenizer_packages import JsonTokenizer, SentencePieceTokenizer
from .tokenizer_pieces import MIN_VOCAB, PieceTokenizer, byte_tokenizer

JSON = "tokenizer.json"
MODEL = "tokenizer.model"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_GENERATION = "generation_config.json"


def open_tokenizer(path: Path) -> Tokenizer:
    """Read a file or folder, as `Tokenizer.load` says."""
    if path.is_dir():
        stored = _of_folder(path)
        if stored is None:
            raise TokenizerError(
                f"{path} holds neither {JSON} nor {MODEL}; give a tokenizer's file or the folder "
                "of a Hugging Face model"
            )
        return of_stored(stored, path.name)
    try:
        with path.open("rb") as file:
            head = file.read(4)
            if head.startswith(gguf.MAGIC):
                return _of_gguf_file(path)
            content = head + file.read()
    except OSError as error:
        reason = error.strerror or str(error)
        raise TokenizerError(
            f"cannot read tokenizer {path}: {reason}; give a tokenizer.bin, a .model, a "
            f"{JSON}, a GGUF file or the folder of a model"
        ) from error
    if content.lstrip()[:1] == b"{":
        beside = _of_folder(path.parent) if path.name == JSON else None
        files = dict(beside.files) if beside else {}
        ids = beside.ids if beside else {}
        files[JSON] = content
        return _of_files(files, ids, str(path), StoredTokenizer("huggingface", files, {}, ids))
    # A message of protocol buffers whose first field is a piece, which begins with its text.
    if content[:1] == b"\n" and content[2:3] == b"\n":
        return SentencePieceTokenizer(content, path.name)
    return PieceTokenizer.read(path)


def of_stored(stored: StoredTokenizer, name: str) -> Tokenizer:
    """Read a tokenizer that came with a model.

    Args:
        stored: as `Model.tokenizer` keeps it.
        name: what messages call it.

    Raises:
        TokenizerError: it is of a kind that anepy does not read, or a package is missing.
    """
    if stored.format == "gguf":
        return _of_fields({key: value for key, (_, value) in stored.fields.items()}, name, stored)
    return _of_files(stored.files, stored.ids, name, stored)


def of_model(model: Model) -> Tokenizer | None:
    """Return the tokenizer that a model brought along, None if it has none.

    Raises:
        TokenizerError: it cannot be read, or has more tokens than the model.
    """
    came = model.tokenizer
    name = f"the tokenizer of {model.path.name if model.path is not None else 'the model'}"
    if isinstance(came, StoredTokenizer):
        if not (came.fields or JSON in came.files or MODEL in came.files):
            return None
        if came.format == "gguf" and came.fields.get(_KIND, ((), None))[1] in (None, "no_vocab"):
            return None
        tokenizer = of_stored(came, name)
    elif isinstance(came, Tokenizer):
        tokenizer = came
    elif isinstance(came, Pieces):
        entries, scores = came.pieces()
        tokenizer = PieceTokenizer(entries, scores, name)
    else:
        return None
    tokenizer.check(model.config.vocab_size)
    return tokenizer


def resolve_tokenizer(tokenizer: Tokenizer | PathLike | None, model: Model) -> Tokenizer:
    """Return the tokenizer that was named, or the one that belongs to a model.

    Args:
        tokenizer: a tokenizer or the path of one; None takes the one that came with the model,
            else `tok<vocabulary>.bin` or `tokenizer.bin` beside it, or the byte tokenizer for 259
            tokens.
        model: whose vocabulary is at least as large.

    Raises:
        TokenizerError: none was found, or it does not fit.
    """
    size, path = model.config.vocab_size, model.path
    if isinstance(tokenizer, Tokenizer):
        tokenizer.check(size)
        return tokenizer
    if tokenizer is not None:
        return Tokenizer.load(tokenizer, size)
    found = of_model(model)
    if found is not None:
        return found
    folder = path.parent if path is not None else None
    if folder is not None:
        for name in (f"tok{size}.bin", "tokenizer.bin"):
            if (folder / name).is_file():
                try:
                    beside = PieceTokenizer.read(folder / name)
                except TokenizerError:
                    continue
                # One of another size belongs to another model in this folder.
                if beside.vocab_size == size:
                    return beside
    if size == MIN_VOCAB:
        return byte_tokenizer()
    looked = f" in {folder}" if folder is not None else ""
    raise TokenizerError(
        f"no tokenizer of {size} tokens found{looked}: pass one (--tokenizer FILE)"
    )


# ------------------------------------------------------------------------------- Hugging Face


def _of_folder(folder: Path) -> StoredTokenizer | None:
    """Return the tokenizer's files of a folder, None if there is no tokenizer."""
    try:
        files = {
            name: (folder / name).read_bytes()
            for name in huggingface.TOKENIZER_FILES
            if (folder / name).is_file()
        }
        config = folder / huggingface.CONFIG
        ids = _object(config.read_bytes(), str(config)) if config.is_file() else {}
    except OSError as error:
        raise TokenizerError(f"cannot read {error.filename}: {error.strerror}") from None
    if JSON not in files and MODEL not in files:
        return None
    kept = {key: ids[key] for key in huggingface.TOKEN_IDS if ids.get(key) is not None}
    return StoredTokenizer("huggingface", files=files, ids=kept)


def _of_files(
    files: Mapping[str, bytes], ids: Mapping[str, Any], name: str, stored: StoredTokenizer
) -> Tokenizer:
    settings = _object(files[SETTINGS], f"{name}: {SETTINGS}") if SETTINGS in files else {}
    template = files[TEMPLATE].decode("utf-8", "replace") if TEMPLATE in files else None
    if JSON in files:
        generation = _object(files[_GENERATION], _GENERATION) if _GENERATION in files else {}
        ends: list[Any] = []
        for source in (generation, ids):
            given = source.get("eos_token_id")
            ends += given if isinstance(given, list) else [given]
        known = [each for each in ends if type(each) is int]
        return JsonTokenizer(files[JSON], name, settings, known, template, stored)
    if MODEL in files:
        return SentencePieceTokenizer(files[MODEL], name, settings, template, stored)
    raise TokenizerError(f"{name} holds neither {JSON} nor {MODEL}; pass one (--tokenizer FILE)")


def _object(content: bytes, name: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise TokenizerError(f"{name} is no JSON object; get it again")
    return found


# --------------------------------------------------------------------------------------- GGUF

_KIND = "tokenizer.ggml.model"
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_GPT2: Mapping[str, Any] = {
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
    return {"type": "Sequence", "pretokenizers": [words, {**_GPT2, "use_regex": False}]}


_DIGITS = {"type": "Digits", "individual_digits": True}
# How the families' own tokenizer.json cuts a text into words, under llama.cpp's names for that;
# llama.cpp leaves Qwen's normalization out.
_WORDS_OF: Mapping[str, dict[str, Any]] = {
    "gpt-2": dict(_GPT2),
    "smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, dict(_GPT2)]},
    "llama-bpe": _split(_WORDS % r"\p{N}{1,3}"),
    "qwen2": _split(_WORDS % r"\p{N}"),
}
_OTHER_NAMES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


def _of_gguf_file(path: Path) -> Tokenizer:
    try:
        fields = gguf.tokenizer_fields(path)
    except ModelError as error:
        raise TokenizerError(str(error)) from None
    if not fields:
        raise TokenizerError(f"{path} holds no tokenizer; give a tokenizer's file")
    return of_stored(StoredTokenizer("gguf", fields=fields), path.name)


def _of_fields(fields: Mapping[str, Any], name: str, stored: StoredTokenizer) -> Tokenizer:
    kind = fields.get(_KIND)
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError(f"{name} lists no tokens; get the file again")
    if kind == "gpt2":
        return _of_merges(fields, tokens, name, stored)
    if kind != "llama":
        raise TokenizerError(
            f"{name} is of kind {kind!r}; anepy reads llama and gpt2: give the model's own "
            f"{JSON} (--tokenizer FILE)"
        )
    kinds = _kinds(fields, len(tokens))
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, list):
        raise TokenizerError(f"{name} has no scores; get the file again")
    adds, bos, eos = fields.get("tokenizer.ggml.add_bos_token", True), *_ends(fields)
    return PieceTokenizer(
        [token.replace("\u2581", " ").encode() for token in tokens],
        scores,
        name,
        kinds=kinds,
        bos_id=bos if adds else None,
        eos_id=eos,
        stop_ids=_stops(fields, eos),
        blank_first=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        marks=True,
        chat_template=fields.get("tokenizer.chat_template"),
        stored=stored,
    )


def _of_merges(
    fields: Mapping[str, Any], tokens: list[str], name: str, stored: StoredTokenizer
) -> Tokenizer:
    """Write the file of the package tokenizers that means the same, and read it."""
    pre = str(fields.get("tokenizer.ggml.pre", "default"))
    pre = _OTHER_NAMES.get(pre, pre)
    if pre not in _WORDS_OF:
        raise TokenizerError(
            f"{name} cuts words as {pre!r}; anepy knows {', '.join(_WORDS_OF)}: give the model's "
            f"own {JSON} (--tokenizer FILE)"
        )
    added = [
        {
            "id": i, "content": tokens[i], "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": kind == CONTROL,
        }
        for i, kind in enumerate(_kinds(fields, len(tokens)))
        if kind in (CONTROL, USER_DEFINED)
    ]  # fmt: skip
    # A token may hold a blank only behind its first letter: none is empty.
    merges = [
        [pair[: pair.index(" ", 1)], pair[pair.index(" ", 1) + 1 :]]
        for pair in fields.get("tokenizer.ggml.merges", [])
    ]
    bos, eos = _ends(fields)
    adds = fields.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe")
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": _WORDS_OF[pre],
        "post_processor": {**_GPT2, "trim_offsets": False},
        "decoder": dict(_GPT2),
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    settings: dict[str, Any] = {"add_bos_token": bool(adds)}
    for key, token in (("bos_token", bos), ("eos_token", eos)):
        if token is not None:
            settings[key] = tokens[token]
    template = fields.get("tokenizer.chat_template")
    raw = json.dumps(content, ensure_ascii=False).encode()
    return JsonTokenizer(raw, name, settings, sorted(_stops(fields, eos)), template, stored)


def _kinds(fields: Mapping[str, Any], count: int) -> list[int]:
    kinds = fields.get("tokenizer.ggml.token_type")
    return list(kinds) if isinstance(kinds, list) and len(kinds) == count else [1] * count


def _ends(fields: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return the ids of BOS and EOS."""
    found = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")]
    bos, eos = (None if each is None else int(each) for each in found)
    return bos, eos


def _stops(fields: Mapping[str, Any], eos: int | None) -> frozenset[int]:
    further = [fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eot", "eom")]
    return frozenset(int(each) for each in [eos, *further] if each is not None)
