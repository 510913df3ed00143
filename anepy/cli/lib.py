"""`anepy lib`: the native library on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LibraryNotFoundError
from .common import (
    JsonOption,
    examples,
    guarded,
    note,
    path_argument,
    path_option,
    print_json,
    table,
)

lib = typer.Typer(
    help="Find, build, fetch or check the native library.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples("anepy lib build", "anepy lib verify"),
)


@lib.command(epilog=examples("anepy lib path", "ls -l $(anepy lib path)"))
@guarded
def path() -> None:
    """Print where the library is; exit code 1 if there is none yet."""
    from ..native import find

    places = find.search()
    for place in places:
        if place.status == "usable":
            print(place.path)
            return
    tried = "; ".join(f"{place.place}: {place.reason}" for place in places)
    raise LibraryNotFoundError(f"there is no library yet ({tried}): run `anepy lib build`")


@lib.command(epilog=examples("anepy lib build", "CC=clang anepy lib build --verbose"))
@guarded
def build(
    out: Annotated[
        Path | None,
        path_option(metavar="DIR", help="Folder to put it into instead."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Unoptimized, with assertions.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the compiler at work.")] = False,
) -> None:
    """Compile the library with $CC, cc, gcc, clang or zig and print its path."""
    from ..native import find

    for place in find.search():
        if place.place == "compile" and place.status == "possible":
            note(f"compiling {place.reason}")
    print(find.build(out=out, debug=debug, verbose=verbose))


@lib.command(epilog=examples("anepy lib fetch", "anepy lib fetch --from /media/usb/libanepy.so"))
@guarded
def fetch(
    from_file: Annotated[
        Path | None,
        path_option("--from", metavar="FILE", help="Install this file instead."),
    ] = None,
) -> None:
    """Download the library, or install it from a file; print its path."""
    from ..native import find

    print(find.fetch(from_file))


@lib.command(epilog=examples("anepy lib verify", "anepy lib verify ./libanepy.so --json"))
@guarded
def verify(
    file: Annotated[
        Path | None,
        path_argument(metavar="[FILE]", help="Default: the library in use."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check hash, sources and interface; exit code 1 if they are wrong."""
    from ..native import find

    result = find.verify(file)
    if as_json:
        print_json(result)
    else:
        rows = [(name, str(value)) for name, value in result.items() if value is not None]
        table("anepy lib verify", rows)
    if not result["ok"]:
        raise typer.Exit(1)
