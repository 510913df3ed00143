"""`anepy probe`: what this machine's Neural Engine does, found out by asking it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from .common import EXIT_FAILURE, JsonOption, guarded, note, path_option, print_json, table


@guarded
def probe(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROBE...]", help="Only these; default all.", show_default=False),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device: auto, ane, or sim, sim:m1 to sim:m6, the simulator.")
    ] = "auto",
    output: Annotated[
        Path | None,
        path_option("--output", "-o", metavar="FILE.json", help="Write JSON there."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="SECONDS", help="For each probe.")
    ] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Test what the library assumes about the Neural Engine, in about a minute.

    Each probe runs small programs in a process of its own. What is found is kept in the cache for
    this machine and system; engines on device ane use it from then on. Exit code 1 if something
    does not work.
    """
    from ..console.train import progress
    from ..engine import adapt
    from ..hardware.ask import lines, measure
    from ..hardware.probes import PROBES

    known = [item.name for item in PROBES]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"unknown probe {name!r}: use one of {', '.join(known)}")
    name, told = _device(device)
    if not as_json:
        note(told)
    with progress() as tell:
        record = measure(
            name,
            names or (),
            lambda done, total, item: tell(f"probe {done + 1} of {total}: {item.question}"),
            timeout,
        )
    record["device_note"] = told
    stored = None
    if not names:  # the answers of some would replace those of all
        try:
            stored = adapt.store(record)
        except OSError as error:
            note(f"the result is not kept: {error.strerror}; set ANEPY_CACHE to a writable folder")
    if output is not None:
        _write(output, record)
    if as_json:
        print_json(record)
    else:
        rows = [("device", f"{record['device']}, chip {record['chip'] or 'unknown'}")]
        rows += list(lines(record))
        counts = ", ".join(f"{n} {verdict}" for verdict, n in record["verdicts"].items() if n)
        rows.append(("result", f"{counts} in {record['seconds']:.0f} s"))
        rows += [("kept in", str(path)) for path in (stored, output) if path is not None]
        table("anepy probe", rows)
    if any(record["verdicts"][verdict] for verdict in ("failed", "crashed", "hung")):
        raise typer.Exit(EXIT_FAILURE)


def _device(device: str) -> tuple[str, str]:
    """Return the device to ask; for "auto" also which one it is, and why not a better one."""
    from ..engine.device import AUTO, devices, refusal

    if device.partition(":")[0] == "cpu":
        raise ConfigError("device cpu has no Neural Engine: use --device sim, or ane on a Mac")
    known = {item.name: item for item in devices()}
    if device != AUTO:
        name = device.partition(":")[0]
        if name not in known:
            raise ConfigError(f"unknown device {name!r}: use one of auto, ane, sim")
        if not known[name].usable:
            raise ConfigError(known[name].reason)
        return device, ""
    if known["ane"].usable:
        return "ane", ""
    refused = refusal("ane", known["ane"].reason)
    return "sim", f"device sim, the simulator of chip M4; {refused}"


def _write(output: Path, record: dict[str, object]) -> None:
    from ..system.files import dumps, replacing, write_failure

    try:
        with replacing(output) as file:
            file.write((dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise ConfigError(write_failure(output, "result", error)) from error
