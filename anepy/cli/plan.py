"""What `anepy train` was asked for, and what follows from it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError, DataError
from ..training import run_folder
from ..training.config import TrainConfig, config_from

if TYPE_CHECKING:
    from ..system.restart import Restart
    from ..training.checkpoint import Checkpoint, Meta

DEMO_NAME = "demo"
# The demo must show in well under a minute on two cores that something was learned, and end with
# the same loss whatever the seed and the precision: a small model, moments that forget soon, four
# sequences per update against noise, and a rate that ends at nothing.
DEMO_SETTINGS: Mapping[str, Any] = {
    "steps": 2800,
    "batch": 4,
    "accum": 1,
    "lr": 4e-3,
    "beta1": 0.8,
    "beta2": 0.95,
    "schedule": "cosine",
    "warmup": 150,
    "min_lr_ratio": 0.0,
    "grad_clip": 1.0,
    "held_out": 0.05,
    "eval_every": 700,
    "eval_windows": 500,
}
# What is done when a loss or gradient is not finite.
STOP, ROLLBACK = "stop", "rollback"
# The value that a bare --resume stands for; no file can have this name.
BARE_RESUME = "\0"


@dataclass(frozen=True)
class Request:
    """The options of `anepy train` as typed; None and False where an option was not given."""

    model: Path | None
    data: Path | None
    adapter: Path | None
    settings: Mapping[str, Any]
    resume: str | None
    checkpoint: Path | None
    no_checkpoint: bool
    checkpoint_every: int
    save: Path | None
    log: Path | None
    as_json: bool
    run: Path | None = None
    keep: int = 0
    validation: Path | None = None
    sample_every: int = 0
    prompt: str = ""
    tensorboard: Path | None = None
    wandb: str | None = None
    on_diverge: str = STOP


@dataclass
class Plan:
    """What is known before anything is loaded.

    Attributes:
        demo: the embedded model and corpus are trained.
        name: of the model, for people.
        restarted: how this process goes on with a run that an earlier one began; None if none did.
        model: file to train; None for the demo and for a resume that has only a checkpoint.
        data: token file; None for the demo.
        adapter: folder of the adapter to train on; None for a new one, or none.
        config: effective settings.
        resume: checkpoint to continue from; None if there is none.
        saved: that checkpoint, open; whoever asked for the plan closes it.
        checkpoint: where to save; None never.
        validation: tokens to evaluate on; None if they are a part of the data, or none.
        save_at_end: whether a complete run writes its checkpoint, or only an interrupted one.
        written: the checkpoint, once it has been written.
    """

    demo: bool
    name: str
    restarted: Restart | None
    model: Path | None
    data: Path | None
    adapter: Path | None
    config: TrainConfig
    resume: Path | None
    saved: Checkpoint | None
    checkpoint: Path | None
    save_at_end: bool
    validation: Path | None = None
    written: Path | None = None


def make_plan(request: Request, began: Restart | None) -> Plan:
    """Combine flags, checkpoint and defaults, in this order of precedence."""
    name = request.model.stem if request.model is not None else f"anepy-{DEMO_NAME}"
    checkpoint = request.checkpoint
    resume: Path | None = None
    if request.resume is not None:
        resume = Path(request.resume) if request.resume != BARE_RESUME else None
        if resume is None:
            resume = checkpoint if checkpoint is not None else Path(f"{name}.ckpt.npz")
        if checkpoint is None:
            checkpoint = resume
    elif checkpoint is None:
        checkpoint = Path(f"{name}.ckpt.npz")
    explicit = request.checkpoint is not None or resume is not None
    if began is not None:
        resume = Path(began.checkpoint)
    with ExitStack() as stack:
        saved = None
        if resume is not None:
            from ..training.checkpoint import Checkpoint

            saved = stack.enter_context(Checkpoint(resume))
        plan = _plan(request, began, checkpoint, explicit, saved)
        stack.pop_all()
    return plan


def _plan(
    request: Request,
    began: Restart | None,
    checkpoint: Path | None,
    explicit: bool,
    saved: Checkpoint | None,
) -> Plan:
    """Combine what was asked for with what a checkpoint says."""
    meta = saved.meta if saved is not None else None
    resume = Path(saved.path) if saved is not None else None
    settings: Mapping[str, Any] = meta.settings if meta is not None else {}
    demo = _is_demo(request, meta)
    if demo and meta is None:
        settings = DEMO_SETTINGS
    try:
        config = config_from(settings, request.settings)
        config.validate()
    except TypeError as error:
        raise CheckpointError(f"{resume}: its settings are damaged ({error})") from error
    if request.on_diverge not in (STOP, ROLLBACK):
        raise ConfigError(f"on_diverge is {request.on_diverge}, it must be {STOP} or {ROLLBACK}")
    if request.on_diverge == ROLLBACK and (request.no_checkpoint or not (explicit or not demo)):
        raise ConfigError("a rollback needs a checkpoint to go back to: name one with --checkpoint")
    if demo and (config.lora or request.adapter is not None):
        raise ConfigError("an adapter needs a model: anepy train MODEL --lora --data FILE")
    done = meta is not None and meta.step >= config.steps and "report" not in meta.run
    # One that was killed between its last checkpoint and its end has yet to write its model.
    if done and meta is not None and not (request.save or run_folder.lacks_model(request.run)):
        raise ConfigError(
            f"{resume} is at step {meta.step} of {config.steps}, there is nothing left to do: "
            "pass a larger --steps, or --save to write its model"
        )
    data = request.data
    if data is None and not demo:
        data = _known_data(request, meta)
    shown = request.model.name if request.model is not None else None
    if shown is None:
        shown = (
            DEMO_NAME if demo else Path((meta and meta.source.get("model")) or resume or "").name
        )
    return Plan(
        demo=demo,
        name=shown,
        restarted=began,
        model=request.model,
        data=data,
        adapter=request.adapter,
        config=config,
        resume=resume,
        saved=saved,
        checkpoint=None if request.no_checkpoint else checkpoint,
        save_at_end=explicit or not demo,
        validation=request.validation or _known_validation(request, meta, config),
    )


def in_folder(request: Request, began: Restart | None, check: bool = True) -> Request:
    """Return a request whose files are in the folder of its run, where nothing else was said.

    Args:
        request: what was asked for.
        began: by which process, if not by this one.
        check: whether the folder is looked at; rank 0 of several does so for all.

    Raises:
        ConfigError: the folder holds another run, or is none.
    """
    folder = request.run
    if folder is None:
        return request
    if check and folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: name a folder for the run")
    if check and run_folder.holds_run(folder) and request.resume is None and began is None:
        raise ConfigError(
            f"{folder} holds a run already: add --resume to go on with it, or name another folder"
        )
    checkpoint = request.checkpoint or folder / run_folder.CHECKPOINT
    resume = str(checkpoint) if request.resume == BARE_RESUME else request.resume
    log = request.log or folder / run_folder.LOG
    return replace(request, checkpoint=checkpoint, resume=resume, log=log)


def _known_validation(request: Request, meta: Meta | None, config: TrainConfig) -> Path | None:
    if meta is not None and meta.source.get("validation") and not config.held_out:
        return Path(str(meta.source["validation"]))
    return None


def _is_demo(request: Request, meta: Meta | None) -> bool:
    if request.model is not None or request.data is not None:
        return False
    return meta is None or bool(meta.source.get("demo"))


def _known_data(request: Request, meta: Meta | None) -> Path:
    if meta is not None and meta.source.get("data"):
        return Path(str(meta.source["data"]))
    raise DataError(
        "training needs tokens: pass --data FILE; `anepy prepare TEXT -o FILE --tokenizer T` "
        "makes one from text"
    )
