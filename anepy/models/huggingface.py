"""Hugging Face folders: `config.json`, safetensors files, and the tokenizer's files beside them.

Source: the file names that transformers 4.57 and 5.24 read, and safetensors' description of its
format.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import ModelError, TokenizerError
from ..system import files
from . import hf_config, tensor_file, tensors
from .model import ModelConfig
from .stored_tokenizer import Pieces, StoredTokenizer
from .tensor_file import Place
from .tensors import Stored, Tensor
from .tokenizer_formats import folder_files
from .views import Array

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A file larger than this is cut, as transformers 4 does.
SHARD_BYTES = 5_000_000_000

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


# -------------------------------------------------------------------------------------- reading


# Tables that old checkpoints hold beside the weights; they follow from the configuration.
_DERIVED = ("rotary_emb.inv_freq",)


def open_folder(folder: Path, weights: Path | None = None) -> Stored:
    """Find the tensors of a folder and check them against its `config.json`.

    Args:
        folder: holds `config.json` and the weights.
        weights: a single safetensors file to read instead of what the folder names.

    Raises:
        ModelError: a file or tensor is missing, malformed or not supported.
    """
    config = hf_config.read(folder / CONFIG)
    places = _places(folder, weights)
    wanted = tensors.tensors(config)
    for tensor in wanted:
        place = places.get(tensor.hugging_face)
        if place is None:
            hint = " (tie_word_embeddings is false)" if tensor.name == "output.weight" else ""
            raise ModelError(
                f"model {folder} holds no tensor {tensor.hugging_face}, which its {CONFIG} asks "
                f"for{hint}; get it again"
            )
        if place.dtype not in tensor_file.DTYPES:
            raise ModelError(
                f"{place.path}: tensor {tensor.hugging_face} is {place.dtype}, which is not "
                "supported; get the model in f32, f16 or bf16"
            )
        if place.shape != tensor.shape:
            raise ModelError(
                f"{place.path}: tensor {tensor.hugging_face} has shape {list(place.shape)}, but "
                f"{CONFIG} asks for {list(tensor.shape)}"
            )
    known = {tensor.hugging_face for tensor in wanted} | {"lm_head.weight"}
    for name in places:
        if name not in known and not name.endswith(_DERIVED):
            raise ModelError(
                f"model {folder} holds tensor {name}, which {CONFIG} does not ask for; "
                "anepy cannot compute with it"
            )
    second = places.get("lm_head.weight") if config.tied else None
    halves = all(places[t.hugging_face].dtype == "BF16" for t in wanted if len(t.shape) == 2)
    storage = "bf16" if halves else "f32"
    return Stored(config, partial(_fill, places, wanted, second), _tokenizer(folder), storage)


def _places(folder: Path, weights: Path | None) -> dict[str, Place]:
    """Return where each tensor of a folder is, by its name."""
    single, index = folder / WEIGHTS, folder / INDEX
    if weights is not None and weights != single and not _in_index(index, weights.name):
        return tensor_file.places(weights)
    if single.is_file():
        return tensor_file.places(single)
    if not index.is_file():
        others = sorted(p.name for p in folder.glob("*.safetensors"))
        if len(others) == 1:
            return tensor_file.places(folder / others[0])
        found = others or sorted(p.name for p in folder.glob("pytorch_model*.bin"))
        raise ModelError(
            f"model {folder} has a {CONFIG} but no {WEIGHTS} and no {INDEX}"
            + (f", only {', '.join(found[:3])}; save it as safetensors" if found else "")
        )
    listed = _weight_map(index)
    headers: dict[str, dict[str, Place]] = {}
    places = {}
    for name, file in listed.items():
        if file not in headers:
            if not (folder / file).is_file():
                raise ModelError(f"model {folder} lacks {file}, which {INDEX} names; get it again")
            headers[file] = tensor_file.places(folder / file)
            _check_listed(folder / file, headers[file], listed)
        if name not in headers[file]:
            raise ModelError(f"{folder / file} holds no tensor {name}, which {INDEX} promises")
        places[name] = headers[file][name]
    return places


def _check_listed(path: Path, header: Mapping[str, Place], listed: Mapping[str, str]) -> None:
    """Refuse a file with a tensor that the index does not look for there."""
    for name in header:
        if listed.get(name) != path.name and not name.endswith(_DERIVED):
            where = f"places in {listed[name]}" if name in listed else "does not list"
            raise ModelError(f"{path} holds tensor {name}, which {INDEX} {where}; get both again")


def _in_index(index: Path, name: str) -> bool:
    return index.is_file() and name in _weight_map(index).values()


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> file name of an index; files of other folders are refused."""
    listed = hf_config.json_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{index} has no weight_map; get it again")
    for name, file in listed.items():
        if not isinstance(file, str) or file != os.path.basename(file) or file in ("", ".", ".."):
            raise ModelError(f"{index} places tensor {name} in {file!r}, which is no file name")
    return listed


def _fill(
    places: Mapping[str, Place],
    wanted: list[Tensor],
    second: Place | None,
    weights: Mapping[str, Array],
) -> None:
    for tensor in wanted:
        place = places[tensor.hugging_face]
        values = tensor_file.values(place)
        if tensor.heads:
            values = tensors.from_half_split(values, tensor.heads)
        where = f"{place.path}: tensor {tensor.hugging_face}"
        tensors.put(weights, tensor.name, values, where)
    first = places["model.embed_tokens.weight"]
    if second is not None and (
        second.shape != first.shape
        or not np.array_equal(tensor_file.values(second), tensor_file.values(first))
    ):
        raise ModelError(
            f"{second.path}: tensor lm_head.weight differs from model.embed_tokens.weight although "
            f"tie_word_embeddings is true; set that to false in {CONFIG}"
        )


def _tokenizer(folder: Path) -> StoredTokenizer | None:
    try:
        found = {n: (folder / n).read_bytes() for n in TOKENIZER_FILES if (folder / n).is_file()}
    except OSError as error:
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from None
    given = hf_config.json_object(folder / CONFIG)
    ids = {key: given[key] for key in TOKEN_IDS if given.get(key) is not None}
    return StoredTokenizer("huggingface", files=found, ids=ids) if found or ids else None


# -------------------------------------------------------------------------------------- writing


def check(config: ModelConfig) -> None:
    """Refuse a model that no family computes, before anything is written.

    Raises:
        ModelError: the model cannot be expressed, or the package is not installed.
    """
    hf_config.write(config, "f32")
    tensor_file.package()


def save(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Array],
    dtype: str,
    tokenizer: StoredTokenizer | Pieces | None,
) -> int:
    """Write a folder that transformers loads.

    Args:
        folder: is made if it is not there; other files in it stay.
        config: the model's dimensions.
        weights: its tensors.
        dtype: "f32", "f16" or "bf16".
        tokenizer: what came with the model; in the form of such a folder if it can be, else a
            warning says why not.

    Returns:
        the bytes written.

    Raises:
        ModelError: the model or a weight cannot be expressed.
        OSError: a file cannot be written; what was there is unchanged.
    """
    check(config)
    settings = hf_config.write(config, dtype)
    beside: Mapping[str, bytes] = {}
    if isinstance(tokenizer, StoredTokenizer):
        settings |= tokenizer.ids
    try:
        beside = folder_files(tokenizer) if tokenizer is not None else {}
    except TokenizerError as error:
        warnings.warn(f"{folder} gets no tokenizer: {error}", stacklevel=4)
    shards = _shards(tensors.tensors(config), 4 if dtype == "f32" else 2)
    names = [
        WEIGHTS if len(shards) == 1 else f"model-{n:05}-of-{len(shards):05}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    with files.replacing_in(folder, stale=_stale(folder, names)) as room:
        (room / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        for name, content in beside.items():
            (room / name).write_bytes(content)
        for name, shard in zip(names, shards, strict=True):
            _write_shard(room / name, shard, weights, dtype)
        if len(shards) > 1:
            placed = {t.hugging_face: n for n, s in zip(names, shards, strict=True) for t in s}
            total = sum(math.prod(t.shape) for shard in shards for t in shard)
            index = {
                "metadata": {"total_size": total * (4 if dtype == "f32" else 2)},
                "weight_map": placed,
            }
            (room / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
        return sum(path.stat().st_size for path in room.iterdir())


def _shards(wanted: list[Tensor], itemsize: int) -> list[list[Tensor]]:
    """Cut the list of tensors where a file would become larger than `SHARD_BYTES`."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in wanted:
        nbytes = math.prod(tensor.shape) * itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _stale(folder: Path, names: list[str]) -> list[str]:
    """Name weight files of an older save that would be taken for parts of this one."""
    found = {path.name for path in folder.glob("model-*-of-*.safetensors")} | {WEIGHTS, INDEX}
    return sorted(found - set(names) - ({INDEX} if len(names) > 1 else set()))


def _write_shard(path: Path, shard: list[Tensor], weights: Mapping[str, Array], dtype: str) -> None:
    stored = {}
    for tensor in shard:
        values = tensors.rounded(weights[tensor.name], dtype, tensor.name)
        if tensor.heads:
            values = np.ascontiguousarray(tensors.to_half_split(values, tensor.heads))
        stored[tensor.hugging_face] = values
    tensor_file.write(path, stored, dtype)
