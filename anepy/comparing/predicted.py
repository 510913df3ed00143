"""What `anepy compare --predict` says: the work of a step of each variant, and a predicted time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..engine.device import AUTO
from ..errors import ConfigError
from ..hardware.chips import CHIPS
from ..hardware.predict import (
    Counts,
    Prediction,
    as_record,
    check_chips,
    checks,
    count,
    held_out_error,
    predict,
)
from ..models.model import ModelConfig, sequence_length
from .words import Table, figure, megabytes

FORMAT = "anepy-prediction"
_ROWS: tuple[tuple[str, Callable[[Counts], str]], ...] = (
    ("dispatches", lambda c: str(c.dispatches)),
    ("programs, GFLOP", lambda c: figure(c.device_flops / 1e9)),
    ("  surfaces and weights", lambda c: megabytes(c.device_nbytes)),
    ("moved to and from surfaces", lambda c: megabytes(c.io_nbytes)),
    ("host: classifier, GFLOP", lambda c: f"{c.host_flops / 1e9:.1f}"),
    ("host: weight gradients, GFLOP", lambda c: f"{c.dw_flops / 1e9:.1f}"),
    ("host: exponentials, millions", lambda c: f"{c.host_exps / 1e6:.1f}"),
    ("host: elements", lambda c: megabytes(c.host_nbytes)),
)


@dataclass(frozen=True)
class Predicted:
    """What was counted and predicted.

    Attributes:
        model: name of the shape.
        seq: tokens of a sequence.
        counts: by variant, in the order they were named.
        predictions: by variant, in the order of the chips.
    """

    model: str
    seq: int
    counts: dict[str, Counts]
    predictions: dict[str, list[Prediction]]


def predict_variants(
    variants: Sequence[str],
    model: tuple[str, ModelConfig],
    seq: int | None = None,
    chips: Sequence[str] = (),
    device: str = AUTO,
) -> Predicted:
    """Count a step of each variant and predict its time on each chip.

    Args:
        variants: as for `anepy.compare`.
        model: name and dimensions.
        seq: tokens of a sequence; default 256, or the model's context if that is shorter.
        chips: keys of `anepy.hardware.chips.CHIPS`; none: all.
        device: whose programs they are: none stated, or the simulator.

    Raises:
        ConfigError: an unknown chip or variant, or another device.
    """
    if device != AUTO and device.split(":")[0] != "sim":
        raise ConfigError(
            f"--predict counts the programs of the Neural Engine, not of device {device}: use "
            "--device sim:m4, or none"
        )
    chips = list(dict.fromkeys(chips)) or list(CHIPS)
    check_chips(chips)
    name, config = model
    tokens = sequence_length(seq, config.seq_len)
    counts = {variant: count(config, variant, tokens) for variant in variants}
    found = {v: [predict(counted, chip) for chip in chips] for v, counted in counts.items()}
    return Predicted(name, tokens, counts, found)


def tables(predicted: Predicted) -> tuple[Table, Table]:
    """Lay out what was counted, and apart from it what is predicted."""
    counted = [[label, *(show(c) for c in predicted.counts.values())] for label, show in _ROWS]
    rows = [
        [f"{CHIPS[column[0].chip].title}, predicted ms", *(figure(p.ms) for p in column)]
        for column in zip(*predicted.predictions.values(), strict=True)
    ]
    head = ["of a step", *predicted.counts]
    return Table(head, counted), Table(["predicted, not measured", *predicted.counts], rows)


def sentences() -> list[str]:
    """Say how far such predictions are off."""
    fits = [check for check in checks() if check.published.fitted]
    others = [check for check in checks() if not check.published.fitted]
    worst = max(others, key=lambda check: abs(check.error))
    return [
        f"predicted: three rates are fitted to {len(fits)} published steps; {len(others)} others "
        f"are predicted with a mean error of {held_out_error():.0%}",
        f"the worst: {CHIPS[worst.published.chip].title}, {worst.published.variant}, predicted "
        f"{figure(worst.ms)} ms, published {figure(worst.published.ms)} "
        f"({worst.published.source}): {worst.error:+.0%}",
    ]


def record(predicted: Predicted, command: Sequence[str]) -> dict[str, Any]:
    """Return all of it for JSON (docs/formats.md#prediction)."""
    return {
        "format": FORMAT,
        "version": 1,
        "command": list(command),
        "model": predicted.model,
        "seq": predicted.seq,
        "held_out_error": round(held_out_error(), 4),
        "checks": [
            {
                "chip": check.published.chip,
                "variant": check.published.variant,
                "published_ms": check.published.ms,
                "predicted_ms": round(check.ms, 3),
                "error": round(check.error, 4),
                "fitted": check.published.fitted,
                "source": check.published.source,
            }
            for check in checks()
        ],
        "variants": {
            variant: {
                "counts": asdict(counted),
                "chips": {p.chip: as_record(p) for p in predicted.predictions[variant]},
            }
            for variant, counted in predicted.counts.items()
        },
    }
