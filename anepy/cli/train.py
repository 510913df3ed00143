"""`anepy train`: its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..training.config import TrainConfig
from ..training.settings import setting_help
from .common import guarded, one_of, path_argument, path_option
from .plan import BARE_RESUME, Request


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


def _option(name: str, *spellings: str, metavar: str | None = None) -> Any:
    text = setting_help(TrainConfig, name)
    return typer.Option(*spellings, help=text, show_default=False, metavar=metavar)


@guarded
def train(
    model: Annotated[
        Path | None,
        path_argument(metavar="MODEL", help=".bin, .gguf or folder; none trains the demo."),
    ] = None,
    model_option: Annotated[
        Path | None,
        path_option("--model", metavar="FILE", help="The same as the argument."),
    ] = None,
    data: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Token file, uint16 or uint32 (anepy prepare)."),
    ] = None,
    steps: Annotated[int | None, _option("steps")] = None,
    seq: Annotated[int | None, _option("seq")] = None,
    batch: Annotated[int | None, _option("batch")] = None,
    accum: Annotated[int | None, _option("accum")] = None,
    optimizer: Annotated[str | None, _option("optimizer")] = None,
    lr: Annotated[float | None, _option("lr")] = None,
    moments: Annotated[str | None, _option("moments")] = None,
    momentum: Annotated[float | None, _option("momentum")] = None,
    matrix_lr: Annotated[float | None, _option("matrix_lr")] = None,
    schedule: Annotated[str | None, _option("schedule")] = None,
    warmup: Annotated[int | None, _option("warmup")] = None,
    decay: Annotated[float | None, _option("decay")] = None,
    min_lr_ratio: Annotated[float | None, _option("min_lr_ratio")] = None,
    beta1: Annotated[float | None, _option("beta1")] = None,
    beta2: Annotated[float | None, _option("beta2")] = None,
    eps: Annotated[float | None, _option("eps")] = None,
    weight_decay: Annotated[float | None, _option("weight_decay")] = None,
    grad_clip: Annotated[float | None, _option("grad_clip", "--grad-clip", "--clip")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    pack: Annotated[bool, _option("pack", "--pack")] = False,
    dtype: Annotated[str | None, _option("dtype")] = None,
    held_out: Annotated[float | None, _option("held_out")] = None,
    eval_every: Annotated[int | None, _option("eval_every")] = None,
    eval_windows: Annotated[int | None, _option("eval_windows")] = None,
    validation: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Tokens to evaluate on, instead of --held-out."),
    ] = None,
    patience: Annotated[int | None, _option("patience")] = None,
    minutes: Annotated[float | None, _option("minutes")] = None,
    shard: Annotated[bool, _option("shard", "--shard")] = False,
    wire: Annotated[str | None, _option("wire")] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="MPI: the same bits in each run on as many ranks. It is always so.",
        ),
    ] = False,
    variant: Annotated[str | None, _option("variant")] = None,
    device: Annotated[str | None, _option("device")] = None,
    precision: Annotated[str | None, _option("precision")] = None,
    threads: Annotated[int | None, _option("threads")] = None,
    freeze: Annotated[list[str] | None, _option("freeze", "--freeze", metavar="PATTERN")] = None,
    recompute: Annotated[bool, _option("recompute", "--recompute")] = False,
    lora: Annotated[bool, _option("lora", "--lora")] = False,
    rank: Annotated[int | None, _option("rank")] = None,
    alpha: Annotated[float | None, _option("alpha")] = None,
    targets: Annotated[str | None, _option("targets")] = None,
    base: Annotated[str | None, _option("base")] = None,
    adapter: Annotated[
        Path | None,
        path_option(metavar="FOLDER", help="Train this LoRA adapter on, instead of a new one."),
    ] = None,
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
        path_option(
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
        typer.Option(
            min=0,
            metavar="STEPS",
            help="Save it this often too. Default: every ten minutes.",
            show_default=False,
        ),
    ] = 0,
    keep: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Keep the last N of these, by step.", show_default=False
        ),
    ] = 0,
    on_diverge: Annotated[
        str,
        typer.Option(
            metavar="stop|rollback",
            help="When a loss is not finite: stop with the last good state saved, or go back to it "
            "and on with other data.",
        ),
    ] = "stop",
    run: Annotated[
        Path | None,
        path_option(
            metavar="FOLDER",
            help="Keep all of the run there: settings, log, checkpoints, the best, the model.",
        ),
    ] = None,
    sample_every: Annotated[
        int,
        typer.Option(
            min=0, metavar="STEPS", help="Show text of the model this often.", show_default=False
        ),
    ] = 0,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Beginning of that text.", show_default=False)
    ] = "",
    save: Annotated[
        Path | None,
        path_option(
            metavar="MODEL",
            help="Write the trained model: .bin, .gguf, else a folder. Adapters are folders.",
        ),
    ] = None,
    log: Annotated[
        Path | None,
        path_option(metavar="FILE.jsonl", help="Write one JSON record per event."),
    ] = None,
    tensorboard: Annotated[
        Path | None,
        path_option(metavar="FOLDER", help="Write what TensorBoard shows (extra tensorboard)."),
    ] = None,
    wandb: Annotated[
        str | None,
        typer.Option(
            metavar="PROJECT",
            help="Send the run to Weights & Biases (extra wandb).",
            show_default=False,
        ),
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
    for name in ("recompute", "metal", "freeze", "lora", "pack", "shard"):
        if not given.get(name):
            given.pop(name, None)
    request = Request(
        model=one_of(model, model_option, "model"),
        data=data,
        adapter=adapter,
        settings=given,
        resume=resume,
        checkpoint=checkpoint,
        no_checkpoint=no_checkpoint,
        checkpoint_every=checkpoint_every,
        save=save,
        log=log,
        as_json=as_json,
        run=run,
        keep=keep,
        validation=validation,
        sample_every=sample_every,
        prompt=prompt,
        tensorboard=tensorboard,
        wandb=wandb,
        on_diverge=on_diverge,
    )
    if resume is None and not lora and adapter is None:
        for option, value in (
            ("--rank", rank),
            ("--alpha", alpha),
            ("--targets", targets),
            ("--base", base),
        ):
            if value is not None:
                raise typer.BadParameter(f"{option} is of an adapter: add --lora")
    if adapter is not None and (rank, alpha, targets) != (None, None, None):
        raise typer.BadParameter("the adapter has its rank, alpha and targets already")
    if checkpoint is not None and no_checkpoint:
        raise typer.BadParameter("--checkpoint and --no-checkpoint contradict each other")
    from .run import run as train_as_asked

    train_as_asked(request)
