"""A predicted time of a step on a chip: what a step has to do, counted, times what others measured.

A step is counted by the engine itself: one step of `sim:CHIP,run=no` does all but the programs. The
time of each part comes from what was published of that part (`chips.py`); the three rates that
nobody published are fitted to some of the published steps and checked on others, which the error
that goes with every prediction is of. A prediction is no measurement and is never shown as one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..engine.engine import Engine
from ..engine.flops import flops_per_step
from ..errors import ConfigError
from ..models.model import PRESETS, Model, ModelConfig
from .chips import CHIPS, FORWARD_PROGRAMS, IO_NBYTES, PUBLISHED, Chip, Published

SHAPE = "stories110M"  # of every published step, of so many tokens:
TOKENS = 256
_UNKNOWN = ("dw", "exps", "elements")


@dataclass(frozen=True)
class Counts:
    """What one step has to do; `StepStats` says what each is."""

    dispatches: int
    device_nbytes: int
    io_nbytes: int
    host_nbytes: int
    host_exps: int
    device_flops: float
    host_flops: float
    dw_flops: float
    dw_nbytes: int


@dataclass(frozen=True)
class Prediction:
    """A predicted step.

    Attributes:
        chip: a key of `CHIPS`.
        ms: predicted milliseconds, the sum of the parts.
        parts: predicted milliseconds by kind of work: dispatches, programs, io, products (of the
            classifier on the host), dw (what does not go on beside the device), exps (of
            soft-max) and elements (other work on elements on the host).
    """

    chip: str
    ms: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Check:
    """A published step beside its prediction; error: (predicted - published) / published."""

    published: Published
    ms: float
    error: float


def count(config: ModelConfig, variant: str, seq: int) -> Counts:
    """Count what a step of one sequence, not the first, has to do on the engine and beside it.

    Args:
        config: dimensions of the model; its weights do not matter.
        variant: with any of +switch and -switch.
        seq: tokens.

    Raises:
        ConfigError: an unknown variant, or one that does not take this model or length.
    """
    tokens = np.zeros(seq, np.int32)
    with Engine(Model(config), variant, "sim:m4,run=no", seq_len=seq) as engine:
        engine.step(tokens, tokens)
        stats = asdict(engine.step(tokens, tokens))  # adds to gradients that there are
    return Counts(**{name: stats[name] for name in Counts.__dataclass_fields__})


_reference = functools.lru_cache(maxsize=None)(
    lambda variant, vocab: count(replace(PRESETS[SHAPE], vocab_size=vocab), variant, TOKENS)
)


def _known(chip: Chip, counts: Counts) -> dict[str, float]:
    """Return the ms of the parts whose rates were published."""
    flops = flops_per_step(PRESETS[SHAPE], TOKENS)
    # Attention takes 4 products forward where it takes 10 backward.
    forward = flops["fwd"] + 0.4 * flops["sdpa_bwd"]
    rate = forward / (chip.forward_ms - FORWARD_PROGRAMS * chip.dispatch_ms)
    products = flops["classifier"] / 3 / chip.products_ms
    traffic = counts.device_nbytes / chip.device_gbs / 1e6
    return {
        "dispatches": counts.dispatches * chip.dispatch_ms,
        "programs": max(counts.device_flops / rate, traffic),
        "io": counts.io_nbytes / IO_NBYTES * chip.io_ms,
        "products": counts.host_flops / products,
        "dw": counts.dw_flops / products,  # if nothing of it goes on beside the device
    }


def _to_fit(chip: Chip, counts: Counts) -> list[float]:
    """Return the quantities that the fitted rates belong to."""
    whole = _known(chip, counts)["dw"]
    return [whole, counts.host_exps / 1e6, counts.host_nbytes / 1e6]


def _counted(step: Published) -> Counts:
    counts = _reference(step.variant, step.vocab_size)
    if step.keeps_dw:
        counts = replace(counts, dw_nbytes=0)
    return replace(counts, dispatches=step.dispatches or counts.dispatches)


@functools.lru_cache(maxsize=1)
def fitted() -> dict[str, float]:
    """Fit the unknown rates, by least squares of the relative errors of the fitted steps.

    Returns:
        `dw`: the share of the weight gradients' time on the host that the step waits for;
        `exps`: ns of an exponential; `elements`: ns of a byte of other work on elements.
    """
    rows, wanted = [], []
    for step in PUBLISHED:
        if not step.fitted:
            continue
        chip, counts = CHIPS[step.chip], _counted(step)
        known = _known(chip, counts)
        rest = step.ms - sum(known.values()) + known["dw"]
        rows.append([value / step.ms for value in _to_fit(chip, counts)])
        wanted.append(rest / step.ms)
    found, *_ = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)
    return dict(zip(_UNKNOWN, (float(value) for value in found), strict=True))


def predict(counts: Counts, chip: str) -> Prediction:
    """Predict the time of a step that was counted, on a chip.

    Raises:
        ConfigError: an unknown chip.
    """
    check_chips([chip])
    rates, of = fitted(), CHIPS[chip]
    parts = _known(of, counts)
    quantities = dict(zip(_UNKNOWN, _to_fit(of, counts), strict=True))
    quantities["dw"] += rates["elements"] * counts.dw_nbytes / 1e6  # as much of it is waited for
    parts |= {name: rates[name] * quantities[name] for name in _UNKNOWN}
    return Prediction(chip, sum(parts.values()), parts)


@functools.lru_cache(maxsize=1)
def checks() -> tuple[Check, ...]:
    """Predict every published step, those that were fitted and those that were not."""
    found = []
    for step in PUBLISHED:
        ms = predict(_counted(step), step.chip).ms
        found.append(Check(step, ms, ms / step.ms - 1))
    return tuple(found)


def held_out_error() -> float:
    """Return the mean size of the relative errors of the steps that nothing is fitted to."""
    errors = [abs(check.error) for check in checks() if not check.published.fitted]
    return float(np.mean(errors))


def check_chips(chips: Sequence[str]) -> None:
    """Raise ConfigError for a chip of which too little is published."""
    for chip in chips:
        if chip not in CHIPS:
            raise ConfigError(f"no prediction for chip {chip!r}: choose of {', '.join(CHIPS)}")


def as_record(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction for JSON; every time in it says that it is predicted."""
    parts = {f"predicted_{name}_ms": round(ms, 3) for name, ms in prediction.parts.items()}
    return {"predicted_ms": round(prediction.ms, 3), **parts}
