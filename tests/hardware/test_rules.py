"""The rules of the hardware: each broken once and kept once, as report, as error, and switched off.

A case is a program, the chip whose rule it is, and inputs if the rule is about numbers or surfaces.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import tempfile
from dataclasses import dataclass, field
from typing import Any

import children
import numpy as np
import numpy.typing as npt
import pytest
from mil_text import BOOLS, CONV_CONSTANTS, X, Y, blob, program

from anepy.errors import MilError
from anepy.hardware.program import Action, Program, rules
from anepy.native import abi, find

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One program that breaks or keeps a rule."""

    text: str
    chip: str = "m4"
    inputs: dict[str, Array] | None = None
    weights: dict[str, Array] = field(default_factory=dict)
    run: bool = False
    device: str = "sim"


def unary(op: str, inputs: str = X, output: str = Y, extra: str = "") -> str:
    return program(inputs, f'{output} = {op}({extra}x=x)[name=string("y")];')


def tensor(*shape: int, name: str = "x", kind: str = "fp16") -> str:
    return f"tensor<{kind}, {list(shape)}> {name}"


def conv(channels: int, inputs: str = "", weight: str = "", width: int = 1, groups: int = 1) -> str:
    constants = CONV_CONSTANTS.replace("int32(1)", f"int32({groups})")
    shape = f"16, {channels // groups}, 1, {width}"
    body = constants + (weight or blob("W", "fp16", shape, "w.bin"))
    return program(
        tensor(1, channels, 1, 64) + inputs,
        body
        + f"\ntensor<fp16, [1, 16, 1, {65 - width}]> y = conv(dilations=dl, groups=gr, pad=pd, "
        'pad_type=pt, strides=st, weight=W, x=x)[name=string("y")];',
    )


def conv_case(channels: int, width: int = 1, chip: str = "m4") -> Case:
    weight = np.zeros((16, channels, 1, width), np.float16)
    return Case(conv(channels, width=width), chip, weights={"w.bin": weight})


def matmul(x: tuple[int, ...], y: tuple[int, ...], out: tuple[int, ...], names: str = BOOLS) -> str:
    return program(
        tensor(*x) + ", " + tensor(*y, name="z"),
        names + f"{tensor(*out, name='y')} = matmul(transpose_x=no, transpose_y=no, x=x, y=z)"
        '[name=string("y")];',
    )


def transpose(*shape: int) -> str:
    rank = len(shape)
    perm = [*range(rank - 2), rank - 1, rank - 2]
    return program(
        tensor(*shape),
        f'tensor<int32, [{rank}]> pm = const()[name=string("pm"), '
        f"val=tensor<int32, [{rank}]>({perm})];"
        f"\n{tensor(*(shape[p] for p in perm), name='y')} = transpose(perm=pm, x=x)"
        '[name=string("y")];',
    )


def sliced(begin: int, and_concat: bool = False) -> str:
    at = [0, 0, 0, begin]
    body = f"""
        tensor<int32, [4]> b0 = const()[name=string("b0"), val=tensor<int32, [4]>({at})];
        tensor<int32, [4]> s0 = const()[name=string("s0"), val=tensor<int32, [4]>([1, 32, 1, 32])];
        tensor<fp16, [1, 32, 1, 32]> s = slice_by_size(begin=b0, size=s0, x=x)[name=string("s")];
        tensor<fp16, [1, 32, 1, 32]> t = slice_by_size(begin=b0, size=s0, x=x)[name=string("t")];
        int32 ax = const()[name=string("ax"), val=int32(1)];
        tensor<fp16, [1, 64, 1, 32]> y = concat(axis=ax, values=(s, t))[name=string("y")];
    """
    if and_concat:
        return program(X, body)
    return program(X, "\n".join(body.splitlines()[:4]), outputs="s")


def attention(length: int, mask: bool) -> str:
    names = "kq" + ("m" if mask else "")
    return program(
        ", ".join(
            tensor(1, 1, length, length if name == "m" else 16, name=name) for name in sorted(names)
        ),
        f"{tensor(1, 1, length, 16, name='y')} = scaled_dot_product_attention("
        + ("attn_mask=m, " if mask else "")
        + 'key=k, query=q, value=k)[name=string("y")];',
    )


def cast_between(first: str) -> str:
    return program(
        X,
        f"""
        string f = const()[name=string("f"), val=string("fp32")];
        string h = const()[name=string("h"), val=string("fp16")];
        tensor<fp16, [1, 32, 1, 64]> a = relu(x=x)[name=string("a")];
        tensor<fp32, [1, 32, 1, 64]> b = cast(dtype=f, x={first})[name=string("b")];
        tensor<fp16, [1, 32, 1, 64]> c = cast(dtype=h, x=b)[name=string("c")];
        {Y} = relu(x=c)[name=string("y")];
        """,
    )


def reduced(then: str, value: str = "0.5") -> str:
    return program(
        X,
        f"""
        tensor<int32, [1]> ax = const()[name=string("ax"), val=tensor<int32, [1]>([1])];
        bool kd = const()[name=string("kd"), val=bool(true)];
        fp16 v = const()[name=string("v"), val=fp16({value})];
        tensor<fp16, [1, 1, 1, 64]> s = reduce_sum(axes=ax, keep_dims=kd, x=x)[name=string("s")];
        tensor<fp16, [1, 1, 1, 64]> t = add(x=s, y=v)[name=string("t")];
        tensor<fp16, [1, 1, 1, 64]> y = {then}[name=string("y")];
        """,
    )


def sum_of(channels: int) -> str:
    return reduced("relu(x=t)").replace("[1, 32, 1, 64]", f"[1, {channels}, 1, 64]")


def layer_norm(channels: int) -> str:
    return program(
        tensor(1, channels, 1, 16),
        'tensor<int32, [1]> ax = const()[name=string("ax"), val=tensor<int32, [1]>([1])];\n'
        f"{tensor(1, channels, 1, 16, name='y')} = layer_norm(axes=ax, x=x)"
        '[name=string("y")];',
    )


SCALE = 'fp16 k = const()[name=string("k"), val=fp16(0.5)];'
SCALED = program(X, f'{SCALE}\n{Y} = mul(x=x, y=k)[name=string("y")];')
OLD_SCALED = (
    SCALED.replace("program(1.3)", "program(1.0)")
    .replace("ios18", "ios16")
    .replace("dict<string, string>", "dict<tensor<string, []>, tensor<string, []>>")
)
NAMED = "tensor<fp16, [1, 32, 1, 64]>"
TWO = program(f"{NAMED} a, {NAMED} b", f'{NAMED} y = sub(x=a, y=b)[name=string("y")];')
SIZES = program(
    f"{NAMED} a, tensor<fp16, [1, 1, 1, 64]> b", f'{NAMED} y = sub(x=a, y=b)[name=string("y")];'
)
ONES = np.ones((1, 32, 1, 64), np.float16)
F32 = program(
    tensor(1, 32, 1, 64, kind="fp32"),
    f"""
    string h = const()[name=string("h"), val=string("fp16")];
    {NAMED} y = cast(dtype=h, x=x)[name=string("y")];
    """,
)
WEIGHTED = program(
    X, blob("g", "fp16", "1, 32, 1, 1", "g.bin") + f'\n{Y} = mul(x=x, y=g)[name=string("y")];'
)
GAIN = np.ones((1, 32, 1, 1), np.float16)
RUNTIME_WEIGHT = ", tensor<fp16, [16, 8, 1, 1]> W"

# Name: the case that breaks the rule, the case that keeps it.
CASES: dict[str, tuple[Case, Case]] = {
    "dialect": (Case(OLD_SCALED.replace("ios16", "ios18")), Case(OLD_SCALED)),
    "scalar_type": (Case(OLD_SCALED), Case(SCALED)),
    "inline_literal": (
        Case(matmul((1, 64, 64), (1, 64, 64), (1, 64, 64)).replace("_x=no", "_x=bool(false)")),
        Case(matmul((1, 64, 64), (1, 64, 64), (1, 64, 64))),
    ),
    "io_order": (Case(TWO.replace(f"{NAMED} a, {NAMED} b", f"{NAMED} b, {NAMED} a")), Case(TWO)),
    "io_fp32": (Case(F32, "m1"), Case(F32, "m3")),
    "fp32_compute": (
        Case(unary("relu", tensor(1, 16, kind="fp32"), tensor(1, 16, name="y", kind="fp32"))),
        Case(unary("relu")),
    ),
    "return_value": (Case(unary("relu").replace("-> (y)", "-> (x)")), Case(unary("relu"))),
    "surface_size": (Case(TWO, inputs={"a": ONES, "b": ONES[:, :31]}), Case(TWO, run=True)),
    "surface_floor": (Case(TWO, inputs={"a": ONES, "b": ONES}), Case(TWO, run=True)),
    "surface_equal": (
        Case(SIZES, inputs={"a": ONES, "b": ONES[:, :1]}),
        Case(TWO, inputs={"a": ONES, "b": ONES}),
    ),
    "extent": (
        Case(unary("relu", tensor(1, 1, 1, 16400), tensor(1, 1, 1, 16400, name="y")), "m3"),
        Case(unary("relu", tensor(1, 1, 1, 16400), tensor(1, 1, 1, 16400, name="y"))),
    ),
    "channels": (
        Case(unary("relu", tensor(1, 65552, 1, 16), tensor(1, 65552, 1, 16, name="y"))),
        Case(unary("relu", tensor(1, 65536, 1, 16), tensor(1, 65536, 1, 16, name="y"))),
    ),
    "conv_inputs": (conv_case(16400), conv_case(16384)),
    "conv_runtime_groups": (
        Case(conv(32, inputs=RUNTIME_WEIGHT, weight=" ", groups=4)),
        Case(conv(32, groups=4), weights={"w.bin": np.zeros((16, 8, 1, 1), np.float16)}),
    ),
    "kernel_width": (conv_case(32, width=14, chip="m1"), conv_case(32, width=14)),
    "rank": (Case(transpose(1, 2, 3, 16, 16)), Case(transpose(2, 3, 16, 16))),
    "matmul_k": (
        Case(matmul((1, 64, 16), (1, 16, 64), (1, 64, 64)), "m1"),
        Case(matmul((1, 64, 32), (1, 32, 64), (1, 64, 64)), "m1"),
    ),
    "matmul_broadcast": (
        Case(matmul((2, 64, 32), (1, 32, 64), (2, 64, 64))),
        Case(matmul((2, 64, 32), (2, 32, 64), (2, 64, 64))),
    ),
    "runtime_broadcast": (
        Case(SIZES.replace("[1, 1, 1, 64]", "[1, 32, 1, 1]"), "m1"),
        Case(SIZES, "m1"),
    ),
    "width": (
        Case(unary("relu", tensor(1, 32, 1, 72), tensor(1, 32, 1, 72, name="y"))),
        Case(unary("relu")),
    ),
    "last_axis_slice": (Case(sliced(16), "m1"), Case(sliced(0), "m1")),
    "last_axis_concat": (Case(sliced(16, True), "m1"), Case(sliced(0, True), "m1")),
    "saturation": (
        Case(TWO, inputs={"a": np.float16(65000) * ONES, "b": np.float16(-1000) * ONES}),
        Case(TWO, inputs={"a": np.float16(64000) * ONES, "b": np.float16(-700) * ONES}),
    ),
    "subnormal": (
        Case(SCALED, inputs={"x": np.float16(2.0**-14) * ONES}, device="sim:numerics=flush"),
        Case(SCALED, inputs={"x": np.float16(2.0**-13) * ONES}),
    ),
    "sdpa_mask": (Case(attention(64, True)), Case(attention(64, False))),
    "sdpa_length": (Case(attention(512, False)), Case(attention(496, False))),
    "cast": (
        Case(cast_between("a")),
        Case(
            cast_between("x")
            .replace("(x=c)", "(x=a)")
            .replace(f"{NAMED} c = cast(dtype=h, x=b)", f"{NAMED} c = relu(x=a)")
        ),
    ),
    "root_after_reduce": (Case(reduced("sqrt(x=t)")), Case(reduced("pow(x=t, y=v)"))),
    "reduce_long": (Case(sum_of(513)), Case(sum_of(512))),
    "square": (
        Case(unary("square", tensor(1, 32, 1, 80), tensor(1, 32, 1, 80, name="y"))),
        Case(unary("square")),
    ),
    "reduce_times_zero": (
        Case(reduced("mul(x=s, y=v)", "0.0")),
        Case(reduced("mul(x=s, y=v)")),
    ),
    "layer_norm": (Case(layer_norm(1024), "m2"), Case(layer_norm(1024), "m3")),
    "weight_type": (
        Case(WEIGHTED, weights={"g.bin": np.zeros(64, np.int8)}),
        Case(WEIGHTED, weights={"g.bin": GAIN}),
    ),
    "weight_unused": (
        Case(WEIGHTED, weights={"g.bin": GAIN, "h.bin": GAIN}),
        Case(WEIGHTED, weights={"g.bin": GAIN}),
    ),
}
ELSEWHERE = {"weights_size", "compile_budget"}  # need 2 GiB, and a process of their own


def run_raw(compiled: Program, inputs: dict[str, Array]) -> None:
    """Run with surfaces of exactly the given sizes."""
    ordered = [np.ascontiguousarray(inputs[name]) for name in sorted(inputs)]
    outs = [np.zeros(64 << 10, np.uint8) for _ in compiled.outputs]

    def pointers(arrays: list[Array]) -> Any:
        return (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))

    def sizes(arrays: list[Array]) -> Any:
        return (ctypes.c_uint64 * len(arrays))(*(a.nbytes for a in arrays))

    handle = compiled._open_handle()
    compiled._checked(
        compiled._lib.anepy_sim_run,
        handle,
        0,
        pointers(ordered),
        sizes(ordered),
        pointers(outs),
        sizes(outs),
    )


def attempt(name: str, case: Case, action: Action) -> dict[str, Any]:
    """Compile and run with one rule on and all others off; returns the reports."""
    actions: dict[str, Action] = dict.fromkeys(rules(), "off")
    actions[name] = action
    with Program(
        case.text, case.weights, device=case.device, chip=case.chip, rules=actions
    ) as compiled:
        if case.inputs is not None:
            run_raw(compiled, case.inputs)
        elif case.run:
            compiled.run({key: np.ones(i.shape, i.dtype) for key, i in compiled.inputs.items()})
        return compiled.reports


def test_cases_cover_every_rule() -> None:
    assert set(CASES) | ELSEWHERE == set(rules())


@pytest.mark.parametrize("name", CASES)
def test_rule_broken_is_reported(name: str) -> None:
    reports = attempt(name, CASES[name][0], "report")
    assert set(reports) == {name}
    assert reports[name].count >= 1
    assert f"rule {name}: " in reports[name].message


@pytest.mark.parametrize("name", CASES)
def test_rule_broken_as_error_says_where(name: str) -> None:
    with pytest.raises(MilError, match=f"rule {name}: ") as caught:
        attempt(name, CASES[name][0], "error")
    if name != "weight_unused":  # the only one that no place in the text is to blame for
        assert caught.value.line >= 1
        assert caught.value.column >= 1
        prefix = f"line {caught.value.line}, column {caught.value.column}, at '"
        assert str(caught.value).startswith(prefix)


@pytest.mark.parametrize("name", CASES)
def test_rule_switched_off_says_nothing(name: str) -> None:
    assert attempt(name, CASES[name][0], "off") == {}


@pytest.mark.parametrize("name", CASES)
def test_rule_kept_says_nothing(name: str) -> None:
    assert attempt(name, CASES[name][1], "error") == {}


def test_rule_weights_size_counts_records_named() -> None:
    """A sparse file: nothing of its 2 GiB is ever read, since no operation uses the constant."""
    dims = "16385, 65536"
    text = program(X, blob("W", "fp16", dims, "w.bin") + f'\n{Y} = relu(x=x)[name=string("y")];')
    nbytes = 16385 * 65536 * 2
    with tempfile.TemporaryFile() as sparse:
        sparse.truncate(128 + nbytes)
        header = struct.pack("<II56xIIQQ40x", 1, 2, 0xDEADBEEF, 1, nbytes, 128)
        sparse.write(header)
        sparse.flush()
        with mmap.mmap(sparse.fileno(), 0, access=mmap.ACCESS_READ) as data:
            with pytest.raises(MilError, match=r"rule weights_size: .* 2048 MiB"):
                Program(text, {"w.bin": data})
            Program(text, {"w.bin": data}, rules={"weights_size": "off"}).close()


def test_rule_compile_budget_counts_the_programs_of_a_process() -> None:
    code = f"""
from anepy import Program
for count in range(1, 122):
    with Program({CASES["layer_norm"][1].text!r}, chip="m3",
                 rules={{"compile_budget": "report" if count < 121 else "error"}}) as program:
        assert ("compile_budget" in program.reports) == (count > 119), count
"""
    result = children.run("-c", code)
    assert "MilError: rule compile_budget: compilation 121 of this process" in result.stderr


# ------------------------------------------------------------------------- what is done to numbers


def all_off(**chosen: Action) -> dict[str, Action]:
    actions: dict[str, Action] = dict.fromkeys(rules(), "off")
    actions.update(chosen)
    return actions


def test_other_numerics_flush_subnormals_with_their_sign_unless_switched_off() -> None:
    x = np.float16(2.0**-14) * ONES * np.where(np.arange(64) % 2, 1, -1).astype(np.float16)
    flushed = Program(SCALED, device="sim:numerics=flush")(x=x)
    assert (flushed == 0).all()
    assert (np.signbit(flushed) == np.signbit(x)).all()
    for made in (
        Program(SCALED, device="sim:numerics=flush", rules=all_off()),
        Program(SCALED),
        Program(SCALED, device="sim:numerics=exact"),
    ):
        assert (made(x=x) == x / np.float16(2)).all()


def test_other_numerics_flush_subnormal_inputs_and_weights() -> None:
    tiny = np.full((1, 32, 1, 1), 2.0**-15, np.float16)
    device = "sim:numerics=flush"
    assert (Program(WEIGHTED, {"g.bin": tiny}, device)(x=1024 * ONES) == 0).all()
    kept = Program(WEIGHTED, {"g.bin": tiny})(x=1024 * ONES)
    assert (kept == np.float16(2.0**-5)).all()
    large = {"g.bin": np.float16(1024) * GAIN}
    assert (Program(WEIGHTED, large, device)(x=np.float16(2.0**-15) * ONES) == 0).all()


@pytest.mark.parametrize(("chip", "expected"), [("m1", np.inf), ("m2", np.inf), ("m3", 5000.0)])
def test_last_axis_slice_crops_large_values(chip: str, expected: float) -> None:
    out = Program(sliced(16), chip=chip, rules=all_off(last_axis_slice="report"))(x=-5000 * ONES)
    assert (out == np.float16(-expected)).all()
    small = Program(sliced(16), chip=chip, rules=all_off(last_axis_slice="report"))(x=4092 * ONES)
    assert (small == 4092).all()


def test_attention_ignores_its_mask_unless_the_rule_is_off() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal((1, 1, 64, 16)).astype(np.float16) for _ in range(2))
    mask = np.triu(np.full((64, 64), -1e4, np.float16), 1)[None, None]
    ignored = Program(attention(64, True))(k=k, m=mask, q=q)
    without = Program(attention(64, False))(k=k, q=q)
    honoured = Program(attention(64, True), rules=all_off())(k=k, m=mask, q=q)
    assert (ignored == without).all()
    assert np.abs(honoured[0, 0, 0] - k[0, 0, 0]).max() < 1e-3  # sees the first key only
    assert np.abs(ignored[0, 0, 0] - k[0, 0, 0]).max() > 0.1


def test_sums_lose_what_fp16_loses_and_products_do_not() -> None:
    """2048 + 1 is 2050 where halves are rounded up, 2048 to even; a conv with ones is right."""
    x = np.ones((1, 4096, 1, 64), np.float16)
    text = sum_of(4096).replace("fp16(0.5)", "fp16(0.0)")
    assert (Program(text)(x=x) == 4096).all()
    assert (Program(text, device="sim:numerics=exact")(x=x) == 2048).all()
    text = (
        conv(4096)
        .replace("[16, 4096, 1, 1]", "[1, 4096, 1, 1]")
        .replace("[1, 16, 1, 64]> y", "[1, 1, 1, 64]> y")
    )
    exact = Program(text, {"w.bin": np.ones((1, 4096, 1, 1), np.float16)})(x=x)
    assert (exact == 4096).all()


def test_short_surface_with_the_rule_off_is_read_and_written_as_far_as_it_goes() -> None:
    """A surface of 31 channels behind which memory ends: nothing beyond it is touched."""
    lib = find.library()
    compiled = Program(TWO, rules=all_off())
    short, whole = ONES[:, :31].copy(), ONES.copy()
    out = np.full(ONES.size, 7, np.float16)
    pointers = (ctypes.c_void_p * 2)(whole.ctypes.data, short.ctypes.data)
    sizes = (ctypes.c_uint64 * 2)(whole.nbytes, short.nbytes)
    outs, out_sizes = (ctypes.c_void_p * 1)(out.ctypes.data), (ctypes.c_uint64 * 1)(out.nbytes - 64)
    lib.anepy_sim_run(
        compiled._open_handle(), 0, pointers, sizes, outs, out_sizes, (ctypes.c_int32 * 2)()
    )
    assert (out[: 31 * 64] == 0).all()  # one minus one
    assert (out[31 * 64 : -32] == 1).all()  # one minus nothing
    assert (out[-32:] == 7).all()


# -------------------------------------------------------------------------------------- the table


def test_strict_makes_every_report_an_error_and_its_opposite_none() -> None:
    broken = TWO.replace(f"{NAMED} a, {NAMED} b", f"{NAMED} b, {NAMED} a")
    assert "io_order" in Program(broken).reports
    with pytest.raises(MilError, match="rule io_order"):
        Program(broken, strict=True)
    with pytest.raises(MilError, match="rule return_value"):
        Program(unary("relu").replace("-> (y)", "-> (x)"))
    lenient = Program(unary("relu").replace("-> (y)", "-> (x)"), strict=False)
    assert "return_value" in lenient.reports
    assert (lenient(x=ONES) == 1).all()


def test_rules_name_their_action_and_meaning() -> None:
    table = rules()
    assert {rule.action for rule in table.values()} == {"report", "error", "off"}
    assert all(len(rule.meaning) > 10 for rule in table.values())
    assert table["surface_size"].action == "error"
    assert table["io_order"].action == "report"
    assert [name for name, rule in table.items() if rule.action == "off"] == ["compile_budget"]


def test_actions_beyond_the_known_are_refused() -> None:
    options = abi.SimOptions(text=b"", text_n=0, actions=b"\x03", action_n=1)
    with pytest.raises(Exception, match="rule dialect: action 3"):
        find.library().anepy_sim_create(
            ctypes.byref(ctypes.c_void_p()), ctypes.byref(options), (ctypes.c_int32 * 2)()
        )
