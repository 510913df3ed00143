"""`anepy info` and `anepy lib`: this machine, and the native library on it."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import AnepyError, LibraryNotFoundError
from .common import JsonOption, examples, guarded, print_json, table

lib = typer.Typer(
    help="Find, build, fetch or check the native library.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples("anepy lib build", "anepy lib verify"),
)


@guarded
def info(as_json: JsonOption = False) -> None:
    """Describe machine, library and devices, for bug reports too."""
    facts = _facts()
    if as_json:
        print_json(facts)
        return
    machine, library = facts["machine"], facts["library"]
    rows = [
        ("anepy", f"{facts['anepy']}, Python {facts['python']}, numpy {facts['numpy']}"),
        ("system", f"{machine['system']} ({facts['platform']})"),
        ("processor", f"{machine['processor']}, {machine['cpus']} CPUs usable"),
        ("memory", f"{machine['memory'] / 1e9:.1f} GB"),
        *_mac_rows(facts["mac"]),
    ]
    if "error" in library:
        rows.append(("library", library["error"]))
    else:
        rows.append(("library", f"{library.pop('path', '?')} ({library.pop('found', '?')})"))
        rows += [(name.replace("_", " "), _text(value)) for name, value in library.items()]
    for item in facts["devices"]:
        usable = "" if item["usable"] else "not usable: "
        rows.append((f"device {item['name']}", usable + item["reason"]))
    rows += [
        (f"variant {name}", ", ".join(switches) or "no switches")
        for name, switches in facts["variants"].items()
    ]
    if facts["probe"] is not None:
        rows.append(("probe", _probe_text(facts["probe"])))
    rows.append(("cache", facts["cache"]))
    rows += [(name, value) for name, value in facts["environment"].items()]
    table("anepy info", rows)


def _mac_rows(mac: dict[str, Any] | None) -> list[tuple[str, str]]:
    if mac is None:
        return []
    there = [name for name, opens in mac["frameworks"].items() if opens]
    return [
        ("macOS", f"{mac['macos']} ({mac['build']}) on {mac['model']}"),
        ("cores", f"{mac['performance_cores']} performance, {mac['efficiency_cores']} efficiency"),
        ("neural engine", f"family {mac['family'] or 'unknown'}"),
        ("frameworks", ", ".join(there) or "none"),
        *(("warning", text) for text in mac["warnings"]),
    ]


def _probe_text(probe: dict[str, Any]) -> str:
    adapts = ", ".join(probe["adapts"]) or "the library's defaults fit"
    counts = ", ".join(f"{n} {verdict}" for verdict, n in probe["verdicts"].items() if n)
    return f"{counts} on {probe['started'][:10]}; {adapts} ({probe['path']})"


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _facts() -> dict[str, Any]:
    import numpy

    from .._version import __version__
    from ..engine import adapt
    from ..native import find
    from ..system import download, mac, machine

    this, record = mac.describe(), adapt.stored(adapt.DEVICE)
    facts: dict[str, Any] = {
        "anepy": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "machine": {
            "system": machine.system(),
            "processor": machine.processor(),
            "cpus": machine.usable_cpus(),
            "memory": machine.memory(),
        },
        "platform": "unknown",
        "mac": None if this is None else asdict(this),
        "probe": None
        if record is None
        else {
            "path": str(adapt.path(adapt.DEVICE)),
            "started": record["started"],
            "verdicts": record["verdicts"],
            "adapts": [item["detail"] for item in record["adapts"]],
        },
        "library": {},
        "devices": [],
        "variants": {},
        "cache": str(download.cache_dir()),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("ANEPY_")},
    }
    try:
        facts["platform"] = find.platform_tag()
        from ..engine import device
        from ..engine.variants import variants
        from ..native.info import library_info

        facts["library"] = dict(library_info())
        if (found := find.loaded()) is not None:
            facts["library"] = {"path": str(found.path), "found": found.place} | facts["library"]
        facts["devices"] = [
            {"name": item.name, "usable": item.usable, "reason": item.reason}
            for item in device.devices()
        ]
        facts["variants"] = {name: list(on) for name, on in variants().items()}
    except (AnepyError, OSError) as error:
        # Somebody who cannot load the library needs this command most.
        facts["library"] = {"error": str(error)}
    return facts


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
        Path | None, typer.Option(metavar="DIR", help="Folder to put it into instead.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Unoptimized, with assertions.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the compiler at work.")] = False,
) -> None:
    """Compile the library with $CC and print its path."""
    from ..native import find

    print(find.build(out=out, debug=debug, verbose=verbose))


@lib.command(epilog=examples("anepy lib fetch", "anepy lib fetch --from /media/usb/libanepy.so"))
@guarded
def fetch(
    from_file: Annotated[
        Path | None, typer.Option("--from", metavar="FILE", help="Install this file instead.")
    ] = None,
) -> None:
    """Download the library, or install it from a file; print its path."""
    from ..native import find

    print(find.fetch(from_file))


@lib.command(epilog=examples("anepy lib verify", "anepy lib verify ./libanepy.so --json"))
@guarded
def verify(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Default: the library in use.")
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
