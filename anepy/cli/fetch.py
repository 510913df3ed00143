"""`anepy fetch`: public models, tokenizers and data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import JsonOption, guarded, note, path_option, print_json

if TYPE_CHECKING:
    from ..models.catalog import Item
    from ..models.fetching import Fetched

_CHECKED = {
    "pinned": "has the SHA-256 that anepy knows",
    "server": "has the SHA-256 and size that the server told",
    "recorded": "has the SHA-256 of its first download",
}


@guarded
def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME...]", help="What to bring; hf:OWNER/NAME for a model of the Hub."
        ),
    ] = None,
    to: Annotated[Path, path_option("--to", "-o", metavar="DIR", help="Folder to put it in.")] = (
        Path()
    ),
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace files that differ.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List what can be fetched, or download it: models, tokenizers, data.

    A broken or interrupted download goes on where it stopped; nothing appears under its name
    before its size and SHA-256 are right.
    """
    if not names:
        _list(as_json)
        return
    done = bring(names, to, force, quiet=as_json)
    if as_json:
        print_json({"command": "fetch", "files": [asdict(f) | {"path": str(f.path)} for f in done]})


def bring(names: list[str], to: Path, force: bool = False, quiet: bool = False) -> list[Fetched]:
    """Bring everything that is named, and say in one line each what is there now."""
    from ..models import fetching
    from ..system.download import progress_bar
    from ..system.words import size

    done: list[Fetched] = []
    for item in [fetching.plan(name) for name in names]:
        if not quiet:
            print(f"{item.name}: {size(item.nbytes)}, licence {item.licence}", flush=True)
        try:
            found = fetching.fetch(item, to, progress_bar, force)
        except KeyboardInterrupt:
            note("what has arrived is kept; the same command goes on from there")
            raise
        for file in found:
            if not quiet:
                print(f"  {file.path}: {size(file.size)}, {_told(file)}", flush=True)
        done += found
    return done


def _told(file: Fetched) -> str:
    if file.checked == "first":
        return (
            f"{file.state}; nobody tells its SHA-256, so {file.sha256[:16]} is recorded, and must "
            "be the same at every later download"
        )
    return f"{file.state}, {_CHECKED[file.checked]}"


def _list(as_json: bool) -> None:
    from ..models.catalog import ITEMS
    from ..system.words import size

    if as_json:
        print_json({"command": "fetch", "items": [_facts(item) for item in ITEMS]})
        return
    from ..console.train import print_columns

    rows = [(i.name, size(i.nbytes), i.licence, i.purpose) for i in ITEMS]
    print_columns(("NAME", ">SIZE", "LICENCE", "FOR"), rows)
    print("Models bring their tokenizer; hf:OWNER/NAME brings any model folder of the Hub.")


def _facts(item: Item) -> dict[str, Any]:
    return {
        "name": item.name,
        "kind": item.kind,
        "bytes": item.nbytes,
        "licence": item.licence,
        "purpose": item.purpose,
        "folder": item.folder,
        "files": [
            {
                "name": source.name,
                "url": f"{source.base}/{source.path}",
                "bytes": source.size,
                "sha256": source.sha256,
            }
            for source in item.files
        ],
    }
