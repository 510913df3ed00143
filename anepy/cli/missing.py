"""What `anepy train` needs and does not find, where anepy knows how to get it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import typer

from ..errors import DataError, ModelError
from ..models import catalog
from .fetch import bring
from .plan import Request

_TEXT = "tinystories-valid"
_TOKENS = "tinystories.bin"

Step = tuple[str, Callable[[], object]]


def brought(request: Request) -> Request:
    """Return a request that has a model and data, those brought that a person agrees to.

    Raises:
        DataError, ModelError: something is missing; the message names the commands that bring it.
    """
    item = catalog.find(request.model.name) if request.model is not None else None
    if item is None or request.model is None:
        return request
    folder = request.model.parent
    no_model = not os.path.lexists(request.model)
    no_data = request.data is None and request.resume is None
    if not no_model and not no_data:
        return request
    stories = no_data and _tokenizer(item) is not None
    if not no_model and not stories:
        return request
    data = Path(_TOKENS) if stories else request.data
    steps = _steps(item, folder, no_model, data if stories else None)
    words = ["anepy", "train", str(request.model)]
    if request.resume is None:
        words += ["--data", str(data or "FILE")]
    else:
        words += ["--resume", str(request.resume)]
    lines = [command for command, _ in steps]
    if _asks(request) and steps and _agreed(no_model, request.model, lines):
        for _, act in steps:
            act()
        return replace(request, data=data)
    told = ", then ".join(f"`{line}`" for line in [*lines, shlex.join(words)])
    if no_model:
        raise ModelError(f"there is no {request.model}; anepy can get it: {told}")
    raise DataError(f"training needs tokens: pass --data FILE; for the stories: {told}")


def _steps(item: catalog.Item, folder: Path, model: bool, data: Path | None) -> list[Step]:
    """Return what has to be done, each with the command that does it."""
    names = [item.name] if model else []
    where = [] if folder == Path() else ["--to", str(folder)]
    tokenizer = _tokenizer(item)
    steps: list[Step] = []
    if data is not None and not data.exists() and tokenizer is not None:
        text = catalog.find(_TEXT)
        assert text is not None
        names += [_TEXT] if not (folder / text.files[0].name).exists() else []
        vocabulary = folder / tokenizer.name
        if not model and not vocabulary.exists():
            names.append("tok512" if tokenizer.name == "tok512.bin" else "tokenizer")
        told = ["anepy", "prepare", str(folder / text.files[0].name), "-o", str(data)]
        told += ["--tokenizer", str(vocabulary)]
        act = _preparing(folder / text.files[0].name, vocabulary, data)
        steps.append((shlex.join(told), act))
    if names:
        command = shlex.join(["anepy", "fetch", *names, *where])
        steps.insert(0, (command, lambda: bring(names, folder)))
    return steps


def _tokenizer(item: catalog.Item) -> catalog.Source | None:
    """Return the llama2.c tokenizer that comes with a model."""
    return next((f for f in item.files if "tok" in f.name and f.name.endswith(".bin")), None)


def _preparing(text: Path, vocabulary: Path, data: Path) -> Callable[[], object]:
    def act() -> None:
        from ..system.download import progress_bar
        from ..text.prepare import prepare
        from ..text.tokenizer import Tokenizer

        with progress_bar("tokenizing") as progress:
            prepare(text, Tokenizer.load(vocabulary), data, progress=progress)

    return act


def _asks(request: Request) -> bool:
    return not request.as_json and sys.stdin.isatty() and sys.stderr.isatty()


def _agreed(no_model: bool, model: Path, lines: list[str]) -> bool:
    what = f"there is no {model}" if no_model else "training needs tokens"
    print(f"anepy: {what}; these commands bring what is missing:", file=sys.stderr)
    for line in lines:
        print(f"  {line}", file=sys.stderr)
    return typer.confirm("Run them now, then train?", default=True, err=True)
