"""A training run as `anepy train` makes it: from the first check to the summary."""

from __future__ import annotations

import copy
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from ..bench.peaks import device_peak
from ..console.text import Header
from ..console.train import Reporter
from ..console.train import reporter as make_reporter
from ..engine.variants import gradients_lag
from ..errors import AnepyError, CheckpointError, ConfigError, DataError, DivergedError, NativeError
from ..models import formats
from ..models.freezing import trained_text
from ..models.lora import Lora
from ..models.model import Model, ModelConfig
from ..system import restart
from ..system.files import check_writable, discard_temporaries, write_failure
from ..system.interrupts import StopRequest, Uninterrupted
from ..system.owner import owned
from ..system.words import quantity
from ..text.data import TokenData, sidecar_path
from ..text.generation import generate
from ..text.tokenizer import Tokenizer
from ..text.tokenizer_stored import resolve_tokenizer
from ..training import demo, run_folder
from ..training.keeping import Keeper
from ..training.ranks import Ranks, started
from ..training.run_log import RunLog, check_log
from ..training.trackers import TensorBoard, Tracker, WandB
from ..training.trainer import Trainer
from .common import distinct, print_json
from .missing import brought
from .plan import ROLLBACK, Plan, Request, in_folder, make_plan
from .restart import go_on_elsewhere

DEMO_SAMPLE_TOKENS = 400
SAMPLE_TOKENS = 60


def run(request: Request) -> None:
    """Do what was asked for.

    Raises:
        AnepyError: of any kind, in one line.
        typer.Exit: the run was interrupted.
    """
    with ExitStack() as stack:
        ranks = started()
        if ranks is not None:
            stack.enter_context(ranks)
        first = ranks is None or ranks.first
        began = restart.pending()
        if began is not None:
            stack.callback(began.discard)
        else:
            request = brought(request)
        request = in_folder(request, began, check=first)
        plan = make_plan(request, began)
        if plan.saved is not None:
            stack.callback(plan.saved.close)
        # Model and data first: cheap checks before the library is loaded or compiled.
        trainer = stack.enter_context(_trainer(request, plan, ranks))
        if plan.saved is not None:
            plan.saved.close()  # a deleted file takes room on the disk while it is open
        if began is not None:
            began.discard()  # a later restart replaces this process without a clean-up
        if first:
            request = _prepare_folder(request, trainer)
            _check_outputs(request, plan, trainer)
            stack.enter_context(_owned(request, plan))
            sampler = _sampler(request, plan, trainer)
            reporter = make_reporter(quiet=request.as_json)
        else:  # rank 0 writes and shows
            request = replace(request, log=None, run=None, save=None, as_json=False)
            request = replace(request, tensorboard=None, wandb=None)
            sampler, reporter = None, Reporter()
        log = stack.enter_context(_log(request, plan))
        _introduce(request, plan, trainer, reporter, log)
        signal, saved = _loop(request, plan, trainer, reporter, log, sampler)
        with Uninterrupted():  # a second Ctrl-C must not hide where the run was saved
            engine = trainer.engine
            peak = device_peak(engine.device, engine.precision, engine.threads)
            summary = trainer.summary().with_peak(peak)
            log.summary(summary)
            reporter.summary(summary, saved)
        interrupted = not trainer.finished
        sample = None
        if plan.demo and not signal and first:
            sample = _sample(trainer.model, reporter)
        if log.failure is not None:
            reporter.note(f"the log {request.log} ends early: {log.failure.strerror}")
        log.close()
        for text in log.lost:
            reporter.note(text)
        if request.run is not None and os.path.isfile(request.log or ""):
            _draw(request.run, request.log, reporter)
        if request.as_json:
            print_json(
                {
                    "command": "train",
                    "model": plan.name,
                    "settings": asdict(trainer.config) | {"seq": trainer.seq},
                    "engine": _engine(trainer),
                    "notes": _notes(trainer),
                    "summary": asdict(summary),
                    "interrupted": interrupted,
                    "checkpoint": str(plan.written) if plan.written else None,
                    "saved": str(request.save) if request.save and not interrupted else None,
                    "sample": sample,
                }
            )
    if signal:
        raise typer.Exit(128 + signal)  # by the convention of shells


@contextmanager
def _trainer(request: Request, plan: Plan, ranks: Ranks | None) -> Iterator[Trainer]:
    """Load everything and close it at the end."""
    data: TokenData | Path
    if plan.demo:
        data = demo.data()
    else:
        if request.model is None and plan.saved is None:
            raise ConfigError(
                "--data needs a model: anepy train MODEL --data FILE; `anepy init` makes one"
            )
        assert plan.data is not None
        data = plan.data
    restarted = plan.restarted is not None
    lora = Lora.load(plan.adapter) if plan.adapter is not None else None
    with Trainer(
        _model(plan), data, plan.config, plan.saved, restarted, lora, plan.validation, ranks
    ) as trainer:
        if plan.demo:
            trainer.source["demo"] = True
        yield trainer


def _model(plan: Plan) -> Model | Path:
    if plan.model is not None:
        return plan.model
    if plan.saved is None:
        return demo.model(plan.config.seed)
    meta = plan.saved.meta
    if meta.adapter:  # the checkpoint holds the adapter alone
        return Path(str(meta.source.get("model", "")))
    try:
        config = ModelConfig(**meta.config)
    except TypeError as error:
        raise CheckpointError(f"{plan.resume}: its model is damaged ({error})") from error
    return Model.init(config, seed=plan.config.seed)


def _prepare_folder(request: Request, trainer: Trainer) -> Request:
    """Make the folder of a run, and say where in it the model goes."""
    if request.run is None:
        return request
    try:
        request.run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(write_failure(request.run, "the run", error)) from error
    if trainer.lora is not None:
        save = request.run / run_folder.ADAPTER
    else:
        save = run_folder.model_path(request.run, trainer.model.config)
    return replace(request, save=request.save or save)


@contextmanager
def _owned(request: Request, plan: Plan) -> Iterator[None]:
    """Keep other processes off the folder or checkpoint of this run."""
    path = request.run / "run" if request.run is not None else plan.checkpoint
    if path is None or (request.run is None and not plan.save_at_end):
        yield
        return
    path = Path(os.path.realpath(path))  # by whatever name another run has it
    what = f"the run in {request.run}" if request.run is not None else f"checkpoint {path}"
    with ExitStack() as stack:
        try:
            owner = path.with_name(f"{path.name}.owner")
            stack.enter_context(owned(owner, what, inherited=plan.restarted is not None))
        except OSError as error:
            raise CheckpointError(write_failure(path, "checkpoint", error)) from error
        yield


def _sampler(request: Request, plan: Plan, trainer: Trainer) -> Callable[[], str] | None:
    """Return what writes a little text with the model as it is; None if none was asked for."""
    if not request.sample_every:
        return None
    model = trainer.model
    if model.path is None and trainer.source.get("model"):  # resumed: its tokenizer lies there
        model.path = Path(str(trainer.source["model"]))
    tokenizer = Tokenizer.bytes() if plan.demo else resolve_tokenizer(None, model)

    def sample() -> str:
        tokens = min(SAMPLE_TOKENS, model.config.seq_len - 1)
        speaker = model if trainer.lora is None else trainer.lora.fuse(copy.copy(model))
        return generate(
            speaker, request.prompt, tokenizer, temperature=0.8, max_tokens=tokens, seed=1
        )

    return sample


def _check_outputs(request: Request, plan: Plan, trainer: Trainer) -> None:
    """Check before training that every file to be written at the end can be written."""
    outputs = {"the checkpoint": plan.checkpoint, "log": request.log}
    read = {"the data": plan.data, "the validation data": plan.validation}
    beside = {f"{what}'s .json": path and sidecar_path(path) for what, path in read.items()}
    distinct(outputs | {"the model to save": request.save}, read | beside)
    # A model may be trained in place, into the file it came from.
    distinct(outputs, {"the model": plan.model})
    if request.log is not None:
        check_log(request.log)
    if plan.checkpoint is not None and plan.save_at_end:
        check_writable(plan.checkpoint, "checkpoint", trainer.checkpoint_nbytes())
    if request.save is None:
        return
    if trainer.lora is not None:
        if request.save.suffix in (".bin", ".gguf"):
            raise ConfigError(
                f"--save {request.save}: an adapter is saved as a folder; `anepy fuse` makes a "
                "model of it"
            )
        trainer.lora.check_writable(request.save)
        return
    weights = sum(value.nbytes for value in trainer.model.weights.values())
    formats.check_writable(trainer.model.config, request.save, weights)


def _log(request: Request, plan: Plan) -> RunLog:
    trackers: list[Tracker] = []
    if request.tensorboard is not None:
        trackers.append(TensorBoard(request.tensorboard))
    if request.wandb is not None:
        named = request.run.resolve().name if request.run is not None else None
        trackers.append(WandB(request.wandb, named, request.run or Path()))
    after = plan.saved.meta.step if plan.saved is not None else None
    try:
        return RunLog(request.log, after, trackers)
    except OSError as error:
        assert request.log is not None
        raise ConfigError(write_failure(request.log, "log", error)) from error


def _draw(folder: Path, log: Path | None, reporter: Reporter) -> None:
    """Leave a picture of the run in its folder."""
    from ..comparing.run_page import write
    from ..training.runs import read

    assert log is not None
    try:
        write([replace(read(log), name=folder.resolve().name)], folder / run_folder.PLOT)
    except AnepyError as error:
        reporter.note(str(error))


def _introduce(
    request: Request, plan: Plan, trainer: Trainer, reporter: Reporter, log: RunLog
) -> None:
    weights = trainer.model.weights
    notes = _notes(trainer)
    if plan.checkpoint is not None and plan.resume is None and plan.save_at_end:
        if plan.checkpoint.exists():
            notes.append(f"{plan.checkpoint} will be replaced; --resume would continue from it")
    elif plan.checkpoint is None and request.save is None:
        notes.append("nothing will be saved: neither a checkpoint nor --save")
    data = f"{trainer.data.name}, {quantity(len(trainer.data))} tokens"
    if trainer.held_out is not None:
        data = f"{plan.data.name if plan.data else 'the demo corpus'}, "
        data += f"{quantity(len(trainer.data))} tokens, {quantity(len(trainer.held_out))} held out"
    outputs = {}
    if plan.checkpoint is not None and plan.save_at_end:
        outputs["checkpoint"] = str(plan.checkpoint)
    if request.save is not None:
        outputs["saves"] = str(request.save)
    if request.log is not None:
        outputs["log"] = str(request.log)
    if request.run is not None:
        outputs = {"folder": str(request.run)}
    settings = asdict(trainer.config) | {"seq": trainer.seq}
    header = Header(
        model=plan.name,
        shape=asdict(trainer.model.config),
        parameters=sum(value.size for value in weights.values()),
        embedding=weights["tok_embeddings.weight"].size,
        data=data,
        settings=settings,
        engine=_engine(trainer),
        flops=trainer.flops,
        trained=_trained(trainer),
        start=trainer.start_step,
        losses=list(trainer.losses),
        notes=notes,
        outputs=outputs,
    )
    if plan.restarted is not None and not trainer.notes:
        reporter.resume(header)
        return
    reporter.header(header)  # in a restarted process only if it differs from the last one
    facts = {
        "model": plan.name,
        "config": header.shape,
        "data": header.data,
        "settings": settings,
        "engine": header.engine,
        "start": header.start,
        "notes": notes,
    }
    log.run(facts, trainer.engine.device)
    if request.run is not None:
        run_folder.describe(request.run, facts | {"command": sys.argv[1:]})


def _trained(trainer: Trainer) -> str:
    """Say what is trained, if not everything."""
    weights, moments = trainer.model.weights, trainer.engine.adam_m
    if trainer.lora is not None:
        parameters, lora = quantity(trainer.lora.arena.size), trainer.lora
        return f"LoRA of rank {lora.rank} on {', '.join(lora.targets)}: {parameters} parameters"
    if not trainer.engine.frozen:
        return ""
    total, left = (sum(value.size for value in each.values()) for each in (weights, moments))
    return f"{trained_text(len(weights), len(moments), total, left)} trained"


def _engine(trainer: Trainer) -> dict[str, Any]:
    engine = trainer.engine
    return trainer.engine_settings() | {
        "precision_note": engine.precision_note,
        "gradients_lag": gradients_lag(engine.switches),
    }


def _notes(trainer: Trainer) -> list[str]:
    chosen = (trainer.ranks_note, trainer.engine.device_note)
    return [*(text for text in chosen if text), *trainer.notes]


def _loop(
    request: Request,
    plan: Plan,
    trainer: Trainer,
    reporter: Reporter,
    log: RunLog,
    sampler: Callable[[], str] | None,
) -> tuple[int, list[str]]:
    """Train until the end or a signal, then save; nothing after this can lose the run.

    Returns:
        The signal that stopped it, 0 if none did, and what was written, in words.
    """

    def abort() -> None:
        discard_temporaries()
        reporter.abort(keeper.told)

    saved: list[str] = []
    failure: NativeError | None = None
    lost: CheckpointError | None = None
    with (
        StopRequest(reporter.stopping, abort) as stop,
        Keeper(
            plan.checkpoint,
            request.checkpoint_every,
            request.keep,
            best=request.run is not None or request.keep > 0,
            good=plan.resume,
        ) as keeper,
    ):
        restart.unblock_signals()
        trainer.asked = lambda: stop.signal or 0

        def train() -> None:
            for report in trainer:
                reporter.step(report)
                log.step(report)
                if trainer.stopped:
                    break
                for text in keeper.after(trainer, report):
                    reporter.note(text)
                if keeper.written:
                    plan.written = plan.checkpoint
                if sampler is not None and report.step % request.sample_every == 0:
                    text = sampler()
                    reporter.sample(request.prompt, text)
                    log.sample(report.step, request.prompt, text)
            trainer.check()

        try:
            reporter.start()
            rolling = request.on_diverge == ROLLBACK
            for text in keeper.begin(trainer, rolling) if plan.save_at_end else ():
                reporter.note(text)
            while True:
                try:
                    train()
                    break
                except DivergedError as error:
                    told = ""
                    if rolling and not trainer.stopped:
                        told = keeper.roll_back(trainer)
                    if not told:
                        raise
                    reporter.note(f"{error}; {told}")
                    log.rollback(trainer.steps_done, str(error))
        except (DivergedError, DataError) as error:
            if isinstance(error, DataError) and trainer.ranks is not None:
                raise  # of one rank: no checkpoint can be made without the others
            raise type(error)(f"{error}{_rescued(plan, trainer, keeper)}") from error
        except NativeError as error:
            if not trainer.engine.stale:
                raise
            failure = error
        finally:
            reporter.stop(erase=failure is not None)
        if failure is not None and stop.signal is None:
            if trainer.ranks is not None:
                raise _no_new_process(plan, trainer, failure)
            go_on_elsewhere(plan, trainer, reporter, log, failure, stop)
        complete, signal = trainer.finished, trainer.stopped
        if trainer.ended:
            saved.append(f"ended after step {trainer.steps_done}: {trainer.ended}")
        there = trainer.start_step == trainer.steps_done and plan.checkpoint == plan.resume
        if plan.checkpoint is not None and not there and (plan.save_at_end or not complete):
            try:
                nbytes = keeper.save(trainer)
                plan.written = plan.checkpoint
                saved.append(f"checkpoint saved: {plan.checkpoint} ({nbytes / 1e6:.1f} MB)")
            except CheckpointError as error:
                lost = error
        if complete and request.save is not None:
            saved.append(_save(trainer, request.save))
    if lost is not None:
        raise CheckpointError(" ".join([f"{lost};", *saved]).rstrip(";")) from lost
    if not complete:
        of = "" if trainer.config.endless else f" of {trainer.config.steps}"
        done = f"interrupted after step {trainer.steps_done}{of}"
        if plan.written is not None:
            saved += [f"{done}; continue with:", f"  {_continue_command(request, plan)}"]
        else:
            saved.append(f"{done}; nothing was saved (--no-checkpoint)")
    return signal, saved


def _no_new_process(plan: Plan, trainer: Trainer, failure: NativeError) -> NativeError:
    """Save the run of ranks that may compile no more: MPI replaces no processes."""
    text = f"{failure.detail}; an MPI job cannot go on in new processes"
    if plan.checkpoint is not None:
        trainer.save_checkpoint(plan.checkpoint)
        text += f": the run is in {plan.checkpoint}, start it again with --resume"
    return type(failure)(failure.code, failure.name, text)


def _save(trainer: Trainer, path: Path) -> str:
    """Write what was trained; say what it is."""
    if trainer.lora is None:
        trainer.model.save(path)
        return f"model saved: {path}"
    base = str(trainer.source.get("model", ""))
    trainer.lora.save(path, base if os.path.isdir(base) else None)
    return f"adapter saved: {path}"


def _rescued(plan: Plan, trainer: Trainer, keeper: Keeper) -> str:
    """Save what is good of a run that cannot go on; say where it is."""
    if plan.checkpoint is None or not plan.save_at_end:
        return ""
    try:
        return f"; {keeper.give_up(trainer)}"
    except DivergedError:
        return "; these weights are not saved"
    except CheckpointError as error:
        return f"; {error}"


def _continue_command(request: Request, plan: Plan) -> str:
    words = ["anepy train"]
    words += [_quoted(plan.model)] if plan.model is not None else []
    if request.run is not None:
        words += ["--run", _quoted(request.run), "--resume"]
    else:
        words += ["--resume", _quoted(plan.written or Path())]
    return " ".join(words)


def _quoted(path: Path) -> str:
    return shlex.quote(os.fspath(path))


def _sample(model: Model, reporter: Reporter) -> str:
    text = generate(
        model,
        demo.PROMPT,
        tokenizer=Tokenizer.bytes(),
        temperature=0.5,
        max_tokens=DEMO_SAMPLE_TOKENS,
        seed=1,
    )
    reporter.sample(demo.PROMPT, text)
    return text
