"""`anepy info`: all that is asked about a machine before help is possible."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

from ..errors import AnepyError
from .common import JsonOption, guarded, print_json, table


@guarded
def info(as_json: JsonOption = False) -> None:
    """Describe machine, library and devices; with --json all that a bug report needs.

    Nothing in it names a person: the home folder is shown as ~.
    """
    from ..system import about

    facts = about.anonymous(_facts())
    if as_json:
        print_json(facts)
    else:
        table("anepy info", _rows(facts))


def _facts() -> dict[str, Any]:
    import numpy

    from ..engine import adapt
    from ..system import about, download, mac
    from ..system.version import __version__

    this, record = mac.describe(), adapt.stored(adapt.DEVICE)
    return {
        "anepy": __version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "packages": about.packages(),
        "interpreter": about.interpreter(),
        "platform": "unknown",
        "machine": about.computer(),
        "mac": None if this is None else asdict(this),
        "terminal": about.terminal(),
        "probe": None
        if record is None
        else {
            "path": str(adapt.path(adapt.DEVICE)),
            "created": record["created"],
            "verdicts": record["verdicts"],
            "adapts": [item["detail"] for item in record["adapts"]],
        },
        "cache": str(download.cache_dir()),
        "environment": about.environment(),
        **_library(),
    }


def _library() -> dict[str, Any]:
    """Describe library, devices and variants; what fails is told in their place."""
    facts: dict[str, Any] = {"library": {}, "places": [], "devices": [], "variants": {}}
    try:
        from ..engine.device import devices
        from ..engine.variants import variants
        from ..native import find
        from ..native.info import library_facts

        facts["platform"] = find.platform_tag()
        found: dict[str, Any] = {}
        try:
            library = library_facts()
            if (place := find.loaded()) is not None:
                found = {"path": str(place.path), "found": place.place, "why": place.reason}
            facts["library"] = found | library
        finally:
            # Somebody who cannot load the library needs this command most.
            facts["places"] = [
                asdict(place) | {"path": place.path and str(place.path)} for place in find.search()
            ]
        facts["devices"] = [asdict(device) for device in devices()]
        facts["variants"] = {name: list(on) for name, on in variants().items()}
    except (AnepyError, OSError) as error:
        facts["library"] = {"error": str(error)}
    return facts


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    machine, library = facts["machine"], dict(facts["library"])
    rows = [
        ("anepy", f"{facts['anepy']}, Python {facts['python']}, numpy {facts['numpy']}"),
        ("system", f"{machine['system']} ({facts['platform']}) {machine['distribution']}".strip()),
        ("processor", f"{machine['processor']}, {machine['cpus']} CPUs usable"),
        ("memory", f"{machine['memory'] / 1e9:.1f} GB"),
        *_mac_rows(facts["mac"]),
    ]
    if "error" in library:
        rows.append(("library", library["error"]))
    else:
        where = f"{library.pop('path', '?')} ({library.pop('found', '?')}: "
        rows.append(("library", f"{where}{library.pop('why', '?')})"))
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
    rows += [(n, value) for n, value in facts["environment"].items() if n.startswith("ANEPY_")]
    return rows


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
    return f"{counts} on {probe['created'][:10]}; {adapts} ({probe['path']})"


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
