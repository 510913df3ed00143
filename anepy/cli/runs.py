"""`anepy runs` and `anepy plot`: what came of runs of training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import DataError
from .common import JsonOption, distinct, guarded, path_argument, path_option, print_json

if TYPE_CHECKING:
    from ..training.runs import Run


@guarded
def runs(
    folders: Annotated[
        list[Path] | None,
        path_argument(metavar="[RUN...]", help="Folders of runs, or logs. Default: those here."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List runs and compare them: steps, loss, the best evaluation, speed."""
    found = _read(folders or [])
    if as_json:
        print_json({"command": "runs", "runs": [_facts(run) for run in found]})
        return
    from ..comparing.run_page import rows
    from ..console.train import print_columns

    print_columns(*rows(found))


@guarded
def plot(
    folders: Annotated[
        list[Path],
        path_argument(metavar="RUN...", help="Folders of runs, or logs."),
    ],
    output: Annotated[
        Path,
        path_option(
            "--output",
            "-o",
            metavar="FILE",
            help="A page (.html), a drawing (.svg), or a picture (.png; extra plot).",
        ),
    ] = Path("plot.html"),
) -> None:
    """Draw the losses of runs in one picture, with rates and speeds on a page."""
    from ..comparing.run_page import write

    found = _read(folders)
    distinct({"the picture": output}, {f"the log of {run.name}": run.path for run in found})
    write(found, output)
    print(f"{output}: {', '.join(run.name for run in found)}")


def _read(folders: list[Path]) -> list[Run]:
    from ..training.runs import found_in, read

    if not folders:
        folders = found_in(Path())
        if not folders:
            raise DataError("no folder here holds a run; `anepy train --run FOLDER` makes one")
    return [read(path) for path in folders]


def _facts(run: Run) -> dict[str, Any]:
    best = run.best
    return {
        "name": run.name,
        "log": str(run.path),
        "model": run.facts.get("model"),
        "data": run.facts.get("data"),
        "settings": run.facts["settings"],
        "step": run.steps,
        "total": run.total,
        "loss": run.loss,
        "best": None if best is None else {"step": best[0], "loss": best[1]},
        "seconds": run.seconds,
        "complete": bool(run.summary),
    }
