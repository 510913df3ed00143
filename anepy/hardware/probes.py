"""The probes: one assumption about the hardware each, with what is expected of a chip.

Each runs programs of its own and returns what it found as plain values; what the library cannot do
without raises `WrongError`. The facts behind them are in docs/neural-engine.md#facts.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import AnepyError
from .probe_mil import (
    COLUMNS,
    SURFACE,
    Array,
    Runner,
    WrongError,
    baked,
    constants,
    conv,
    function,
    half,
    milliseconds,
    op,
    program,
    run,
    surface,
    weight_file,
)

Values = dict[str, Any]
CHIPS = ("m1", "m2", "m3", "m4", "m5", "m6")
SHAPE = (1, 32, 1, COLUMNS)  # 4 KiB of fp16
BUDGET_TRIED = 130
RETRIES = 3
_LARGEST = 65504.0


@dataclass(frozen=True)
class Probe:
    """One assumption.

    Attributes:
        name: as on the command line.
        question: what is asked, in a few words.
        run: asks it.
        expected: values that are known of every chip; those not named may be anything.
        by_chip: values that differ between chips, by chip.
    """

    name: str
    question: str
    run: Callable[[Runner], Values]
    expected: Mapping[str, Any] = field(default_factory=dict)
    by_chip: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def expectation(self, chip: str | None) -> Values:
        """Return what is known of a chip; of an unknown one what holds for all."""
        return dict(self.expected) | dict(self.by_chip.get(chip or "", {}))


def _ramp(*shape: int) -> Array:
    return (np.arange(np.prod(shape)) % 251).reshape(shape).astype(np.float16)


def _same(found: Array, expected: Array, what: str) -> None:
    if not np.array_equal(found, expected.astype(np.float16)):
        at = tuple(int(i) for i in np.argwhere(~(found == expected))[0])
        raise WrongError(f"{what}: {found[at]:g} at {list(at)} instead of {expected[at]:g}")


# --------------------------------------------------------------------------------- programs

ADD_ONE = half("one", 1.0) + "\n" + op("z_out", SHAPE, "add(x = a_in, y = one)")


def _dialect(runner: Runner) -> Values:
    found: Values = {}
    kept, reasons = runner.dialect, []
    for dialect in ("1.3", "1.0"):
        runner.dialect = dialect
        try:
            compiled = runner.compile(program(function({"a_in": SHAPE}, ADD_ONE, ["z_out"])))
            x = _ramp(*SHAPE)
            _same(run(compiled, [x], SHAPE)[0], x + 1, f"dialect {dialect}")
            compiled.close()
            found[dialect] = True
        except AnepyError as error:
            found[dialect] = False
            reasons.append(f"dialect {dialect}: {error}")
    runner.dialect = kept
    if not any(found.values()):
        raise WrongError("; ".join(reasons))
    return found


def _add(runner: Runner) -> Values:
    began = time.perf_counter()
    compiled = runner.compile(program(function({"a_in": SHAPE}, ADD_ONE, ["z_out"])))
    compile_ms = milliseconds(began)
    x = _ramp(*SHAPE)
    # A second run with other numbers: an evaluation that fails unnoticed leaves the first ones.
    for values in (x, -x, x * 2):
        _same(run(compiled, [values], SHAPE)[0], values + 1, "x + 1")
    times = []
    for _ in range(50):
        began = time.perf_counter()
        run(compiled, [x], SHAPE)
        times.append(milliseconds(began))
    return {"compile_ms": round(compile_ms, 3), "run_ms": round(statistics.median(times), 4)}


def _binding(runner: Runner) -> Values:
    """Slots by name or by declaration: names are declared in another order than sorted."""
    names = ["b_in", "Z_in", "a_in"]  # sorted: upper case first
    body = "\n".join(
        [
            half("c4", 4.0),
            half("c16", 16.0),
            op("s4", SHAPE, "mul(x = Z_in, y = c4)"),
            op("s16", SHAPE, "mul(x = a_in, y = c16)"),
            op("s", SHAPE, "add(x = b_in, y = s4)"),
            op("z_out", SHAPE, "add(x = s, y = s16)"),
            op("c_out", SHAPE, "sub(x = s16, y = s4)"),
        ]
    )
    text = program(function(dict.fromkeys(names, SHAPE), body, ["z_out", "c_out"]))
    compiled = runner.compile(text)
    slots = [np.full(SHAPE, value) for value in (1, 2, 3)]
    outs = [float(out[0, 0, 0, 0]) for out in run(compiled, slots, SHAPE, SHAPE)]

    def order(declared: list[str]) -> tuple[float, float]:
        value = {name: slot + 1 for slot, name in enumerate(declared)}
        big = value["b_in"] + 4 * value["Z_in"] + 16 * value["a_in"]
        return big, 16 * value["a_in"] - 4 * value["Z_in"]

    for how, sequence in (("name", sorted(names)), ("declaration", names)):
        z_out, c_out = order(sequence)
        if sorted(outs) == sorted((z_out, c_out)):
            return {"inputs": how, "outputs": "name" if outs == [c_out, z_out] else "declaration"}
    raise WrongError(f"surfaces are bound neither by name nor as declared: outputs {outs}")


def _blob(runner: Runner) -> Values:
    """A permutation as weight of a conv, in the second record of a file."""
    n = SHAPE[1]
    forward = np.random.default_rng(1).permutation(n)
    eye = np.eye(n, dtype=np.float16)
    data, offsets = weight_file(np.full((n, n), 0.5), eye[forward])
    body = "\n".join([baked("w", (n, n, 1, 1), offsets[1]), conv("z_out", SHAPE, "w", "a_in")])
    compiled = runner.compile(
        program(function({"a_in": SHAPE}, body, ["z_out"])), {"weight.bin": data}
    )
    x = np.broadcast_to((np.arange(n) + 1.0)[:, None, None], SHAPE[1:])[None]
    (found,) = run(compiled, [x], SHAPE)
    if np.array_equal(found, x[:, np.argsort(forward)]):
        raise WrongError("the weight of a conv is read transposed")
    _same(found, x[:, forward], "a conv with a permutation as its weight")
    return {}


def _two_functions() -> str:
    double = half("two", 2.0) + "\n" + op("z_out", SHAPE, "mul(x = a_in, y = two)")
    return program(
        function({"a_in": SHAPE}, ADD_ONE, ["z_out"], "procedure000"),
        function({"a_in": SHAPE}, double, ["z_out"], "procedure001"),
    )


def _procedures(runner: Runner) -> Values:
    x = _ramp(*SHAPE)
    # What fails with one function as well says nothing about two.
    single = runner.compile(program(function({"a_in": SHAPE}, ADD_ONE, ["z_out"])))
    _same(run(single, [x], SHAPE)[0], x + 1, "one function")
    try:
        compiled = runner.compile(_two_functions())
        for index in (1, 0, 1):
            expected = x * 2 if index else x + 1
            _same(run(compiled, [x], SHAPE, function=index)[0], expected, f"procedure {index}")
    except (AnepyError, WrongError) as error:
        return {"usable": False, "reason": str(error)}
    return {"usable": True}


def _scaled(weight: float) -> tuple[str, dict[str, bytes]]:
    data, offsets = weight_file(np.full(SHAPE, weight))
    body = baked("w", SHAPE, offsets[0]) + "\n" + op("z_out", SHAPE, "mul(x = a_in, y = w)")
    return program(function({"a_in": SHAPE}, body, ["z_out"])), {"weight.bin": data}


def _reload(runner: Runner) -> Values:
    """Other weights under a loaded program: used, or not, but nothing in between."""
    compiled = runner.compile(*_scaled(2.0))
    x = _ramp(*SHAPE)
    _same(run(compiled, [x], SHAPE)[0], x * 2, "a baked weight")
    try:
        compiled.reload(_scaled(3.0)[1])
    except AnepyError as error:
        return {"new_weights": False, "reason": str(error)}
    (found,) = run(compiled, [x], SHAPE)
    if np.array_equal(found, x * 3):
        return {"new_weights": True}
    _same(found, x * 2, "weights replaced under a loaded program")
    return {"new_weights": False}


def _reuse(runner: Runner) -> Values:
    """The same program again, and with other weights, which must not be taken for the first."""
    x, right, again = _ramp(*SHAPE), True, True
    for turn, weight in enumerate((2.0, 2.0, 3.0)):
        compiled = runner.compile(*_scaled(weight))
        if turn == 1:
            again = not compiled.compiled
        right = right and np.array_equal(run(compiled, [x], SHAPE)[0], x * weight)
        compiled.close()
    return {"loads_again": again, "right": right}


def _budget(runner: Runner) -> Values:
    """Compile one new program after the other, and look at what each computes."""
    salt = secrets.token_hex(4)  # what was compiled before must not be found again
    x, transient = _ramp(*SHAPE), 0

    def works(count: int) -> None:
        name = f"k{count}_{salt}"
        body = half(name, float(count)) + "\n" + op("z_out", SHAPE, f"add(x = a_in, y = {name})")
        compiled = runner.compile(program(function({"a_in": SHAPE}, body, ["z_out"])))
        _same(run(compiled, [x], SHAPE)[0], x + count, f"program {count + 1}")
        compiled.close()

    for count in range(BUDGET_TRIED):
        for attempt in range(RETRIES + 1):
            try:
                works(count)
                break
            except (AnepyError, WrongError) as error:
                # A failure that passes is not the end of the budget; nor is the very first one.
                if attempt == RETRIES and count > 0:
                    return {"limit": count, "transient": transient, "reason": str(error)}
                if attempt == RETRIES:
                    raise
                time.sleep(0.1 * (attempt + 1))
        transient += attempt > 0
    return {"limit": None, "transient": transient}


def _dynamic(runner: Runner) -> Values:
    """A matmul of two inputs, as programs with live weights have it."""
    found: Values = {}
    for k in (64, 48):
        shapes = {"a_in": (1, 1, COLUMNS, k), "w0": (1, 1, k, COLUMNS)}
        out = (1, 1, COLUMNS, COLUMNS)
        body = (
            constants(flag=False)
            + "\n"
            + op("z_out", out, "matmul(transpose_x = flag, transpose_y = flag, x = a_in, y = w0)")
        )
        compiled = runner.compile(program(function(shapes, body, ["z_out"])))
        draw = np.random.default_rng(k)
        x, w = (draw.integers(-3, 4, shape).astype(np.float64) for shape in shapes.values())
        (y,) = run(compiled, [x, w], out)
        found[f"k{k}"] = bool(np.array_equal(y, x @ w))
    if not found["k64"]:
        raise WrongError("a product of two inputs is wrong")
    return found


# ----------------------------------------------------------------------------------- numbers


def _subnormal(runner: Runner) -> Values:
    """2^-20 in, times 1024; 2^-14 in, times 1/16; and 1e-5 + 1e-5."""
    body = "\n".join(
        [
            half("up", 1024.0),
            half("down", 0.0625),
            op("a_out", SHAPE, "mul(x = a_in, y = up)"),
            op("b_out", SHAPE, "mul(x = b_in, y = down)"),
            op("c_out", SHAPE, "add(x = c_in, y = c_in)"),
        ]
    )
    names = ["a_in", "b_in", "c_in"]
    text = program(function(dict.fromkeys(names, SHAPE), body, ["a_out", "b_out", "c_out"]))
    values = [np.full(SHAPE, v, np.float16) for v in (2.0**-20, 2.0**-14, 1e-5)]
    outs = run(runner.compile(text), values, SHAPE, SHAPE, SHAPE)
    kept = (2.0**-10, 2.0**-18, float(values[2][0, 0, 0, 0]) * 2)
    flushed = []
    for out, value in zip(outs, kept, strict=True):
        if not ((out == 0).all() or (out == np.float16(value)).all()):
            raise WrongError(f"{value:g} came out as {float(out[0, 0, 0, 0]):g}, neither it nor 0")
        flushed.append(bool((out == 0).all()))
    return {"inputs_flushed": flushed[0], "results_flushed": flushed[1], "sum_flushed": flushed[2]}


def _largest(results: Array, expected: Array, what: str) -> float:
    """Return the largest result that is right, all beyond it being infinite."""
    order = np.argsort(expected.ravel())
    results, expected = results.ravel()[order], expected.ravel()[order]
    right = results == expected
    bound = int(np.argmin(right)) if not right.all() else right.size
    if bound == 0 or not np.isposinf(results[bound:]).all():
        raise WrongError(f"{what} beyond {expected[max(0, bound - 1)]:g} are neither right nor inf")
    return float(expected[bound - 1])


def _saturation(runner: Runner) -> Values:
    """Every fp16 number from 16384 to 65504, as a sum, as a product, and going in."""
    steps = np.arange(0x7400, 0x7C00, dtype=np.uint16).view(np.float16).reshape(SHAPE)
    n = SHAPE[1]
    data, offsets = weight_file(np.eye(n) * 2)
    body = "\n".join(
        [
            half("less", 0.25),
            baked("w", (n, n, 1, 1), offsets[0]),
            op("a_out", SHAPE, "add(x = a_in, y = a_in)"),
            op("b_out", SHAPE, "mul(x = b_in, y = less)"),
            conv("c_out", SHAPE, "w", "a_in"),
        ]
    )
    text = program(function({"a_in": SHAPE, "b_in": SHAPE}, body, ["a_out", "b_out", "c_out"]))
    compiled = runner.compile(text, {"weight.bin": data})
    total, less, product = run(compiled, [steps / 2, steps], SHAPE, SHAPE, SHAPE)
    return {
        "sum": _largest(total, steps, "sums"),
        "product": _largest(product, steps, "products"),
        "input": _largest(less, steps / 4, "inputs") * 4,
    }


def _numerics(runner: Runner) -> Values:
    """Ask for each rule of docs/neural-engine.md#numerics by one small example."""
    n, out = SHAPE[1], (1, 2, 1, COLUMNS)
    weights = np.zeros((2, n))
    weights[0, :], weights[1, 0] = 1.0, 0.234375
    cases = (
        ("fixed", 0, (2.0**-17,), 2.0**-16),
        ("fixed", 0, (2.0**-18,), 0.0),
        ("sticky", 0, (16384.0, 16384.0, -16384.0, -16384.0), np.inf),
        ("dropped", 1, (1.875 * 2.0**-14,), 0.0),
        ("away", 0, (2048.0, 1.0), 2050.0),
        ("codes", 1, (float("nan"),), 23040.0),
    )
    x = np.zeros(SHAPE, np.float16)
    for column, (_, _, values, _) in enumerate(cases):
        x[0, : len(values), 0, column] = values
    gate = np.full(SHAPE, 1.25, np.float16)
    data, offsets = weight_file(weights)
    body = "\n".join(
        [
            baked("w", (2, n, 1, 1), offsets[0]),
            conv("c_out", out, "w", "a_in"),
            op("d_out", SHAPE, "sigmoid(x = b_in)"),
        ]
    )
    text = program(function({"a_in": SHAPE, "b_in": SHAPE}, body, ["c_out", "d_out"]))
    compiled = runner.compile(text, {"weight.bin": data})
    sums, gates = run(compiled, [x, gate], out, SHAPE, nbytes=2 * SURFACE)
    found = dict.fromkeys(_MEASURED, True)
    for column, (rule, channel, _, expected) in enumerate(cases):
        found[rule] &= bool(sums[0, channel, 0, column] == np.float16(expected))
    between = (1 / (1 + np.exp(-1.0)) + 1 / (1 + np.exp(-1.5))) / 2  # of two points of the table
    found["tables"] = bool(abs(float(gates[0, 0, 0, 0]) - between) < 1e-3)
    return found


def _sums(runner: Runner) -> Values:
    """768 times 3, by reduce_sum and by a conv with ones; and 768 times 10^2."""
    shape, out = (1, 768, 1, COLUMNS), (1, 1, 1, COLUMNS)
    data, offsets = weight_file(np.ones(768))
    body = "\n".join(
        [
            constants(axes=[1], keep=True),
            baked("w", (1, 768, 1, 1), offsets[0]),
            op("b_out", out, "reduce_sum(axes = axes, keep_dims = keep, x = a_in)"),
            conv("c_out", out, "w", "a_in"),
        ]
    )
    compiled = runner.compile(
        program(function({"a_in": shape}, body, ["b_out", "c_out"])), {"weight.bin": data}
    )

    def both(value: float) -> list[float]:
        outs = run(compiled, [np.full(shape, value)], out, out, nbytes=2 * SURFACE)
        return [float(y[0, 0, 0, 0]) for y in outs]

    few, many = both(3), both(100)
    if abs(few[0] - 2304) > 768 or any(np.isfinite(value) and value < 3e4 for value in many):
        raise WrongError(f"768 times 3 is {few}, 768 times 100 is {many}")
    if few[1] != 2304:
        raise WrongError(f"a conv with ones sums 768 times 3 to {few[1]:g}, not 2304")
    infinite = [bool(np.isinf(value)) for value in many]
    return {"conv_exact": True, "reduce_exact": few[0] == 2304, "overflows": all(infinite)}


def _slice(runner: Runner) -> Values:
    """The second half of the last axis, with small and with large numbers; two of them joined."""
    whole = (1, 16, 1, 2 * COLUMNS)
    part = (1, 16, 1, COLUMNS)
    body = "\n".join(
        [
            constants(
                begin=[0, 0, 0, COLUMNS],
                first=[0, 0, 0, 32],
                size=list(part),
                axis=3,
                size2=[1, 16, 1, 32],
                inner=False,
            ),
            op("b_out", part, "slice_by_size(begin = begin, size = size, x = a_in)"),
            op("s1", (1, 16, 1, 32), "slice_by_size(begin = first, size = size2, x = a_in)"),
            op("s2", (1, 16, 1, 32), "slice_by_size(begin = begin, size = size2, x = a_in)"),
            op("c_out", part, "concat(axis = axis, interleave = inner, values = (s1, s2))"),
        ]
    )
    compiled = runner.compile(program(function({"a_in": whole}, body, ["b_out", "c_out"])))
    x = _ramp(*whole)
    cut, joined = run(compiled, [x], part, part)
    _same(cut, x[..., COLUMNS:], "a slice of the last axis")
    large = np.full(whole, 5000, np.float16)
    (after, _) = run(compiled, [large], part, part)
    if not ((after == 5000) | np.isposinf(after)).all():
        raise WrongError(f"5000 in a slice of the last axis became {float(after.min()):g}")
    expected = np.concatenate([x[..., 32:64], x[..., 64:96]], 3)
    return {
        "keeps_5000": bool((after == 5000).all()),
        "joined": bool(np.array_equal(joined, expected)),
    }


# ---------------------------------------------------------------------------------- surfaces


def _small_surface(runner: Runner) -> Values:
    """128 KiB tensors on surfaces of 64 KiB: must be refused, on either side."""
    shape = (1, 1024, 1, COLUMNS)
    body = half("one", 1.0) + "\n" + op("z_out", shape, "add(x = a_in, y = one)")
    compiled = runner.compile(program(function({"a_in": shape}, body, ["z_out"])))
    small, right = np.zeros(SURFACE // 2, np.float16), np.zeros(SURFACE, np.float16)
    reasons = {}
    for side, surfaces in (("input", (small, right)), ("output", (right, small))):
        try:
            compiled.run_slots([surfaces[0]], [surfaces[1]])
        except AnepyError as error:
            reasons[side] = str(error)
        else:
            raise WrongError(f"an {side} surface of half the size is accepted")
    x = _ramp(*shape)  # and a refused evaluation does no harm to the next one
    _same(run(compiled, [x], shape, nbytes=2 * SURFACE)[0], x + 1, "after a refusal")
    return {"refused": True, "reason": reasons["input"]}


def _floor(runner: Runner) -> Values:
    """The smallest surface on which a tensor of 4 KiB is computed, and whether sizes may differ."""
    body = op("z_out", SHAPE, "sub(x = a_in, y = b_in)")
    text = program(function(dict.fromkeys(("a_in", "b_in"), SHAPE), body, ["z_out"]))
    compiled = runner.compile(text)
    x, y = _ramp(*SHAPE), np.ones(SHAPE)
    reason = "wrong numbers"

    def works(first: int, second: int) -> bool:
        nonlocal reason
        out = surface(np.full(SHAPE, np.nan), first)
        try:
            compiled.run_slots([surface(x, first), surface(y, second)], [out])
        except AnepyError as error:
            reason = str(error)
            return False
        return bool(np.array_equal(out[: x.size].reshape(SHAPE), x - 1))

    sizes = [4096, 8192, 16384, 32768, 49152, SURFACE, 2 * SURFACE, 4 * SURFACE]
    found = [size for size in sizes if works(size, size)]
    if not found:
        raise WrongError(f"no surface from {sizes[0]} to {sizes[-1]} bytes works: {reason}")
    return {"smallest": found[0], "unequal": works(SURFACE, 2 * SURFACE)}


# -------------------------------------------------------------------------------- the library


def _programs(runner: Runner) -> Values:
    """Each program of a layer, as the library writes it, against the native form in fp32."""
    from ..models.model import Model, ModelConfig
    from .programs import WEIGHT_FILE, describe, generate, names, run_native

    model = Model.init(ModelConfig(64, 96, 1, 4, 2, 64, COLUMNS), seed=3)
    errors: Values = {}
    others = ("classifier", "softmax", "layer", "head")  # too large, or without a native form
    for name in [n for n in names() if not n.startswith(others)]:
        described = describe(model.table, name, width=COLUMNS)
        text, blob = generate(model, [described])  # dialect 1.3; the runner translates
        compiled = runner.compile(text, {WEIGHT_FILE: blob} if blob else None)
        shape = (described.input_channels, COLUMNS)
        x = np.random.default_rng(4).standard_normal(shape).astype(np.float16).astype(np.float32)
        expected = run_native(model, described, x)
        (found,) = run(compiled, [x], (described.output_channels, COLUMNS))
        scale = float(np.abs(expected).max())
        error = float(np.abs(found.astype(np.float64) - expected).max()) / scale
        errors[name] = round(error, 5) if np.isfinite(error) else None
        compiled.close()
    wrong = [name for name, error in errors.items() if error is None or error > 0.02]
    if wrong:
        raise WrongError(f"{', '.join(wrong)}: off by {[errors[name] for name in wrong]}")
    return {"worst": max(errors.values()), "errors": errors}


def _layer(runner: Runner) -> Values:
    """A step of a small model: loss and every gradient against the CPU in fp32."""
    from ..engine.engine import Engine
    from ..models.model import Model, ModelConfig

    config = ModelConfig(64, 96, 2, 4, 2, 97, COLUMNS)
    ids = np.random.default_rng(5).integers(0, 97, COLUMNS + 1)
    losses, gradients = [], []
    for device in (runner.engine_device(), "cpu"):
        precision = "fp32" if device == "cpu" else "auto"
        with Engine(Model.init(config, seed=6), device=device, precision=precision) as engine:
            stats = engine.step(ids[:-1], ids[1:])
            if stats.skipped:
                raise WrongError("a gradient is not finite")
            losses.append(stats.loss)
            scale = stats.loss_scale
            gradients.append({k: v / scale for k, v in engine.gradients.items()})
    worst, name = max(
        (float(np.linalg.norm(g - gradients[1][k]) / np.linalg.norm(gradients[1][k])), k)
        for k, g in gradients[0].items()
    )
    loss = abs(losses[0] - losses[1]) / losses[1]
    if not (worst < 0.02 and loss < 0.002):
        raise WrongError(f"the loss is off by {loss:.1%}, the gradient of {name} by {worst:.1%}")
    return {"loss_error": round(loss, 6), "worst_gradient": round(worst, 5), "of": name}


_KEPT = {"inputs_flushed": False, "results_flushed": False, "sum_flushed": False}
_RANGE = {"sum": _LARGEST, "product": 32752.0, "input": _LARGEST}
_MEASURED = dict.fromkeys(("fixed", "sticky", "dropped", "away", "codes", "tables"), True)

PROBES = (
    Probe("dialect", "which dialects of MIL compile", _dialect, {"1.3": True, "1.0": True}),
    Probe("add", "one operation, three times", _add),
    Probe(
        "binding",
        "which surface belongs to which name",
        _binding,
        {"inputs": "name", "outputs": "name"},
    ),
    Probe("blob", "layout and offset of weights", _blob),
    Probe("procedures", "several functions in a program", _procedures, {"usable": True}),
    Probe(
        "reload",
        "new weights without compiling",
        _reload,
        {"new_weights": False},
    ),
    Probe("reuse", "what was compiled before, loaded again", _reuse, {"right": True}),
    Probe("budget", "how many programs a process compiles", _budget),
    Probe("dynamic", "products of two inputs", _dynamic, {"k64": True}),
    Probe("subnormal", "numbers below 6.1e-5", _subnormal, _KEPT),
    Probe("saturation", "numbers above 32752", _saturation, _RANGE),
    Probe("numerics", "how sums, roundings and activations are made", _numerics, _MEASURED),
    Probe("sums", "sums over 768 channels", _sums, {"overflows": True}),
    Probe(
        "slice",
        "slices of the last axis",
        _slice,
        by_chip={chip: {"keeps_5000": chip not in ("m1", "m2")} for chip in CHIPS},
    ),
    Probe("programs", "each program of a layer", _programs),
    Probe("layer", "loss and gradients of a model", _layer),
    Probe("surface", "a surface that is too small", _small_surface, {"refused": True}),
    Probe("floor", "sizes of surfaces", _floor),
)  # fmt: skip


def find(name: str) -> Probe:
    """Return a probe by name."""
    return next(probe for probe in PROBES if probe.name == name)
