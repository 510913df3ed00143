"""`anepy convert`: models and checkpoints in another format."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError, TokenizerError
from .common import distinct, guarded, note, path_argument, path_option

if TYPE_CHECKING:
    from ..models.model import Model


@guarded
def convert(
    source: Annotated[
        Path,
        path_argument(metavar="IN", help=".bin, .gguf, folder, or a checkpoint."),
    ],
    target: Annotated[
        Path,
        path_argument(
            metavar="OUT",
            help=".bin, .gguf, .npz (a checkpoint), tokenizer.json, tokenizer.bin, or a folder.",
        ),
    ],
    dtype: Annotated[
        str, typer.Option(help="How weights are stored: f32, f16, bf16 or q8_0.")
    ] = "f32",
    research: Annotated[
        int | None,
        typer.Option(
            metavar="VERSION",
            help="Write a checkpoint of the research programs, of version 2 or 4.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        path_option(
            "--tokenizer",
            "-z",
            metavar="FILE",
            help="For the model. Default: its own, or the one beside IN.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
) -> None:
    """Write a model in another format, or a checkpoint with its optimizer's state.

    Its tokenizer goes along. OUT named tokenizer.json or tokenizer.bin is the tokenizer alone.
    """
    if target.exists() and not force:
        raise ConfigError(f"{target} exists: name another file, or add --force to replace it")
    distinct({"OUT": target}, {"IN": source})
    if target.name in ("tokenizer.json", "tokenizer.bin"):
        from ..text.tokenizer import Tokenizer
        from ..text.tokenizer_stored import save_tokenizer

        words = Tokenizer.load(tokenizer or source)
        save_tokenizer(words, target)
        print(f"{target}: {words.vocab_size:,} tokens")
        return
    from ..system.words import quantity
    from ..training.convert import read, write

    state = read(source)
    _give_tokenizer(state.model, tokenizer, source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(state, target, dtype, research)
    for text in [*state.notes, *(str(warning.message) for warning in caught)]:
        note(text)
    print(f"{target}: {quantity(state.model.n_parameters)} parameters, {dtype}")


def _give_tokenizer(model: Model, named: Path | None, source: Path) -> None:
    """Let a model have the tokenizer that was named, or lies beside a file of llama2.c."""
    from ..models.stored_tokenizer import Pieces
    from ..text.tokenizer_stored import resolve_tokenizer

    if model.tokenizer is not None and named is None:
        return
    try:
        model.path = model.path or source
        found = resolve_tokenizer(named, model)
    except TokenizerError:
        if named is not None:
            raise
        return  # the writer tells that there is none
    model.tokenizer = found if isinstance(found, Pieces) else found.stored
