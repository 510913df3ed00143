"""The `anepy` command: what is typed, handed to the module that does it.

Only typer is imported here: `anepy --help` answers without numpy and without the native library.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from .bench import bench
from .common import (
    AdapterOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    ThreadsOption,
    TokenizerOption,
    adapted_model,
    examples,
    guarded,
    model_path,
    note,
    print_json,
)
from .compare import compare
from .convert import convert
from .data import evaluate, prepare
from .fetch import fetch
from .fuse import fuse
from .info import info
from .init import init
from .lib import lib
from .mil import mil
from .probe import probe
from .runs import plot, runs
from .train import TrainCommand, train

app = typer.Typer(
    name="anepy",
    help="Train models of the Llama family on the Apple Neural Engine, or on any CPU.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples("anepy train", "anepy generate stories110M.bin -p 'Once upon a time'"),
)


def main() -> None:
    """Run the command line."""
    # Closed by `>&-`: without it every file that is opened could become standard output.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    # Text of a model may hold characters the terminal cannot show.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()


def _version(wanted: bool) -> None:
    if wanted:
        from ..system.version import __version__

        print(f"anepy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


@guarded
def generate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Beginning of the text.")] = "",
    adapter: AdapterOption = None,
    tokenizer: TokenizerOption = None,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0: always the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest tokens of this total probability.")
    ] = 0.9,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=0, help="New tokens at most.")
    ] = 256,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Of the sampling.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be repeated.", show_default=False),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    weights: Annotated[
        str, typer.Option(help="Weights in memory: f32, bf16, q8, or auto: what loses nothing.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="Device: auto or cpu.")] = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, printing the text while it is written."""
    path = model_path(model, model_option)
    from ..text.generation import choose_device, stream

    told = choose_device(device)
    began = time.perf_counter()
    loaded = adapted_model(path, adapter, weights)
    text = stream(
        loaded,
        prompt,
        tokenizer,
        temperature,
        top_p,
        max_tokens,
        seed,
        threads,
        stop or (),
        chat,
        weights=weights,
    )
    if not as_json:
        note(told)
    pieces = []
    for piece in text:
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        print_json(
            {
                "command": "generate",
                "model": str(path),
                "prompt": prompt,
                "text": "".join(pieces),
                "device": "cpu",
                "device_note": told,
                "seconds": time.perf_counter() - began,
            }
        )
    else:
        print()


def _register() -> None:
    """List every command, in the order the help shows them."""
    app.command(
        "train",
        cls=TrainCommand,
        epilog=examples(
            "anepy train",
            "anepy train stories110M.bin --data stories.bin --steps 100 --save tuned.bin",
        ),
    )(train)
    app.command(
        "compare",
        epilog=examples(
            "anepy compare baseline opt --report compare.html",
            "anepy compare baseline max --ablate --model stories15M.bin --data stories.bin",
        ),
    )(compare)
    app.command(
        "runs",
        epilog=examples("anepy runs", "anepy runs first second --json"),
    )(runs)
    app.command(
        "plot",
        epilog=examples("anepy plot first second", "anepy plot first -o loss.svg"),
    )(plot)
    app.command(
        "generate",
        epilog=examples(
            "anepy generate stories110M.bin -p 'Once upon a time' --temperature 0",
            "anepy generate stories260K.bin --tokenizer tok512.bin -n 100 --seed 7",
        ),
    )(generate)
    app.command(
        "eval",
        epilog=examples(
            "anepy eval stories110M.bin --data stories.bin --windows 100",
            "anepy eval stories260K.bin --text stories.txt --tokenizer tok512.bin --documents",
        ),
    )(evaluate)
    app.command(
        "fuse",
        epilog=examples(
            "anepy fuse model --adapter adapter -o tuned.gguf",
            "anepy fuse stories15M.bin --adapter adapter -o tuned.bin",
        ),
    )(fuse)
    app.command(
        "init",
        epilog=examples(
            "anepy init stories15M -o new.bin",
            "anepy init --data mine.bin --minutes 20 -o new.bin",
        ),
    )(init)
    app.command(
        "convert",
        epilog=examples(
            "anepy convert stories15M.bin stories15M.gguf --dtype q8_0",
            "anepy convert ane_stories110M_ckpt.bin run.npz",
        ),
    )(convert)
    app.command(
        "fetch",
        epilog=examples("anepy fetch", "anepy fetch stories110M tinystories-valid"),
    )(fetch)
    app.command(
        "prepare",
        epilog=examples(
            "anepy prepare stories.txt -o stories.bin --tokenizer tokenizer.bin",
            "anepy prepare a.txt b.txt -o bytes.bin --tokenizer bytes",
        ),
    )(prepare)
    app.command(
        "mil",
        epilog=examples(
            "anepy mil sdpa_fwd --preset stories110M --seq 256",
            "anepy mil ffn_fwd --model m.bin --chip m1 --out program",
        ),
    )(mil)
    app.command(
        "bench",
        epilog=examples(
            "anepy bench --preset stories15M",
            "anepy bench --only classifier --isa avx2 --threads all --json bench.json",
        ),
    )(bench)
    app.command(
        "probe",
        epilog=examples("anepy probe", "anepy probe --device sim:m1 --json > probe.json"),
    )(probe)
    app.command("info", epilog=examples("anepy info", "anepy info --json > machine.json"))(info)
    app.add_typer(lib, name="lib")


_register()
