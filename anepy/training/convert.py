"""Models and checkpoints from one format to another, the state of the optimizer where both hold it.

A checkpoint is a model with more: converted to a model it leaves the rest behind. A checkpoint of
the research programs becomes one of anepy, and back, with Adam's moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError, ModelError
from ..models import research
from ..models.model import Model, ModelConfig
from ..models.views import Array
from ..system import files
from ..system.version import __version__
from . import checkpoint
from .config import TrainConfig

ENDING = ".npz"


@dataclass
class State:
    """A model, and what a run knew of it.

    Attributes:
        model: the weights.
        meta: of anepy's checkpoint; of another format, what can be said in its terms.
        adam_m: first moments by name; None if there are none.
        adam_v: second moments.
        notes: what a reader should know, one line each.
    """

    model: Model
    meta: checkpoint.Meta | None
    adam_m: Mapping[str, Array] | None
    adam_v: Mapping[str, Array] | None
    notes: list[str]


def convert(
    source: str | Path, target: str | Path, dtype: str = "f32", version: int | None = None
) -> list[str]:
    """Write a model or checkpoint in another format.

    Args:
        source: anything `Model.load` reads, or a checkpoint.
        target: `.bin`, `.gguf`, `.npz` (a checkpoint of anepy), else a Hugging Face folder.
        dtype: how weights are stored, as in `Model.save`.
        version: write a checkpoint of the research programs instead, version 2 or 4.

    Returns:
        What got lost or should be known, one line each.

    Raises:
        CheckpointError, ConfigError, ModelError: either cannot be read or written.

    Example:
        >>> convert("ane_stories110M_ckpt.bin", "run.npz")
    """
    state = read(Path(source))
    write(state, Path(target), dtype, version)
    return state.notes


def write(state: State, target: Path, dtype: str = "f32", version: int | None = None) -> None:
    """Write what was read, as `convert` says; what gets lost is added to its notes.

    Raises:
        CheckpointError, ConfigError, ModelError: it cannot be written.
    """
    stateful = version is not None or target.suffix == ENDING
    if stateful and dtype != "f32":
        raise ConfigError(f"a checkpoint holds f32, not {dtype}: leave --dtype out")
    if version is not None:
        _write_research(state, target, version)
    elif stateful:
        _write_checkpoint(state, target)
    else:
        if state.adam_m is not None:
            state.notes.append("the optimizer's moments stay behind: a model has no place for them")
        state.model.save(target, dtype)


def read(path: Path) -> State:
    """Read a model or checkpoint.

    Raises:
        CheckpointError, ModelError: it is neither, or damaged.
    """
    if path.suffix == ENDING:
        return _read_checkpoint(path)
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == research.MAGIC:
                return _read_research(path)
    return State(Model.load(path), None, None, None, [])


def _moments(model: Model) -> tuple[dict[str, Array], dict[str, Array]]:
    m, v = ({n: np.zeros_like(w) for n, w in model.weights.items()} for _ in range(2))
    return m, v


def _read_checkpoint(path: Path) -> State:
    with checkpoint.Checkpoint(path) as file:
        return _state(path, file)


def _state(path: Path, file: checkpoint.Checkpoint) -> State:
    meta = file.meta
    if meta.adapter:
        raise ModelError(
            f"checkpoint {path} holds an adapter, no model: `anepy train --resume` writes it as a "
            "folder with --save, `anepy fuse` makes a model of that"
        )
    try:
        model = Model(ModelConfig(**meta.config))
    except (TypeError, ConfigError) as error:
        raise ModelError(
            f"checkpoint {path} has a model that cannot be computed: {error}"
        ) from None
    m, v = _moments(model)
    for name in meta.frozen:
        m.pop(name, None)
        v.pop(name, None)
    gradients = {name: np.zeros_like(value) for name, value in m.items()}
    optimizer = meta.settings.get("optimizer", "adamw")
    if optimizer != "adamw":
        v = {}  # it keeps none, or not of all tensors
    if meta.settings.get("moments", "f32") == "bf16":
        halves = [
            {name: np.zeros(a.shape, np.uint16) for name, a in each.items()} for each in (m, v)
        ]
        file.load(asdict(model.config), {}, model.weights, halves[0], halves[1], gradients)
        m, v = ({name: _widened(a) for name, a in each.items()} for each in halves)
        meta.settings["moments"] = "f32"
    else:
        file.load(asdict(model.config), {}, model.weights, m, v, gradients)
    notes = []
    if meta.accumulated:
        notes.append(
            f"gradients of {meta.accumulated} steps since the last update stay behind: they are "
            "not part of the model"
        )
    if optimizer != "adamw":
        notes.append(
            f"the moments of optimizer {optimizer} stay behind: only AdamW's are converted"
        )
        return State(model, None, None, None, notes)
    return State(model, meta, m, v, notes)


def _widened(halves: npt.NDArray[np.uint16]) -> Array:
    """Return what bf16 stands for: the upper halves of float32."""
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _read_research(path: Path) -> State:
    try:
        found = research.read(path)
        model = Model(found.config)
        m, v = _moments(model)
        found.fill(model.weights, m, v)
    except OSError as error:
        raise ModelError(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    run = found.run
    settings = {"steps": run.total_steps, "seq": found.config.seq_len}
    meta = checkpoint.Meta(
        config=asdict(model.config),
        step=run.step,
        updates=run.updates,
        accumulated=0,
        sampler={"seed": 0, "index": run.step},
        settings=asdict(TrainConfig(lr=float(np.float32(run.lr)))) | settings,
        losses=[run.loss] if np.isfinite(run.loss) and run.step else [],
        scaling={"loss_scale": 1.0, "clean_steps": 0},
        anepy=__version__,
    )
    notes = []
    if run.version == 2:
        notes.append(
            "the programs of version 2 train without rotary embedding, which anepy computes: the "
            "loss will not be theirs"
        )
    return State(model, meta, m, v, notes)


def _write_checkpoint(state: State, target: Path) -> None:
    if state.meta is None:
        raise ConfigError(
            f"cannot write {target}: only a checkpoint can become a checkpoint, and this is a "
            "model; `anepy train` begins a run with it"
        )
    arrays: dict[str, Any] = dict(state.model.weights)
    for kind, moments in (("m.", state.adam_m), ("v.", state.adam_v)):
        arrays |= {f"{kind}{name}": value for name, value in (moments or {}).items()}
    fields = {**asdict(state.meta), "accumulated": 0, "counted": 0}
    checkpoint.save(target, arrays, checkpoint.Meta(**fields))


def _write_research(state: State, target: Path, version: int) -> None:
    if version not in research.VERSIONS:
        raise ConfigError(f"the research programs have versions 2 and 4, not {version}")
    meta = state.meta
    run = research.Run(
        version=version,
        step=meta.step if meta else 0,
        total_steps=int(meta.settings.get("steps", 0)) if meta else 0,
        lr=float(meta.settings.get("lr", 0.0)) if meta else 0.0,
        loss=meta.losses[-1] if meta and meta.losses else 0.0,
        updates=meta.updates if meta else 0,
    )
    if meta is None:
        state.notes.append(
            "a model has no moments: they are written as 0, as before a first update"
        )
    try:
        research.save(
            target, state.model.config, run, state.model.weights, state.adam_m, state.adam_v
        )
    except OSError as error:
        raise ModelError(files.write_failure(target, "checkpoint", error)) from error
