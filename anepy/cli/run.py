"""A training run as `anepy train` makes it: from the first check to the summary."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ..bench.peaks import device_peak
from ..console.text import Header
from ..console.train import Reporter
from ..console.train import reporter as make_reporter
from ..engine.variants import gradients_lag
from ..errors import CheckpointError, ConfigError, NativeError
from ..models import formats
from ..models.freezing import trained_text
from ..models.lora import Lora
from ..models.model import Model, ModelConfig
from ..system import restart
from ..system.files import check_writable, discard_temporaries, write_failure
from ..system.interrupts import StopRequest
from ..system.words import quantity
from ..text.data import TokenData
from ..text.generation import generate
from ..text.tokenizer import Tokenizer
from ..training import demo
from ..training.run_log import RunLog
from ..training.trainer import Trainer
from .common import distinct, print_json
from .missing import brought
from .plan import Plan, Request, make_plan
from .restart import go_on_elsewhere

DEMO_SAMPLE_TOKENS = 400


def run(request: Request) -> None:
    """Do what was asked for.

    Raises:
        AnepyError: of any kind, in one line.
        typer.Exit: the run was interrupted.
    """
    with ExitStack() as stack:
        began = restart.pending()
        if began is not None:
            stack.callback(began.discard)
        else:
            request = brought(request)
        plan = make_plan(request, began)
        # Model and data first: cheap checks before the library is loaded or compiled.
        trainer = stack.enter_context(_trainer(request, plan))
        if began is not None:
            began.discard()  # a later restart replaces this process without a clean-up
        _check_outputs(request, plan, trainer)
        reporter = make_reporter(quiet=request.as_json)
        log = stack.enter_context(_log(request, plan))
        _introduce(request, plan, trainer, reporter, log)
        stop, saved = _loop(request, plan, trainer, reporter, log)
        engine = trainer.engine
        peak = device_peak(engine.device, engine.precision, engine.threads)
        summary = trainer.summary().with_peak(peak)
        log.summary(summary)
        reporter.summary(summary, saved)
        interrupted = trainer.steps_done < trainer.config.steps
        sample = None
        if plan.demo and stop.signal is None:
            sample = _sample(trainer.model, reporter)
        if log.failure is not None:
            reporter.note(f"the log {request.log} ends early: {log.failure.strerror}")
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
    if stop.signal is not None:
        raise typer.Exit(stop.exit_code)


@contextmanager
def _trainer(request: Request, plan: Plan) -> Iterator[Trainer]:
    """Load everything and close it at the end."""
    data: TokenData | Path
    if plan.demo:
        data = demo.data()
    else:
        if request.model is None and plan.meta is None:
            raise ConfigError(
                "--data needs a model: anepy train MODEL --data FILE; `anepy init` makes one"
            )
        assert plan.data is not None
        data = plan.data
    restarted = plan.restarted is not None
    lora = Lora.load(plan.adapter) if plan.adapter is not None else None
    with Trainer(_model(plan), data, plan.config, plan.resume, restarted, lora) as trainer:
        if plan.demo:
            trainer.source["demo"] = True
        yield trainer


def _model(plan: Plan) -> Model | Path:
    if plan.model is not None:
        return plan.model
    if plan.meta is None:
        return demo.model(plan.config.seed)
    if plan.meta.adapter:  # the checkpoint holds the adapter alone
        return Path(str(plan.meta.source.get("model", "")))
    try:
        config = ModelConfig(**plan.meta.config)
    except TypeError as error:
        raise CheckpointError(f"{plan.resume}: its model is damaged ({error})") from error
    return Model.init(config, seed=plan.config.seed)


def _check_outputs(request: Request, plan: Plan, trainer: Trainer) -> None:
    """Check before training that every file to be written at the end can be written."""
    distinct(
        {"the checkpoint": plan.checkpoint, "the model to save": request.save, "log": request.log},
        {"the data": plan.data},
    )
    if plan.model is not None and plan.checkpoint is not None:
        distinct({"the checkpoint": plan.checkpoint}, {"the model": plan.model})
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
    try:
        return RunLog(request.log, append=plan.resume is not None)
    except OSError as error:
        assert request.log is not None
        raise ConfigError(write_failure(request.log, "log", error)) from error


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
    chosen = trainer.engine.device_note
    return [*([chosen] if chosen else []), *trainer.notes]


def _loop(
    request: Request, plan: Plan, trainer: Trainer, reporter: Reporter, log: RunLog
) -> tuple[StopRequest, list[str]]:
    """Train until the end or a signal, then save; nothing after this can lose the run.

    Returns:
        Whether and how it was stopped, and what was written, in words.
    """

    def abort() -> None:
        discard_temporaries()
        reporter.abort()

    saved: list[str] = []
    failure: NativeError | None = None
    with StopRequest(reporter.stopping, abort) as stop:
        restart.unblock_signals()
        try:
            reporter.start()
            for report in trainer:
                reporter.step(report)
                log.step(report)
                if stop.signal is not None:
                    break
                every = request.checkpoint_every
                if every and report.step % every == 0 and plan.checkpoint is not None:
                    trainer.save_checkpoint(plan.checkpoint)
                    plan.written = plan.checkpoint
        except NativeError as error:
            if not trainer.engine.stale:
                raise
            failure = error
        finally:
            reporter.stop(erase=failure is not None)
        if failure is not None and stop.signal is None:
            go_on_elsewhere(plan, trainer, reporter, log, failure, stop)
        complete = trainer.steps_done >= trainer.config.steps
        if plan.checkpoint is not None and (plan.save_at_end or not complete):
            nbytes = trainer.save_checkpoint(plan.checkpoint)
            plan.written = plan.checkpoint
            saved.append(f"checkpoint saved: {plan.checkpoint} ({nbytes / 1e6:.1f} MB)")
        if complete and request.save is not None:
            saved.append(_save(trainer, request.save))
    if not complete:
        done = f"interrupted after step {trainer.steps_done} of {trainer.config.steps}"
        if plan.written is not None:
            saved += [f"{done}; continue with:", f"  {_continue_command(plan)}"]
        else:
            saved.append(f"{done}; nothing was saved (--no-checkpoint)")
    return stop, saved


def _save(trainer: Trainer, path: Path) -> str:
    """Write what was trained; say what it is."""
    if trainer.lora is None:
        trainer.model.save(path)
        return f"model saved: {path}"
    base = str(trainer.source.get("model", ""))
    trainer.lora.save(path, base if os.path.isdir(base) else None)
    return f"adapter saved: {path}"


def _continue_command(plan: Plan) -> str:
    words = ["anepy train"]
    words += [_quoted(plan.model)] if plan.model is not None else []
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
