"""Ask the hardware: every probe in a process of its own, so that a crash or a hang is an answer.

`measure` returns a record that `anepy probe --json` prints and the user cache keeps; its fields are
in docs/formats.md#probe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..engine import adapt
from ..errors import AnepyError
from ..native.find import loaded
from ..native.info import provenance
from ..system import machine
from ..system.files import parsed
from .probe_mil import DeviceRunner, Runner, WrongError
from .probes import CHIPS, PROBES, Probe, find

VERDICTS = ("ok", "differs", "failed", "crashed", "hung")
TIMEOUT_S = 60.0
Record = dict[str, Any]


def ask(probe: Probe, runner: Runner, chip: str | None) -> Record:
    """Run a probe in this process and judge what it found.

    Args:
        probe: which.
        runner: the device.
        chip: whose properties are expected.

    Returns:
        `verdict`, `values`, `expected` and `reason` of the record.
    """
    expected = probe.expectation(chip)
    try:
        values = probe.run(runner)
    except (AnepyError, WrongError) as error:
        return _answer("failed", {}, expected, str(error))
    different = [
        f"{name} is {values.get(name)}, expected {value}"
        for name, value in expected.items()
        if values.get(name) != value
    ]
    reason = "; ".join(
        [*different, *([values["reason"]] if different and "reason" in values else [])]
    )
    return _answer("differs" if different else "ok", values, expected, reason)


def _answer(verdict: str, values: Record, expected: Record, reason: str) -> Record:
    return {
        "verdict": verdict,
        "values": values,
        "expected": expected,
        "reason": " ".join(reason.split()),
    }


def ask_apart(
    probe: Probe,
    device: str,
    dialect: str,
    chip: str | None,
    timeout: float = TIMEOUT_S,
    command: Sequence[str] | None = None,
) -> Record:
    """Run a probe in a process of its own.

    Args:
        probe: which.
        device: as in --device.
        dialect: of its programs.
        chip: whose properties are expected.
        timeout: seconds after which a silent process is ended.
        command: what to start; the probe by default.

    Returns:
        As `ask`.
    """
    if command is None:
        command = (sys.executable, "-m", __name__, probe.name, device, dialect, chip or "")
    environment = dict(os.environ)
    found = loaded()
    if found is not None and found.path is not None:
        environment["ANEPY_LIB"] = str(found.path.absolute())  # the library this process uses
    expected = probe.expectation(chip)
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(process)
        return _answer("hung", {}, expected, f"no answer within {timeout:g} s")
    except BaseException:
        _end(process)
        raise
    with contextlib.suppress(ValueError, IndexError, TypeError, KeyError):
        answer = parsed(out.splitlines()[-1])
        if process.returncode == 0 and answer["verdict"] in VERDICTS:
            return dict(answer)
    last = next((line for line in reversed(err.splitlines()) if line.strip()), "no message")
    return _answer("crashed", {}, expected, f"{_ending(process.returncode)}: {last}")


def _ending(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process was ended by signal {-code}"


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def measure(
    device: str,
    names: Sequence[str] = (),
    tell: Callable[[int, int, Probe], None] = lambda done, total, probe: None,
    timeout: float = TIMEOUT_S,
) -> Record:
    """Run the probes on a device and return the record; nothing is stored.

    Args:
        device: "sim", "sim:m1" or "ane", with details.
        names: of probes; all if there are none.
        tell: told before each probe how many are done, of how many, and which one comes.
        timeout: seconds for each probe.
    """
    origin, began = provenance(), time.perf_counter()
    chip = chip_of(device)
    chosen = [probe for probe in PROBES if not names or probe.name in names]
    dialect = "1.3"
    results: list[Record] = []
    for done, probe in enumerate(chosen):
        tell(done, len(chosen), probe)
        asked = time.perf_counter()
        # What was found so far holds for the engines of later probes.
        known = [item["detail"] for item in adapt.adaptations(results)]
        answer = ask_apart(probe, with_details(device, known), dialect, chip, timeout)
        if probe.name == "dialect" and not answer["values"].get("1.3", True):
            dialect = "1.0"
        results.append(
            {"name": probe.name, "question": probe.question}
            | answer
            | {"seconds": round(time.perf_counter() - asked, 3)}
        )
    return {
        "schema": adapt.SCHEMA,
        **origin,
        "device": device,
        "chip": chip,
        "dialect": dialect,
        "seconds": round(time.perf_counter() - began, 3),
        "probes": results,
        "adapts": adapt.adaptations(results),
        "verdicts": {v: sum(r["verdict"] == v for r in results) for v in VERDICTS},
    }


def with_details(device: str, details: Sequence[str]) -> str:
    """Return a device with further details behind its own."""
    name, *own = device.split(":", 1)
    words = [*own, *details]
    return f"{name}:{','.join(words)}" if words else name


def chip_of(device: str) -> str | None:
    """Return the chip a device has or plays, "m1" to "m6"; None if unknown."""
    name, _, details = device.partition(":")
    if name == "sim":
        return next((word for word in details.split(",") if word in CHIPS), "m4")
    words = machine.processor().lower().split()
    return next((word for word in words if word in CHIPS), None)


def lines(record: Record) -> Iterator[tuple[str, str]]:
    """Put a record into labelled lines."""
    for result in record["probes"]:
        values = ", ".join(
            f"{name.replace('_', ' ')} {_word(value)}"
            for name, value in result["values"].items()
            if name != "reason" and not isinstance(value, dict)
        )
        parts = [result["verdict"], result["reason"], values]
        yield (
            result["name"],
            ": ".join(filter(None, parts[:2])) + (f" ({values})" if values else ""),
        )
    for item in record["adapts"]:
        yield "adapts", f"{item['detail']}: {item['because']}"
    if not record["adapts"]:
        yield "adapts", "nothing: the library's defaults fit"


def _word(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run one probe: NAME DEVICE DIALECT CHIP; print its answer as one line of JSON."""
    name, device, dialect, chip = sys.argv[1:]
    print(json.dumps(ask(find(name), DeviceRunner(device, dialect), chip or None)), flush=True)


if __name__ == "__main__":
    main()
