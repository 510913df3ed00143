"""The `anepy` command: what is typed, handed to the module that does it.

Only typer is imported here: `anepy --help` answers without numpy and without the native library.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from ..system.terminal import guard
from .bench import bench
from .common import examples
from .compare import compare
from .convert import convert
from .data import evaluate, prepare
from .fetch import fetch
from .fuse import fuse
from .generate import generate
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
    guard()
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
