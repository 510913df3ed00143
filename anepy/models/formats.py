"""Models in files: which format a file is in, by its content, and which to write, by its ending."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

from ..errors import ConfigError, ModelError, TokenizerError
from ..system import files
from . import gguf, huggingface, llama2c, research, tensor_file
from .identify import HEAD_BYTES, known_as
from .model import Model, ModelConfig, PathLike
from .storages import check_storage
from .stored_tokenizer import from_json
from .tensors import Stored
from .tokenizer_formats import folder_files

DTYPES = {"bin": ("f32",), "gguf": ("f32", "f16", "bf16", "q8_0"), "folder": ("f32", "f16", "bf16")}
_READS = "anepy reads llama2.c .bin files, GGUF files and Hugging Face folders"


def load(path: PathLike, storage: str = "f32") -> Model:
    """Read a model of any format, as `Model.load` says."""
    path = Path(path)
    check_storage(storage, ("auto",))
    try:
        stored = _open(path)
        model = Model(stored.config, stored.storage if storage == "auto" else storage)
    except OSError as error:
        inside = "" if error.filename in (None, str(path)) else f"{error.filename}: "
        advice = "make it readable" if isinstance(error, PermissionError) else _READS
        raise ModelError(
            f"cannot read model {path}: {inside}{error.strerror or error}; {advice}"
        ) from None
    except ConfigError as error:
        raise ModelError(f"model {path} cannot be computed: {error}") from None
    stored.fill(model.weights)
    model.path = path
    model.tokenizer = stored.tokenizer
    return model


def _open(path: Path) -> Stored:
    if path.is_dir():
        if (path / huggingface.CONFIG).is_file():
            return huggingface.open_folder(path)
        raise ModelError(
            f"cannot read model {path}: it is a folder without {huggingface.CONFIG}; {_READS}"
        )
    if path.exists() and not path.is_file():  # a pipe would block
        raise OSError(errno.EINVAL, "it is not a regular file")
    what = known_as(path)
    if what is not None:
        raise ModelError(f"cannot read model {path}: it is {what}; {_READS}")
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(gguf.MAGIC):
        return gguf.open_file(path)
    if tensor_file.is_safetensors(head):
        if (path.parent / huggingface.CONFIG).is_file():
            return huggingface.open_folder(path.parent, path)
        raise ModelError(
            f"cannot read model {path}: it is a safetensors file without {huggingface.CONFIG} "
            "beside it, which says what the model computes; get that file too"
        )
    if head.startswith(research.MAGIC):
        return research.open_file(path)
    return llama2c.open_file(path)._replace(tokenizer=from_json(tokenizer_beside(path)))


def tokenizer_beside(path: Path) -> Path:
    """Name the file that keeps the tokenizer of a llama2.c model, which has no place for one."""
    return path.with_name(f"{path.stem}.tokenizer.json")


def _save_beside(model: Model, path: Path) -> None:
    content = None
    if model.tokenizer is not None:
        try:
            content = folder_files(model.tokenizer).get("tokenizer.json")
        except TokenizerError as error:
            warnings.warn(f"{path} gets no tokenizer beside it: {error}", stacklevel=4)
    if content is not None:
        with files.replacing(tokenizer_beside(path)) as file:
            file.write(content)


def save(model: Model, path: PathLike, dtype: str = "f32") -> int:
    """Write a model in the format of the path's ending, as `Model.save` says."""
    path = Path(path)
    kind = _check(model.config, path, dtype)
    try:
        if kind == "bin":
            _save_beside(model, path)
            return llama2c.save(path, model)
        if kind == "gguf":
            return gguf.save(path, model.config, model.weights, dtype, model.tokenizer)
        return huggingface.save(path, model.config, model.weights, dtype, model.tokenizer)
    except OSError as error:
        raise ModelError(files.write_failure(path, "model", error)) from None


def check_writable(config: ModelConfig, path: PathLike, nbytes: int = 0) -> None:
    """Check that a model can be saved later, in float32, before anything expensive starts.

    Args:
        config: its dimensions.
        path: where it will be saved.
        nbytes: expected size; free space below this is an error.

    Raises:
        ConfigError: nothing can be written there.
        ModelError: the format cannot hold such a model, or a package for it is missing.
    """
    path = Path(path)
    kind = _check(config, path, "f32")
    inside = kind == "folder" and path.is_dir()
    files.check_writable(path / huggingface.CONFIG if inside else path, "model", nbytes)


def _check(config: ModelConfig, path: Path, dtype: str) -> str:
    """Return the format of a path, "bin", "gguf" or "folder", which can hold the model."""
    kind = {".bin": "bin", ".gguf": "gguf"}.get(path.suffix.lower(), "folder")
    if path.suffix.lower() == ".safetensors":
        raise ModelError(f"cannot write model {path}: name the folder that will hold the file")
    if kind == "folder" and os.path.lexists(path) and not path.is_dir():
        raise ModelError(
            f"cannot write model {path}: it is no folder, as a path is that ends neither in "
            ".bin nor in .gguf; choose another path"
        )
    if dtype not in DTYPES[kind]:
        what = {"bin": ".bin files", "gguf": "GGUF files", "folder": "Hugging Face folders"}[kind]
        raise ModelError(
            f"cannot write model {path} as {dtype!r}: {what} hold {', '.join(DTYPES[kind])}"
        )
    try:
        {"bin": llama2c, "gguf": gguf, "folder": huggingface}[kind].check(config)
    except ModelError as error:
        raise ModelError(f"cannot write model {path}: {error}") from None
    return kind
