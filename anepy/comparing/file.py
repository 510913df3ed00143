"""Comparisons as JSON files, so that machines that never met can be compared.

Schema, version 1 (docs/formats.md#compare): one object with `format` "anepy-compare",
`version` 1, the fields of `Comparison`, and `summary`, which repeats for readers what follows from
the samples and is not read back. Times are in ms, sizes in bytes. Numbers that are not finite are
written as null and read as NaN.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system import files
from ..system.files import dumps, parsed
from .config import CompareConfig
from .estimates import LOSS_TOLERANCE
from .result import Ablation, Comparison, Group, Run, columns

FORMAT = "anepy-compare"
VERSION = 1

# Fields without which a comparison cannot be shown, and their types.
_KEYS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "machine": {"system": str, "processor": str, "cpus": int, "memory": int},
    "library": {"isa": str, "build_id": str},
    "engine": {"device": str, "precision": str, "isa": str, "threads": int, "seq": int},
    "model": {"name": str, "parameters": int, "shape": dict},
    "data": {"name": str, "tokens": int},
    "settings": {
        "rounds": int,
        "steps": int,
        "warmup": int,
        "accum": int,
        "lr": (int, float),
        "seed": int,
    },
}


def as_record(comparison: Comparison) -> dict[str, Any]:
    """Return what `save` writes."""
    record = {"format": FORMAT, "version": VERSION, **asdict(comparison)}
    found = columns([("", comparison)])
    record["summary"] = [_summary(column, found[0]) for column in found]
    record["summary"] += [
        {
            "switch": row.switch,
            "form": row.form,
            "reason": row.reason,
            "ratio": _ratio(comparison.ratio(row.label, row.reference)) if row.label else None,
        }
        for row in comparison.ablation
    ]
    return record


def _summary(column: Any, reference: Any) -> dict[str, Any]:
    measured = asdict(column.measured)
    del measured["losses"]
    same = column.agreement(reference)
    return {
        "variant": column.label,
        **measured,
        "ratio": _ratio(column.ratio(reference)),
        "agreement": asdict(same) if same is not None else None,
    }


def _ratio(ratio: Any) -> dict[str, Any] | None:
    return asdict(ratio) | {"verdict": ratio.verdict} if ratio is not None else None


def save(comparison: Comparison, path: str | os.PathLike[str]) -> None:
    """Write a comparison, complete or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    write(path, "results", dumps(as_record(comparison), indent=1) + "\n")


def write(path: str | os.PathLike[str], what: str, text: str) -> None:
    """Write a text file, complete or not at all.

    Args:
        path: the file.
        what: what the file is, in a word or two, for the message.
        text: its content.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        with files.replacing(path) as file:
            file.write(text.encode(errors="replace"))
    except OSError as error:
        raise ConfigError(files.write_failure(path, what, error)) from None


def load(path: str | os.PathLike[str]) -> Comparison:
    """Read a file that `save` wrote.

    Raises:
        ConfigError: it cannot be read, is something else, or is of a newer version.
    """
    try:
        record = parsed(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read results {path}: {error.strerror or error}") from None
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} is no JSON ({reason}); write it with --json") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"{path} is no result of anepy compare; write one with --json")
    if record.get("version") != VERSION:
        raise ConfigError(
            f"{path} has version {record.get('version')!r} of the format, this anepy reads "
            f"{VERSION}: use the anepy that wrote it"
        )
    try:
        return _comparison(record)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, ConfigError) as error:
        reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        reason = " ".join(reason.split())[:120]
        raise ConfigError(f"{path} is damaged ({reason}); write it again with --json") from None


def _comparison(record: Mapping[str, Any]) -> Comparison:
    values = {item.name: record[item.name] for item in fields(Comparison)}
    for name, keys in _KEYS.items():
        for key, kind in keys.items():
            _check(values[name][key], kind, f"{name}.{key}")
    for key in ("created", "anepy"):
        _check(values[key], str, key)
    for key in ("columns", "notes", "command"):
        for text in _check(values[key], list, key):
            _check(text, str, key)
    for text in _check(values["refused"], dict, "refused").values():
        _check(text, str, "refused")
    if values["engine"]["precision"] not in LOSS_TOLERANCE:
        raise ValueError(f"unknown precision {values['engine']['precision']!r}")
    if values["peak"] is not None:
        _check(values["peak"]["name"], str, "peak.name")
        if not _check(values["peak"]["gflops"], (int, float), "peak.gflops") > 0:
            raise ValueError("peak.gflops is not above 0")
    values["groups"] = [_group(item) for item in values["groups"]]
    values["ablation"] = [Ablation(**item) for item in values["ablation"]]
    comparison = Comparison(**values)
    CompareConfig(
        **{k: v for k, v in comparison.settings.items() if k in CompareConfig.__dataclass_fields__}
    ).validate()
    known = {run.label for group in comparison.groups for run in group.runs}
    wanted = {row.label for row in comparison.ablation if row.label} | set(comparison.columns)
    if not comparison.columns or (not comparison.interrupted and not wanted <= known):
        raise ValueError("variants without samples")
    return comparison


def _group(record: Mapping[str, Any]) -> Group:
    runs = []
    for item in record["runs"]:
        run = Run(**item)
        for key, text in (("label", run.label), ("variant", run.variant), ("error", run.error)):
            _check(text, str, key)
        _check(run.rounds, int, "rounds")
        _check(run.memory, int, "memory")
        run.steps = _table(run.steps, ("loss", "step_ms"))
        run.updates = _table(run.updates, ("compile_ms",))
        if not set(range(run.rounds)) <= set(run.steps.get("round", ())):
            raise ValueError("rounds without samples")
        runs.append(run)
    return Group(runs, record["orders"])


def _table(given: Mapping[str, Any], needed: tuple[str, ...]) -> dict[str, list[float]]:
    """Read columns of equal length; none at all are fine, a time that is not above 0 is not."""
    table = {
        str(name): [math.nan if value is None else float(value) for value in values]
        for name, values in given.items()
    }
    if not table:
        return table
    if len({len(values) for values in table.values()}) > 1:
        raise ValueError("columns of different lengths")
    for name in ("round", "wall_ms", *needed):
        if name not in table:
            raise ValueError(f"no column {name}")
    if not all(math.isfinite(value) for value in table["round"]):
        raise ValueError("column round is not finite")
    for name in {"wall_ms", "step_ms"} & set(table):
        if not all(0 < ms < math.inf for ms in table[name]):
            raise ValueError(f"column {name} is not above 0")
    return table


def _check(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{what} is {value!r}")
    return value
