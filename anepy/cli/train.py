"""`anepy train`: options, and the run they describe from the first check to the summary."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import CheckpointError, ConfigError, NativeError
from ..training.config import TrainConfig, setting_help
from .common import distinct, guarded, one_of, print_json
from .plan import BARE_RESUME, Plan, Request, make_plan

if TYPE_CHECKING:
    from ..console.train import Reporter
    from ..models.model import Model
    from ..system.interrupts import StopRequest
    from ..text.data import TokenData
    from ..training.run_log import RunLog
    from ..training.trainer import Trainer

DEMO_SAMPLE_TOKENS = 400


class TrainCommand(TyperCommand):
    """Accept `--resume` bare, as the research programs have it, and with a file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give a bare `--resume` its value; the word after it is a file unless a model."""
        words: list[str] = []
        for position, word in enumerate(args):
            words.append(word)
            following = args[position + 1] if position + 1 < len(args) else "-"
            if word == "--resume" and (following.startswith("-") or following.endswith(".bin")):
                words.append(BARE_RESUME)
            elif word == "--":
                words.extend(args[position + 1 :])
                break
        parsed: list[str] = super().parse_args(ctx, words)
        return parsed


def _option(name: str, *spellings: str, **more: Any) -> Any:
    return typer.Option(*spellings, help=setting_help(name), show_default=False, **more)


@guarded
def train(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="MODEL.bin", help="llama2.c model; none trains the demo."),
    ] = None,
    model_option: Annotated[
        Path | None, typer.Option("--model", metavar="FILE", help="The same as the argument.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Token file, uint16 or uint32 (anepy prepare)."),
    ] = None,
    steps: Annotated[int | None, _option("steps")] = None,
    seq: Annotated[int | None, _option("seq")] = None,
    batch: Annotated[int | None, _option("batch")] = None,
    accum: Annotated[int | None, _option("accum")] = None,
    lr: Annotated[float | None, _option("lr")] = None,
    schedule: Annotated[str | None, _option("schedule")] = None,
    warmup: Annotated[int | None, _option("warmup")] = None,
    min_lr_ratio: Annotated[float | None, _option("min_lr_ratio")] = None,
    beta1: Annotated[float | None, _option("beta1")] = None,
    beta2: Annotated[float | None, _option("beta2")] = None,
    eps: Annotated[float | None, _option("eps")] = None,
    weight_decay: Annotated[float | None, _option("weight_decay")] = None,
    grad_clip: Annotated[float | None, _option("grad_clip", "--grad-clip", "--clip")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    held_out: Annotated[float | None, _option("held_out")] = None,
    eval_every: Annotated[int | None, _option("eval_every")] = None,
    eval_windows: Annotated[int | None, _option("eval_windows")] = None,
    variant: Annotated[str | None, _option("variant")] = None,
    device: Annotated[str | None, _option("device")] = None,
    precision: Annotated[str | None, _option("precision")] = None,
    threads: Annotated[int | None, _option("threads")] = None,
    metal: Annotated[bool, _option("metal", "--metal")] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[FILE.npz]",
            help="Continue from this checkpoint; without a file, from --checkpoint.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            "--ckpt",
            metavar="FILE.npz",
            help="Where the run is saved, at its end and on Ctrl-C. Default: MODEL.ckpt.npz here.",
        ),
    ] = None,
    no_checkpoint: Annotated[
        bool, typer.Option("--no-checkpoint", help="Save no checkpoint, not even on Ctrl-C.")
    ] = False,
    checkpoint_every: Annotated[
        int,
        typer.Option(min=0, metavar="STEPS", help="Save it this often too.", show_default=False),
    ] = 0,
    save: Annotated[
        Path | None,
        typer.Option(metavar="MODEL.bin", help="Write the trained model, in llama2.c's format."),
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Write one JSON record per event.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, nothing else.")
    ] = False,
) -> None:
    """Train a model; with no model, the embedded demo.

    Ctrl-C finishes the step, saves the checkpoint and says how to continue. The demo has its own
    steps, accumulation, learning rate and schedule.
    """
    given = {
        name: value
        for name, value in locals().items()
        if name in TrainConfig.__dataclass_fields__ and value is not None
    }
    if not metal:
        del given["metal"]
    request = Request(
        model=one_of(model, model_option, "model"),
        data=data,
        settings=given,
        resume=resume,
        checkpoint=checkpoint,
        no_checkpoint=no_checkpoint,
        checkpoint_every=checkpoint_every,
        save=save,
        log=log,
        as_json=as_json,
    )
    if checkpoint is not None and no_checkpoint:
        raise typer.BadParameter("--checkpoint and --no-checkpoint contradict each other")
    run(request)


def run(request: Request) -> None:
    """Do what was asked for.

    Raises:
        AnepyError: of any kind, in one line.
        typer.Exit: the run was interrupted.
    """
    from ..system import restart

    with ExitStack() as stack:
        began = restart.pending()
        if began is not None:
            stack.callback(began.discard)
        plan = make_plan(request, began)
        # Model and data first: cheap checks before the library is loaded or compiled.
        trainer = stack.enter_context(_trainer(request, plan))
        if began is not None:
            began.discard()  # now: the next restart leaves no time for it
        _check_outputs(request, plan, trainer)
        from ..console.train import reporter as make_reporter

        reporter = make_reporter(quiet=request.as_json)
        log = stack.enter_context(_log(request, plan))
        _introduce(request, plan, trainer, reporter, log)
        stop, saved = _loop(request, plan, trainer, reporter, log)
        engine = trainer.engine
        summary = trainer.summary().with_peak(engine.device, engine.precision, engine.threads)
        log.summary(summary)
        reporter.summary(summary, saved)
        interrupted = trainer.step < trainer.config.steps
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
                    "engine": trainer.engine_settings(),
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
    from ..training.trainer import Trainer

    data: TokenData | Path
    if plan.demo:
        from ..training import demo

        data = demo.data()
    else:
        if request.model is None and plan.meta is None:
            raise ConfigError(
                "--data needs a model: anepy train MODEL.bin --data FILE; `anepy init` makes one"
            )
        assert plan.data is not None
        data = plan.data
    restarted = plan.restarted is not None
    with Trainer(_model(plan), data, plan.config, plan.resume, restarted) as trainer:
        if plan.demo:
            trainer.source["demo"] = True
        yield trainer


def _model(plan: Plan) -> Model | Path:
    if plan.model is not None:
        return plan.model
    if plan.meta is None:
        from ..training import demo

        return demo.model(plan.config.seed)
    from ..models.model import Model, ModelConfig

    try:
        config = ModelConfig(**plan.meta.config)
    except TypeError as error:
        raise CheckpointError(f"{plan.resume}: its model is damaged ({error})") from error
    return Model.init(config, seed=plan.config.seed)


def _check_outputs(request: Request, plan: Plan, trainer: Trainer) -> None:
    """Find out now what could not be written in the end."""
    from ..system.files import check_writable

    distinct(
        {"the checkpoint": plan.checkpoint, "the model to save": request.save, "log": request.log},
        {"the data": plan.data},
    )
    if plan.model is not None and plan.checkpoint is not None:
        distinct({"the checkpoint": plan.checkpoint}, {"the model": plan.model})
    if plan.checkpoint is not None and plan.save_at_end:
        check_writable(plan.checkpoint, "checkpoint", trainer.checkpoint_nbytes())
    if request.save is not None:
        weights = sum(value.nbytes for value in trainer.model.weights.values())
        check_writable(request.save, "model", weights)


def _log(request: Request, plan: Plan) -> RunLog:
    from ..training.run_log import RunLog

    try:
        return RunLog(request.log, append=plan.resume is not None)
    except OSError as error:
        from ..system.files import write_failure

        assert request.log is not None
        raise ConfigError(write_failure(request.log, "log", error)) from error


def _introduce(
    request: Request, plan: Plan, trainer: Trainer, reporter: Reporter, log: RunLog
) -> None:
    from ..console.text import Header
    from ..engine.flops import flops_per_step
    from ..system.words import quantity

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
        engine=trainer.engine_settings(),
        flops=flops_per_step(trainer.model.config, trainer.seq, trainer.config.batch),
        start=trainer.start_step,
        losses=list(trainer.losses),
        notes=notes,
        outputs=outputs,
    )
    if plan.restarted is not None and not trainer.notes:
        reporter.resume(header)
        return
    reporter.header(header)  # also for a next process that differs from the last one
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
    from ..system.files import discard_temporaries
    from ..system.interrupts import StopRequest

    def abort() -> None:
        discard_temporaries()
        reporter.abort()

    from ..system import restart
    from . import restart as cli_restart

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
            cli_restart.go_on_elsewhere(plan, trainer, reporter, log, failure, stop)
        complete = trainer.step >= trainer.config.steps
        if plan.checkpoint is not None and (plan.save_at_end or not complete):
            nbytes = trainer.save_checkpoint(plan.checkpoint)
            plan.written = plan.checkpoint
            saved.append(f"checkpoint saved: {plan.checkpoint} ({nbytes / 1e6:.1f} MB)")
        if complete and request.save is not None:
            trainer.model.save(request.save)
            saved.append(f"model saved: {request.save}")
    if not complete:
        done = f"interrupted after step {trainer.step} of {trainer.config.steps}"
        if plan.written is not None:
            saved += [f"{done}; continue with:", f"  {_continue_command(plan)}"]
        else:
            saved.append(f"{done}; nothing was saved (--no-checkpoint)")
    return stop, saved


def _continue_command(plan: Plan) -> str:
    words = ["anepy train"]
    words += [_quoted(plan.model)] if plan.model is not None else []
    words += ["--resume", _quoted(plan.written or Path())]
    return " ".join(words)


def _quoted(path: Path) -> str:
    import shlex

    return shlex.quote(os.fspath(path))


def _sample(model: Model, reporter: Reporter) -> str:
    from ..text.generation import generate
    from ..text.tokenizer import Tokenizer
    from ..training.demo import PROMPT

    text = generate(
        model,
        PROMPT,
        tokenizer=Tokenizer.bytes(),
        temperature=0.5,
        max_tokens=DEMO_SAMPLE_TOKENS,
        seed=1,
    )
    reporter.sample(PROMPT, text)
    return text
