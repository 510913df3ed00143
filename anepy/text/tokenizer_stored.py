"""Tokenizers from files and from models: of which kind they are, and the one that a model has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError, TokenizerError
from ..models import gguf, huggingface
from ..models.model import Model
from ..models.stored_tokenizer import Pieces, StoredTokenizer
from ..models.tokenizer_formats import (
    JSON,
    KIND,
    MODEL,
    SETTINGS,
    TEMPLATE,
    folder_files,
    gguf_fields,
    json_of_merges,
)
from ..system.files import parsed, replacing, write_failure
from .tokenizer import PathLike, Tokenizer
from .tokenizer_packages import JsonTokenizer, SentencePieceTokenizer
from .tokenizer_pieces import MIN_VOCAB, PieceTokenizer, byte_tokenizer

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
        if came.format == "gguf" and came.fields.get(KIND, ((), None))[1] in (None, "no_vocab"):
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


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer as a file of its own: a `tokenizer.json`, or llama2.c's `tokenizer.bin`.

    Raises:
        TokenizerError: the file cannot be written, or not hold the tokenizer with the same ids.
    """
    kept = tokenizer.stored if tokenizer.stored is not None else tokenizer
    assert isinstance(kept, StoredTokenizer | Pieces)
    try:
        if path.suffix == ".json":
            content = folder_files(kept).get(JSON)
            if content is None:  # it came as SentencePiece's file alone
                content = folder_files(_as_pieces(tokenizer))[JSON]
            try:
                with replacing(path) as file:
                    file.write(content)
            except OSError as error:
                raise TokenizerError(write_failure(path, "tokenizer", error)) from error
            return
        pieces = _as_pieces(tokenizer)
        known = PieceTokenizer(*pieces.pieces())
        ends = known.bos_id, known.eos_id, known.kinds()
        if ends != (pieces.bos_id, pieces.eos_id, pieces.kinds()) or not pieces.blank_first:
            raise TokenizerError("it has special tokens that such a file does not tell from others")
        known.save(path)
    except TokenizerError as error:
        raise TokenizerError(f"cannot write {path}: {error}") from None


def _as_pieces(tokenizer: Tokenizer) -> PieceTokenizer:
    if isinstance(tokenizer, PieceTokenizer):
        return tokenizer
    assert tokenizer.stored is not None
    fields = gguf_fields(tokenizer.stored, tokenizer.vocab_size)
    found = of_stored(StoredTokenizer("gguf", fields=fields), tokenizer.name)
    if not isinstance(found, PieceTokenizer):
        raise TokenizerError("it merges bytes, and such a file holds pieces with scores")
    return found


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
        found = parsed(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise TokenizerError(f"{name} is no JSON object; get it again")
    return found


# --------------------------------------------------------------------------------------- GGUF


def _of_gguf_file(path: Path) -> Tokenizer:
    try:
        fields = gguf.tokenizer_fields(path)
    except ModelError as error:
        raise TokenizerError(str(error)) from None
    if not fields:
        raise TokenizerError(f"{path} holds no tokenizer; give a tokenizer's file")
    return of_stored(StoredTokenizer("gguf", fields=fields), path.name)


def _of_fields(fields: Mapping[str, Any], name: str, stored: StoredTokenizer) -> Tokenizer:
    kind = fields.get(KIND)
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise TokenizerError(f"{name} lists no tokens; get the file again")
    if kind == "gpt2":
        return _of_merges(fields, name, stored)
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


def _of_merges(fields: Mapping[str, Any], name: str, stored: StoredTokenizer) -> Tokenizer:
    """Write the file of the package tokenizers that means the same, and read it."""
    try:
        content, settings = json_of_merges(fields)
    except TokenizerError as error:
        raise TokenizerError(
            f"{name} {error}: give the model's own {JSON} (--tokenizer FILE)"
        ) from None
    template = fields.get("tokenizer.chat_template")
    raw = json.dumps(content, ensure_ascii=False).encode()
    stops = sorted(_stops(fields, _ends(fields)[1]))
    return JsonTokenizer(raw, name, settings, stops, template, stored)


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
