"""`anepy generate`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import DataError
from .common import (
    AdapterOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    ThreadsOption,
    TokenizerOption,
    adapted_model,
    guarded,
    model_path,
    note,
    path_option,
    print_json,
    unescaped,
)

if TYPE_CHECKING:
    from ..text.generation import Speed


@guarded
def generate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Beginning of the text.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        path_option(
            metavar="FILE",
            help=r"One prompt a line, '\n' for a line end in it; - is standard input.",
            show_default=False,
        ),
    ] = None,
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
    seed: Annotated[
        int, typer.Option("--seed", "-s", min=0, help="Of the sampling of each text.")
    ] = 0,
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
    """Continue a prompt, or several, printing the text while it is written."""
    path = model_path(model, model_option)
    if prompt is not None and prompts is not None:
        raise typer.BadParameter("give either --prompt or --prompts")
    from ..text.generation import Speed, choose_device, stream
    from ..text.tokenizer_stored import resolve_tokenizer

    told = choose_device(device)
    begins = [prompt or ""] if prompts is None else _read(prompts)
    began = time.perf_counter()
    loaded = adapted_model(path, adapter, weights)
    words = resolve_tokenizer(tokenizer, loaded)
    spent = Speed()
    texts: list[str] = []
    for begin in begins:
        text = stream(
            loaded,
            begin,
            words,
            temperature,
            top_p,
            max_tokens,
            seed,
            threads,
            stop or (),
            chat,
            speed=spent,
        )
        if not as_json:
            print() if texts else note(told)
        pieces = []
        for piece in text:
            pieces.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
        texts.append("".join(pieces))
        if not as_json:
            print()
    if not as_json:
        _tell(spent)
        return
    one = {"prompt": begins[0], "text": texts[0]} if prompts is None else {}
    print_json(
        {
            "command": "generate",
            "model": str(path),
            **one,
            "texts": [{"prompt": p, "text": t} for p, t in zip(begins, texts, strict=True)],
            "prompt_tokens": spent.prompt_tokens,
            "prompt_seconds": spent.prompt_seconds,
            "tokens": spent.tokens,
            "tokens_per_s": spent.tokens_per_s,
            "seed": seed,
            "device": "cpu",
            "device_note": told,
            "seconds": time.perf_counter() - began,
        }
    )


def _read(path: Path) -> list[str]:
    """Return the prompts of a file.

    Raises:
        DataError: it cannot be read, or has none.
    """
    try:
        raw = sys.stdin.buffer.read() if path == Path("-") else path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read prompts {path}: {error.strerror or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"prompts {path} are no UTF-8 at byte {error.start}: convert them"
        ) from None
    found = [unescaped(line) for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    if not found:
        raise DataError(f"prompts {path} is empty: write one prompt a line")
    return found


def _tell(spent: Speed) -> None:
    """Say how fast it was, on standard error, if a person may read it there."""
    if not sys.stderr.isatty() or not spent.passes:
        return
    from ..system.words import quantity

    read = spent.prompt_tokens / spent.prompt_seconds if spent.prompt_seconds else 0.0
    print(
        f"anepy: {quantity(spent.tokens)} tokens, {spent.tokens_per_s:,.0f} tokens/s; prompts of "
        f"{quantity(spent.prompt_tokens)} tokens, {read:,.0f} tokens/s",
        file=sys.stderr,
    )
