"""Checkpoints: one `.npz` file with everything a run needs to continue bit for bit.

Arrays are named as the weights, or as those of the adapter where that alone is trained; Adam's
moments are `m.<name>` and `v.<name>`, of tensors that are not frozen; `grad.<name>` is there only
if gradients were accumulated when it was saved. `meta` is a JSON text in a 0-d unicode array.
`numpy.load` reads all of it. A file appears under its name only when it is complete: it is written
to a temporary file in the same folder, synced, then renamed. Its last bytes, the archive's comment,
are a checksum of all others.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError
from ..models.model import ModelConfig
from ..system.files import parsed, replacing, write_failure
from .run_folder import previous_path

FORMAT = 2
_READ = (1, FORMAT)  # 1 has no `counted`: its accumulated steps all had equally many targets
_CHUNK = 1 << 20
_META_LIMIT = 1 << 26
_CHECKSUM = b"anepy crc32 "  # and eight hexadecimal digits, of all bytes before these
_DIGITS = 8
_DIRECTORY_END = 22  # bytes that end an archive without a comment
_NPY: Any = np.lib.format  # typed in newer versions of numpy only


@dataclass(frozen=True)
class Meta:
    """Everything in a checkpoint that is not an array.

    Attributes:
        config: dimensions of the model (the fields of `ModelConfig`).
        step: steps done.
        updates: optimizer updates done (Adam's t).
        accumulated: steps whose gradients wait in `grad.*` for the next update.
        counted: targets counted in those steps; 0 in files of format 1.
        sampler: state of the data sampler.
        settings: effective `TrainConfig` of the run.
        source: where model, data and tokenizer came from, for a resume that names none.
        engine: device, precision, variant, instruction set and threads that were used.
        losses: the last losses, oldest first.
        scaling: `unit` of the gradients; loss scale and clean steps (fp16).
        frozen: names of the tensors that are not trained, in the order of the model.
        adapter: of a run that trains an adapter only: `rank`, `alpha`, `targets`, and `base`, the
            checksum of the weights of the model that it is added to; else empty.
        run: what the next process of the same run needs (restart.py), and a report not yet given.
        anepy: version that wrote the file.
        format: version of this layout.
    """

    config: dict[str, Any]
    step: int
    updates: int
    accumulated: int
    sampler: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    scaling: dict[str, Any] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    adapter: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    counted: int = 0
    anepy: str = ""
    format: int = FORMAT


def save(
    path: str | Path, arrays: Mapping[str, npt.NDArray[Any]], meta: Meta, keep: bool = False
) -> int:
    """Write a checkpoint so that either the old or the complete new file is there.

    Args:
        path: the file to write; an existing regular file is replaced.
        arrays: name -> float32 array, C-contiguous, any shape.
        meta: everything else.
        keep: the file that is replaced stays as `NAME-previous.npz`.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: it could not be written; the old file, if any, is unchanged.
    """
    text = json.dumps(asdict(meta))
    try:
        with replacing(path, _before(path) if keep else None) as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                archive.comment = _CHECKSUM + b"0" * _DIGITS
                _write_member(archive, "meta", np.array(text))
                for name, array in arrays.items():
                    _write_member(archive, name, array)
            nbytes = file.tell()
            checksum = _crc32(file, nbytes - _DIGITS)
            file.seek(nbytes - _DIGITS)
            file.write(b"%08x" % checksum)
            return nbytes
    except OSError as error:
        raise CheckpointError(write_failure(path, "checkpoint", error)) from error


def read_meta(path: str | Path) -> Meta:
    """Read what a checkpoint says about its run, without its arrays.

    Raises:
        CheckpointError: missing, truncated, or not a checkpoint of anepy.
    """
    with Checkpoint(path, whole=False) as file:
        return file.meta


class Checkpoint:
    """A checkpoint that is open: whatever takes its name meanwhile, all is read from one file.

    Args:
        path: the file.
        whole: read every byte and compare the checksum.

    Attributes:
        path: the file.
        meta: what it says about its run.

    Raises:
        CheckpointError: missing, truncated, damaged, or not a checkpoint of anepy; the message
            names the one before it if that is whole.
    """

    def __init__(self, path: str | Path, whole: bool = True) -> None:
        self.path = path
        with _told(path), contextlib.ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            self._sealed = whole and _verify(path, file)
            self._archive = stack.enter_context(zipfile.ZipFile(file))
            self.meta = _read_meta(path, self._archive)
            self._open = stack.pop_all()

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._open.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(
        self,
        config: Mapping[str, Any],
        adapter: Mapping[str, Any],
        weights: Mapping[str, npt.NDArray[Any]],
        adam_m: Mapping[str, npt.NDArray[Any]],
        adam_v: Mapping[str, npt.NDArray[Any]],
        gradients: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        """Copy it into existing arrays, array by array.

        Everything is checked first, checksums included: a bad file changes nothing.

        Args:
            config: dimensions of the model that is to receive it.
            adapter: as `Meta.adapter` for this run.
            weights: name -> float32 array, C-contiguous; overwritten, as are the next two.
            adam_m: first moments, of all names that are not frozen.
            adam_v: second moments, of those too.
            gradients: accumulated gradients, of those too; set to zero if the file has none.

        Raises:
            CheckpointError: the file is bad, or of a model of other dimensions or frozen tensors,
                or of another adapter.
        """
        meta, path, archive = self.meta, self.path, self._archive
        targets = {name: array for name, array in weights.items()}
        targets |= {f"m.{name}": array for name, array in adam_m.items()}
        targets |= {f"v.{name}": array for name, array in adam_v.items()}
        with _told(path):
            _check_config(path, meta.config, config)
            _check_adapter(path, meta.adapter, adapter)
            _check_frozen(path, meta.frozen, [name for name in weights if name not in adam_m])
            if meta.accumulated:
                targets |= {f"grad.{name}": array for name, array in gradients.items()}
            for name, array in targets.items():
                _check_member(path, archive, name, array, self._sealed)
            for name, array in targets.items():
                _read_member(archive, name, array)
        if not meta.accumulated:
            for array in gradients.values():
                array[...] = 0.0


def _write_member(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        _NPY.write_array(member, array, allow_pickle=False)


def _crc32(file: BinaryIO, nbytes: int) -> int:
    """Return the checksum of the first bytes of a file."""
    file.seek(0)
    checksum = 0
    while nbytes and (chunk := file.read(min(nbytes, _CHUNK))):
        checksum = zlib.crc32(chunk, checksum)
        nbytes -= len(chunk)
    return checksum


def _verify(path: str | Path, file: BinaryIO) -> bool:
    """Compare the checksum of a file; return whether it has one, which copies by numpy lack.

    Raises:
        BadZipFile: it differs, or its place holds something else.
    """
    nbytes = file.seek(0, os.SEEK_END)
    file.seek(max(0, nbytes - _DIRECTORY_END))
    end = file.read()
    if end.startswith(b"PK\5\6") and end.endswith(b"\0\0"):
        return False
    kept, digits = end[-_DIGITS - len(_CHECKSUM) : -_DIGITS], end[-_DIGITS:]
    if kept != _CHECKSUM or b"%08x" % _crc32(file, nbytes - _DIGITS) != digits:
        raise zipfile.BadZipFile("its checksum is wrong")
    return True


@contextlib.contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong while a checkpoint is read into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        hint = _previous(path) or "; check the path"
        raise CheckpointError(f"{path}: no such checkpoint{hint}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}") from error
    except Exception as error:  # zipfile and numpy raise what they stumble over
        detail = " ".join(str(error).split())[:120]
        hint = _previous(path) or "; use another one"
        raise CheckpointError(
            f"{path}: truncated, damaged or not a checkpoint ({detail}){hint}"
        ) from error


def _before(path: str | Path) -> Path:
    """Return where the checkpoint before one is: beside the file, not beside a link to it."""
    return previous_path(Path(os.path.realpath(path)))


def _previous(path: str | Path) -> str:
    """Say where the checkpoint before a bad one is; empty if there is none that is whole."""
    other = _before(path)
    if not other.is_file():
        return ""
    try:
        with Checkpoint(other) as file:
            return f"; the one before it, of step {file.meta.step}, is whole: resume from {other}"
    except CheckpointError:
        return ""


def _read_meta(path: str | Path, archive: zipfile.ZipFile) -> Meta:
    try:
        info = archive.getinfo("meta.npy")
    except KeyError:
        raise CheckpointError(
            f"{path}: not a checkpoint of anepy, it has no 'meta'; pass one that anepy saved"
        ) from None
    if info.file_size > _META_LIMIT:
        raise CheckpointError(f"{path}: its 'meta' has {info.file_size} bytes; not a checkpoint")
    with archive.open(info) as member:
        text = _NPY.read_array(member, allow_pickle=False)
    if text.shape != () or text.dtype.kind != "U":
        raise CheckpointError(f"{path}: its 'meta' is not a text; not a checkpoint of anepy")
    try:
        values = parsed(str(text))
    except ValueError as error:
        raise CheckpointError(f"{path}: its 'meta' is not JSON ({error})") from error
    return _meta_from(path, values)


def _meta_from(path: str | Path, values: Any) -> Meta:
    if not isinstance(values, dict) or not isinstance(values.get("format"), int):
        raise CheckpointError(f"{path}: its 'meta' names no format; not a checkpoint of anepy")
    if values["format"] not in _READ:
        raise CheckpointError(
            f"{path}: checkpoint format {values['format']} of anepy {values.get('anepy', '?')}, "
            f"this version reads formats up to {FORMAT}; use that version of anepy"
        )
    known = Meta.__dataclass_fields__
    for name in ("step", "updates", "accumulated", "counted"):
        value = values.get(name, 0 if name == "counted" and values["format"] == 1 else None)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
            raise CheckpointError(f"{path}: '{name}' in 'meta' is {value!r}, not a count")
    for name in ("config", "sampler", "settings", "source", "engine"):
        if not isinstance(values.get(name), dict):
            raise CheckpointError(f"{path}: '{name}' is missing in 'meta'; the file is damaged")
    if not _is_scaling(values.get("scaling")):
        raise CheckpointError(f"{path}: 'scaling' in 'meta' is damaged; take another checkpoint")
    for name in ("run", "adapter"):
        if not isinstance(values.get(name, {}), dict):
            raise CheckpointError(f"{path}: '{name}' in 'meta' is damaged; take another checkpoint")
    frozen = values.get("frozen", [])
    if not isinstance(frozen, list) or not all(isinstance(x, str) for x in frozen):
        raise CheckpointError(f"{path}: 'frozen' in 'meta' are no names; the file is damaged")
    losses = values.get("losses")
    if not isinstance(losses, list) or not all(isinstance(x, (int, float)) for x in losses):
        raise CheckpointError(f"{path}: 'losses' in 'meta' are no numbers; the file is damaged")
    return Meta(**{name: value for name, value in values.items() if name in known})


def _is_scaling(values: Any) -> bool:
    """Say whether a value is what the engine can restore its loss scale from."""
    if not isinstance(values, dict) or not values.keys() <= {"loss_scale", "clean_steps", "unit"}:
        return False
    if not all(type(x) in (int, float) and 0 <= x < 1 << 62 for x in values.values()):
        return False
    steps = values.get("clean_steps", 0)
    return type(steps) is int and steps < 1 << 31


def _check_config(path: str | Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    # Older checkpoints lack fields that ModelConfig got later: they have the defaults.
    saved = {name: getattr(ModelConfig, name, None) for name in wanted} | dict(saved)
    differences = [
        f"{name} {saved[name]} instead of {value}"
        for name, value in wanted.items()
        if saved[name] != value
    ]
    if differences:
        raise CheckpointError(
            f"{path} belongs to another model: {', '.join(differences)}; pass the model it is from"
        )


def _check_adapter(path: str | Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if bool(saved) != bool(wanted):
        what = ("an adapter", "a model") if saved else ("a model", "an adapter")
        raise CheckpointError(
            f"{path} is of a run that trains {what[0]}, this one trains {what[1]}; "
            f"{'add' if saved else 'leave out'} --lora"
        )
    for name, value in wanted.items():
        if saved.get(name) == value:
            continue
        if name == "base":
            raise CheckpointError(f"{path} is of an adapter to a model with other weights; pass it")
        raise CheckpointError(f"{path} is of an adapter with {name} {saved.get(name)}, not {value}")


def _check_frozen(path: str | Path, saved: Sequence[str], wanted: Sequence[str]) -> None:
    if set(saved) != set(wanted):
        raise CheckpointError(
            f"{path} is of a run with {_frozen_text(saved)}, this one has {_frozen_text(wanted)}: "
            "freeze the same tensors"
        )


def _frozen_text(names: Sequence[str]) -> str:
    if len(names) <= 2:
        return f"{' and '.join(names) or 'no tensor'} frozen"
    return f"{names[0]} and {len(names) - 1} more frozen"


def _check_member(
    path: str | Path,
    archive: zipfile.ZipFile,
    name: str,
    array: npt.NDArray[Any],
    sealed: bool,
) -> None:
    """Check presence, type, shape and size of one array against its destination.

    Where the checksum of the file is known to be right (`sealed`) its bytes need no second look.
    """
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        raise CheckpointError(f"{path}: array '{name}' is missing; use another file") from None
    with archive.open(info) as member:
        shape, fortran, dtype = _read_header(member)
        if dtype != array.dtype or shape != array.shape or (fortran and len(shape) > 1):
            order = " in column order" if fortran and len(shape) > 1 else ""
            raise CheckpointError(
                f"{path}: array '{name}' is {dtype} {list(shape)}{order}, "
                f"expected {array.dtype} {list(array.shape)}; use another file"
            )
        nbytes = info.file_size - member.tell() if sealed else 0
        while not sealed and (chunk := member.read(_CHUNK)):
            nbytes += len(chunk)  # zipfile compares its checksum when the last byte was read
    if nbytes != array.nbytes:
        raise CheckpointError(
            f"{path}: array '{name}' has {nbytes} bytes, expected {array.nbytes}; use another file"
        )


def _read_member(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    out = array.data.cast("B")
    with archive.open(f"{name}.npy") as member:
        _read_header(member)
        position = 0
        while chunk := member.read(_CHUNK):
            out[position : position + len(chunk)] = chunk
            position += len(chunk)


def _read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = _NPY.read_magic(member)
    read = _NPY.read_array_header_1_0 if version == (1, 0) else _NPY.read_array_header_2_0
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(member)
    return header
