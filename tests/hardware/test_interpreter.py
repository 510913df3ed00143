"""The simulator: every operation against numpy, whole programs, and the position of every error."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from mil_samples import SAMPLES
from mil_text import Sample, blob, half, old_dialect, program

from anepy.errors import ClosedError, ConfigError, MilError
from anepy.hardware.program import Program, operations

Array = npt.NDArray[Any]


def close(got: Array, expected: Array, ulps: int) -> None:
    """Check fp16 results against an unrounded expectation.

    One ulp of the rounded value is its spacing; sums in another order may cost 2^-20 of the largest
    element more, which matters where terms cancel.
    """
    wanted = half(expected).astype(np.float64)
    room = ulps * np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float64)
    room += (ulps > 0) * (2.0**-20 * np.abs(wanted).max() + 2.0**-14)
    bad = np.abs(got.astype(np.float64) - wanted) > room
    assert not bad.any(), (got[bad][:4], wanted[bad][:4])


def run(sample: Sample, text: str) -> None:
    inputs = sample.make_inputs()
    with Program(text, sample.weights, "sim:numerics=exact", rules=sample.rules) as compiled:
        outputs = compiled.run(inputs)
    known = [value.astype(np.float32) for value in inputs.values()]
    known += [value.astype(np.float32) for value in sample.weights.values()]
    expected = sample.expected(*known)
    if not isinstance(expected, tuple):
        expected = (expected,)
    assert list(outputs) == re.findall(r"\w+", sample.outputs)
    for got, wanted in zip(outputs.values(), expected, strict=True):
        assert got.shape == np.shape(wanted)
        close(got, wanted, sample.ulps)


NAMES = [f"{i}-{sample.op}" for i, sample in enumerate(SAMPLES)]


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_operation_gives_what_numpy_does(sample: Sample) -> None:
    run(sample, sample.text)


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_operation_in_the_old_dialect_gives_the_same(sample: Sample) -> None:
    text = old_dialect(sample.text)
    assert "program(1.0)" in text
    run(sample, text)


def test_samples_cover_every_operation() -> None:
    assert {sample.op for sample in SAMPLES} == set(operations())


# ----------------------------------------------------------------------------------- whole programs

NAMED = "tensor<fp16, [1, 32, 1, 64]>"
SUB = program(f"{NAMED} b, {NAMED} a", f'{NAMED} y = sub(x=a, y=b)[name=string("y")];')
ONES = np.ones((1, 32, 1, 64), np.float16)

# As the trainers print it, in both dialects; nothing was rewritten by this module.
ATTENTION_13 = """program(1.3)
[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3510.2.1"}})]
{
    func main<ios18>(tensor<fp16, [1, 48, 1, 32]> x) {
        tensor<int32, [4]> qsh = const()[name=string("qsh"), val=tensor<int32, [4]>([1,2,8,32])];
        tensor<int32, [4]> pm = const()[name=string("pm"), val=tensor<int32, [4]>([0,1,3,2])];
        tensor<int32, [4]> bq = const()[name=string("bq"), val=tensor<int32, [4]>([0,0,0,0])];
        tensor<int32, [4]> bk = const()[name=string("bk"), val=tensor<int32, [4]>([0,16,0,0])];
        tensor<int32, [4]> bv = const()[name=string("bv"), val=tensor<int32, [4]>([0,32,0,0])];
        tensor<int32, [4]> sz = const()[name=string("sz"), val=tensor<int32, [4]>([1,16,1,32])];
        bool bF = const()[name=string("bF"), val=bool(false)];
        bool bT = const()[name=string("bT"), val=bool(true)];
        int32 sax = const()[name=string("sax"), val=int32(-1)];
        fp16 scv = const()[name=string("scv"), val=fp16(0x1.6ap-2)];
        tensor<fp16, [1,1,32,32]> cm = const()[name=string("cm"), val=tensor<fp16, [1,1,32,32]>\
(BLOBFILE(path=string("@model_path/weights/mask.bin"), offset=uint64(64)))];
        tensor<fp16, [1,16,1,32]> q0 = slice_by_size(x=x,begin=bq,size=sz)[name=string("q0")];
        tensor<fp16, [1,16,1,32]> k0 = slice_by_size(x=x,begin=bk,size=sz)[name=string("k0")];
        tensor<fp16, [1,16,1,32]> v0 = slice_by_size(x=x,begin=bv,size=sz)[name=string("v0")];
        tensor<fp16, [1,2,8,32]> q1 = reshape(shape=qsh,x=q0)[name=string("q1")];
        tensor<fp16, [1,2,32,8]> q = transpose(perm=pm,x=q1)[name=string("q")];
        tensor<fp16, [1,2,8,32]> k1 = reshape(shape=qsh,x=k0)[name=string("k1")];
        tensor<fp16, [1,2,32,8]> k = transpose(perm=pm,x=k1)[name=string("k")];
        tensor<fp16, [1,2,8,32]> v1 = reshape(shape=qsh,x=v0)[name=string("v1")];
        tensor<fp16, [1,2,32,8]> v = transpose(perm=pm,x=v1)[name=string("v")];
        tensor<fp16, [1,2,32,32]> s1 = matmul(transpose_x=bF,transpose_y=bT,x=q,\
y=k)[name=string("s1")];
        tensor<fp16, [1,2,32,32]> s2 = mul(x=s1,y=scv)[name=string("s2")];
        tensor<fp16, [1,2,32,32]> s3 = add(x=s2,y=cm)[name=string("s3")];
        tensor<fp16, [1,2,32,32]> p = softmax(axis=sax,x=s3)[name=string("p")];
        tensor<fp16, [1,2,32,8]> a1 = matmul(transpose_x=bF,transpose_y=bF,x=p,\
y=v)[name=string("a1")];
        tensor<fp16, [1,2,8,32]> a2 = transpose(perm=pm,x=a1)[name=string("a2")];
        tensor<int32, [4]> osh = const()[name=string("osh"), val=tensor<int32, [4]>([1,16,1,32])];
        tensor<fp16, [1,16,1,32]> out = reshape(shape=osh,x=a2)[name=string("out")];
    } -> (out);
}
"""
FFN_10 = """program(1.0)
[buildInfo = dict<tensor<string, []>, tensor<string, []>>({{"coremlc-component-MIL", "3304.5.2"},
  {"coremlc-version", "3304.6.2"}})]
{
    func main<ios16>(tensor<fp16, [1, 32, 1, 48]> x) {
        tensor<string, []> pt = const()[name = tensor<string, []>("pt"), val = tensor<string, []>("valid")];
        tensor<int32, [2]> st = const()[name = tensor<string, []>("st"), val = tensor<int32, [2]>([1, 1])];
        tensor<int32, [4]> pd = const()[name = tensor<string, []>("pd"), val = tensor<int32, [4]>([0, 0, 0, 0])];
        tensor<int32, []> gr = const()[name = tensor<string, []>("gr"), val = tensor<int32, []>(1)];
        tensor<fp16, [64, 32, 1, 1]> W1 = const()[name = tensor<string, []>("W1"), val = tensor<fp16, [64, 32, 1, 1]>(BLOBFILE(path = tensor<string, []>("@model_path/weights/w.bin"), offset = tensor<uint64, []>(64)))];
        tensor<fp16, [64, 32, 1, 1]> W3 = const()[name = tensor<string, []>("W3"), val = tensor<fp16, [64, 32, 1, 1]>(BLOBFILE(path = tensor<string, []>("@model_path/weights/w.bin"), offset = tensor<uint64, []>(4224)))];
        tensor<fp16, [1, 64, 1, 48]> h1 = conv(dilations = st, groups = gr, pad = pd, pad_type = pt, strides = st, weight = W1, x = x)[name = tensor<string, []>("h1")];
        tensor<fp16, [1, 64, 1, 48]> h3 = conv(dilations = st, groups = gr, pad = pd, pad_type = pt, strides = st, weight = W3, x = x)[name = tensor<string, []>("h3")];
        tensor<fp16, [1, 64, 1, 48]> sg = sigmoid(x = h1)[name = tensor<string, []>("sg")];
        tensor<fp16, [1, 64, 1, 48]> si = mul(x = h1, y = sg)[name = tensor<string, []>("si")];
        tensor<fp16, [1, 64, 1, 48]> gate = mul(x = si, y = h3)[name = tensor<string, []>("gate")];
        tensor<int32, []> ax = const()[name = tensor<string, []>("ax"), val = tensor<int32, []>(1)];
        tensor<bool, []> il = const()[name = tensor<string, []>("il"), val = tensor<bool, []>(false)];
        tensor<fp16, [1, 128, 1, 48]> out = concat(axis = ax, interleave = il, values = (h1, gate))[name = tensor<string, []>("out")];
    } -> (out);
}
"""  # noqa: E501


def test_attention_of_a_trainer_equals_float64() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 48, 1, 32)).astype(np.float16)
    mask = np.triu(np.full((32, 32), -1e4), 1).astype(np.float16)[None, None]
    out = Program(ATTENTION_13, {"mask.bin": mask})(x=x)
    q, k, v = x.astype(np.float64).reshape(3, 2, 8, 32).swapaxes(-1, -2)
    scores = q @ k.swapaxes(-1, -2) * float.fromhex("0x1.6ap-2") + mask[0].astype(np.float64)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    expected = ((p / p.sum(-1, keepdims=True)) @ v).swapaxes(-1, -2).reshape(1, 16, 1, 32)
    assert np.abs(out - expected).max() < 4e-3


def test_ffn_of_a_trainer_in_the_old_dialect_reads_two_records_of_one_file() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 32, 1, 48)).astype(np.float16)
    w1, w3 = (rng.standard_normal((64, 32)).astype(np.float16) for _ in range(2))
    file = struct.pack("<II56x", 2, 2)
    for w in (w1, w3):
        file += struct.pack("<IIQQ40x", 0xDEADBEEF, 1, 4096, len(file) + 64) + w.tobytes()
    out = Program(FFN_10, {"w.bin": file})(x=x)[0, :, 0].astype(np.float64)
    h1, h3 = (w.astype(np.float64) @ x[0, :, 0] for w in (w1, w3))
    assert np.abs(out[:64] - h1).max() < 0.02
    assert np.abs(out[64:] - h1 / (1 + np.exp(-h1)) * h3).max() < 0.3  # up to 250


def test_inputs_bind_by_name_whatever_the_declared_order() -> None:
    compiled = Program(SUB)
    assert list(compiled.inputs) == ["b", "a"]
    assert compiled.inputs["a"].shape == (1, 32, 1, 64)
    assert compiled.inputs["a"].dtype == np.float16
    assert (compiled(a=3 * ONES, b=ONES) == 2).all()
    assert compiled.reports["io_order"].message.startswith("line 4, column 51, at 'b': ")


def test_functions_of_one_program_share_weights_and_run_apart() -> None:
    frame = 'mul(x=x, y=g)[name=string("y")];'
    gains = [np.full((1, 32, 1, 1), value, np.float16) for value in (2, 3)]
    texts = [
        program(
            f"{NAMED} x", blob("g", "fp16", "1, 32, 1, 1", f"{n}.bin") + f"\n{NAMED} y = {frame}"
        )
        for n in range(2)
    ]
    functions = [re.sub(r"^.*?(func .*;\n)}\n$", r"\1", text, flags=re.S) for text in texts]
    text = "program(1.3)\n{\n" + functions[0] + functions[1].replace("main", "other") + "}\n"
    compiled = Program(text, {"0.bin": gains[0], "1.bin": gains[1]})
    assert compiled.functions == ("main", "other")
    assert (compiled(x=ONES) == 2).all()
    assert (compiled.run({"x": ONES}, function="other")["y"] == 3).all()
    with pytest.raises(ConfigError, match="no function 'third': this program has main, other"):
        compiled.run({"x": ONES}, function="third")


def test_several_outputs_come_as_a_dict_in_declared_order() -> None:
    body = f'{NAMED} z = relu(x=x)[name=string("z")];\n{NAMED} a = abs(x=x)[name=string("a")];'
    out = Program(program(f"{NAMED} x", body, outputs="z, a"))(x=-ONES)
    assert list(out) == ["z", "a"]
    assert (out["z"] == 0).all() and (out["a"] == 1).all()


def test_results_do_not_depend_on_threads_or_on_earlier_runs() -> None:
    sample = next(sample for sample in SAMPLES if sample.op == "linear")
    inputs = sample.make_inputs()
    with Program(sample.text, sample.weights, threads=1) as one:
        expected = one.run(inputs)["y"]
    with Program(sample.text, sample.weights, threads=3) as three:
        three.run(sample.make_inputs(seed=5))
        assert (three.run(inputs)["y"] == expected).all()


def test_unused_results_and_views_of_views_keep_their_buffers_apart() -> None:
    """Every intermediate is read again at the end, so that a place given away too early shows."""
    steps = [f'{NAMED} v0 = mul(x=x, y=two)[name=string("v0")];']
    names = ["v0"]
    for i in range(1, 40):
        shape = f"tensor<int32, [2]> h{i} = const()[val=tensor<int32, [2]>([64, 32])];"
        steps += [
            shape,
            f"tensor<fp16, [64, 32]> r{i} = reshape(shape=h{i}, x=v{i // 2})[];",
            f"tensor<fp16, [64, 32]> u{i} = add(x=r{i}, y=two)[];",
            f"tensor<int32, [4]> g{i} = const()[val=tensor<int32, [4]>([1, 32, 1, 64])];",
            f"{NAMED} v{i} = reshape(shape=g{i}, x=u{i})[];",
            f"{NAMED} unused{i} = exp(x=v{i})[];",
        ]
        names.append(f"v{i}")
    total = "v0"
    for i in range(1, 40):
        steps.append(f"{NAMED} t{i} = add(x={total}, y=v{i})[];")
        total = f"t{i}"
    body = 'fp16 two = const()[name=string("two"), val=fp16(2.0)];\n' + "\n".join(steps)
    out = Program(program(f"{NAMED} x", body, outputs=total))(x=ONES)
    values = [2.0]
    for i in range(1, 40):
        values.append(values[i // 2] + 2)
    assert (out == sum(values)).all()


# ------------------------------------------------------------------------------------------ errors

GOOD = """program(1.3)
[buildInfo = dict<string, string>({{"coremltools-version", "9.0"}})]
{
    func main<ios18>(tensor<fp16, [1, 32, 1, 64]> x, tensor<fp16, [1, 1, 1, 64]> z) {
        fp16 k = const()[name=string("k"), val=fp16(0.5)];
        int32 ax = const()[name=string("ax"), val=int32(1)];
        tensor<int32, [4]> sh = const()[name=string("sh"), val=tensor<int32, [4]>([1, 8, 4, 64])];
        tensor<fp16, [1, 32, 1, 64]> a = mul(x=x, y=k)[name=string("a")];
        tensor<fp16, [1, 32, 1, 64]> b = add(x=a, y=z)[name=string("b")];
        tensor<fp16, [1, 64, 1, 64]> c = concat(axis=ax, values=(a, b))[name=string("c")];
        tensor<fp16, [1, 8, 4, 64]> y = reshape(shape=sh, x=b)[name=string("y")];
    } -> (y, c);
}
"""

# What is replaced, by what, and line, column, offending words and sentence of the error.
ERRORS = [
    ("program(1.3)", "prog(1.3)", 1, 1, "prog", "expected 'program' here"),
    ("program(1.3)", "program(2.0)", 1, 9, "2.0", "expected the version of the program"),
    ("dict<string, string>", "dict<string, int32>", 2, 27, "int32", "dict<string, string>"),
    ('"9.0"', "9.0", 2, 60, "9.0", "expected a string in quotes"),
    ('"9.0"', '"9.0', 2, 60, '"9.0}})]', "the string has no end on its line"),
    ("func main", "function main", 4, 5, "function", "expected 'func' here"),
    ("<ios18>", "<ios>", 4, 15, "ios", "expected an operation set"),
    ("tensor<fp16, [1, 32, 1, 64]> x,", "tensor<fp17, [1, 32, 1, 64]> x,", 4, 29, "fp17", "a type"),
    ("64]> x,", "0]> x,", 4, 46, "0", "an extent must be a whole number from 1"),
    ("64]> x,", "64.5]> x,", 4, 46, "64.5", "an extent must be a whole number from 1"),
    ("64]> x,", "64, 2, 2]> x,", 4, 53, "2", "at most 5 dimensions"),
    ("64]> x,", "2147483647]> x,", 4, 22, "tensor", "more than 2147483647 elements"),
    ("64]> x,", "99999999999]> x,", 4, 46, "99999999999", "from 1 to 2147483647"),
    ("64]> z", "64]> x", 4, 82, "x", "this name is already declared in line 4"),
    ("[1, 1, 1, 64]> z", "[]> z", 4, 54, "tensor", "need at least one dimension"),
    ("fp16, [1, 1, 1, 64]> z", "int32, [1, 1, 1, 64]> z", 4, 54, "tensor", "not int32"),
    ("fp16(0.5)", "fp16(half)", 5, 53, "half", "expected a number for fp16"),
    ("fp16(0.5)", "fp16(70000.0)", 5, 53, "70000.0", "beyond fp16"),
    ("fp16(0.5)", "fp16(0x1p)", 5, 53, "0x1p", "expected a number for fp16"),
    ("fp16(0.5)", 'fp16("0.5")', 5, 53, "0.5", "expected a number for fp16"),
    ("val=fp16(0.5)", "val=fp32(0.5)", 5, 48, "fp32", "the value is tensor<fp32, []>, declared is"),
    ("val=fp16(0.5)", "val=x", 5, 48, "x", "the value is tensor<fp16, [1, 32, 1, 64]>"),
    (', val=fp16(0.5)', "", 5, 18, "const", "const takes the attributes name and val"),
    ("val=fp16(0.5)", "vale=fp16(0.5)", 5, 44, "vale", "const takes the attributes name and val"),
    ('string("k")', "fp16(1)", 5, 31, "fp16", "name must be a string"),
    ("int32(1)", "int32(1.5)", 6, 57, "1.5", "expected a whole number for int32"),
    ("int32(1)", "int32(3000000000)", 6, 57, "3000000000", "this does not fit int32"),
    ("[1, 8, 4, 64])", "[1, 8, 4])", 7, 83, "[", "the list has 3 entries, the type wants 4"),
    ("[1, 8, 4, 64])", "[1, 8, 4, 64, 1])", 7, 97, "1", "more than 4 entries"),
    ("[1, 8, 4, 64])", "[[1, 8], [4, 64]])", 7, 84, "[", "expected a whole number for int32"),
    ("= mul(", "= mull(", 8, 42, "mull", "no operation of this name is known"),
    ("= mul(", "= gather(", 8, 42, "gather", "not available on the ANE: look-ups stay"),
    ("= mul(", "= cond(", 8, 42, "cond", "control flow does not compile"),
    ("mul(x=x, y=k)", "mul(x=x, w=k)", 8, 51, "w", "mul has no such parameter; it takes x, y"),
    ("mul(x=x, y=k)", "mul(x=x, x=k)", 8, 51, "x", "this parameter is given twice"),
    ("mul(x=x, y=k)", "mul(x=x)", 8, 42, "mul", "mul needs the parameter y"),
    ("mul(x=x, y=k)", "mul(x=x, y=a)", 8, 53, "a", "this name is not declared before this line"),
    ("mul(x=x, y=k)", "mul(x=x, y=(k, k))", 8, 53, "(", "takes one value, not a list"),
    ("mul(x=x, y=k)", "mul(x=x, y=ax)", 8, 53, "ax", "y is int32, but x is fp16"),
    ("mul(x=x, y=k)", 'mul(x=x, y=string("k"))', 8, 53, "string", "cannot be computed with"),
    ("mul(x=x, y=k)", "mul(x=x, y=0.5)", 8, 53, "0.5", "expected a name or a typed literal"),
    ("mul(x=x, y=k)[", "mul(x=x, y=k)[axis=ax, ", 8, 56, "axis", "mul takes no such attribute"),
    ("64]> a = mul", "32]> a = mul", 8, 9, "tensor", "'a' is declared tensor<fp16, [1, 32,"),
    ("64]> a = mul", "64]> a, fp16 e = mul", 8, 50, "mul", "mul has 1 result, declared are 2"),
    ("[1, 32, 1, 64]> b", "[1, 32, 64]> b", 9, 9, "tensor", "but add gives tensor<fp16, [1, 32, 1"),
    ("y=z)", "y=sh)", 9, 53, "sh", "y is int32, but x is fp16"),
    ('y=z)[name=string("b")];', 'y=z)[name=string("b")]', 10, 9, "tensor", "expected ';' here"),
    ("axis=ax, values", "axis=int32(4), values", 10, 54, "int32", "axis 4 is outside"),
    ("axis=ax, values", "axis=k, values", 10, 54, "k", "must be one whole number, not"),
    ("axis=ax, values", "axis=z, values", 10, 54, "z", "parameter axis of concat must be a const"),
    ("values=(a, b)", "values=(a, k)", 10, 65, "(", "does not continue tensor<fp16, [1, 32"),
    ("values=(a, b)", "values=()", 10, 66, ")", "expected a name or a typed literal"),
    ("[1, 8, 4, 64])", "[1, 8, 4, 32])", 11, 55, "sh", "the shape has 1024 elements, x has 2048"),
    ("[1, 8, 4, 64])", "[-1, 8, 5, 64])", 11, 55, "sh", "extent 64 cannot be part of 2048"),
    ("[1, 8, 4, 64])", "[1, 8, 0, 64])", 11, 55, "sh", "extent 0 cannot be part of 2048"),
    ("-> (y, c);", "-> (y, d);", 12, 14, "d", "this name is not declared"),
    ("-> (y, c);", "-> (y, y);", 12, 14, "y", "this output is given twice"),
    ("-> (y, c);", "", 13, 1, "}", "expected '->' and the outputs"),
    ("-> (y, c);", "-> (y, c)", 13, 1, "}", "expected ';' here"),
    ("    } ->", "    ->", 12, 5, "->", "expected a type"),
    ("(y, c);\n}", "(y, c);\n", 14, 1, "end of text", "expected 'func' here"),
    ("(y, c);\n}", "(y, c);\n} }", 13, 3, "}", "nothing may follow the program"),
    ("fp16 k =", "fp16 k ~", 5, 16, "~", "this character does not occur in MIL text"),
    ("fp16 k =", "fp16 \x07 =", 5, 14, "?", "this character does not occur in MIL text"),
    ("= mul(x=x", "= mul(x=tensor<fp16, [9999999]>([1])", 8, 72, "[", "more than the text holds"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "words", "sentence"), ERRORS, ids=[e[1] or "-" for e in ERRORS]
)
def test_error_names_position_and_words(
    old: str, new: str, line: int, column: int, words: str, sentence: str
) -> None:
    assert old in GOOD
    with pytest.raises(MilError) as caught:
        Program(GOOD.replace(old, new, 1), rules={"return_value": "error"})
    assert sentence in str(caught.value)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert f"line {line}, column {column}, at '{words}" in str(caught.value)


def test_program_of_the_error_cases_is_right() -> None:
    out = Program(GOOD)(x=ONES, z=ONES[:, :1])
    assert (out["y"] == 1.5).all() and out["c"].shape == (1, 64, 1, 64)


WEIGHTED = program(
    f"{NAMED} x",
    blob("g", "fp16", "1, 32, 1, 1", "g.bin") + f'\n{NAMED} y = mul(x=x, y=g)[name=string("y")];',
)


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        (("g.bin", "h.bin"), "@model_path/weights/h.bin", "this weight file was not given (1 was)"),
        (("uint64(64)", "uint64(0)"), "0", "weight record"),
        (("uint64(64)", "uint64(128)"), "128", "no record starts here"),
        (("uint64(64)", "uint64(65)"), "65", "weight record"),
        (("uint64(64)", "uint64(-64)"), "-64", "this does not fit uint64"),
        (("uint64(64)", "uint64(99999999)"), "99999999", "weight record"),
        (("[1, 32, 1, 1]", "[1, 33, 1, 1]"), "64", "has 64 bytes of data, the type wants 66"),
        (("path=", "way="), "way", "BLOBFILE takes path and offset, once each"),
        ((", offset=uint64(64)", ""), "(", "BLOBFILE needs offset=uint64(...)"),
    ],
)
def test_weight_file_mismatch_is_an_error(
    change: tuple[str, str], words: str, sentence: str
) -> None:
    with pytest.raises(MilError, match=re.escape(sentence)) as caught:
        Program(WEIGHTED.replace(*change), {"g.bin": np.ones(32, np.float16)})
    assert caught.value.line == 5
    assert f"at '{words}'" in str(caught.value)


@pytest.mark.parametrize("file", [b"", b"x", bytes(64), bytes(192), b"\xef\xbe\xad\xde" * 48])
def test_weight_file_that_is_none_is_an_error(file: bytes) -> None:
    with pytest.raises(MilError, match="line 5"):
        Program(WEIGHTED, {"g.bin": file})


def test_records_that_share_their_data_keep_their_own_sizes() -> None:
    """Found by fuzzing: the longer of two constants over the same bytes got the shorter's decoding.

    The longer one then read beyond it, into whatever lay there.
    """
    file = struct.pack("<II56x", 2, 2)
    for count in (16, 32):
        file += struct.pack("<IIQQ40x", 0xDEADBEEF, 1, 2 * count, 192)
    file += np.arange(32, dtype=np.float16).tobytes()
    body = (
        blob("f", "fp16", "1, 16, 1, 1", "w.bin")
        + blob("g", "fp16", "1, 32, 1, 1", "w.bin", offset=128)
        + f"""
        tensor<fp16, [1, 16, 1, 64]> z = mul(x=w, y=f)[name=string("z")];
        {NAMED} y = mul(x=x, y=g)[name=string("y")];
        """
    )
    text = program(f"tensor<fp16, [1, 16, 1, 64]> w, {NAMED} x", body, outputs="z, y")
    out = Program(text, {"w.bin": file})(w=ONES[:, :16], x=ONES)
    assert (out["z"][0, :, 0, 0] == np.arange(16)).all()
    assert (out["y"][0, :, 0, 0] == np.arange(32)).all()


def test_no_weights_at_all_is_an_error_where_some_are_named() -> None:
    with pytest.raises(MilError, match=r"this weight file was not given \(0 were\)"):
        Program(WEIGHTED)


# ------------------------------------------------------------------------------------------ limits


def test_program_that_needs_too_much_memory_is_an_error() -> None:
    huge = "tensor<fp16, [1, 46000, 1, 46000]>"
    steps = "\n".join(f"{huge} v{i} = add(x=v{i - 1}, y=v0)[];" for i in range(1, 6))
    body = "tensor<int32, [4]> r = const()[val=tensor<int32, [4]>([1, 23000, 1, 23000])];\n"
    body += f"{huge} v0 = tile(reps=r, x=x)[];\n"
    with pytest.raises(MilError, match="the program needs more than the 16384 MiB it may have"):
        Program(program("tensor<fp16, [1, 2, 1, 2]> x", body + steps, outputs="v5"), strict=False)


def test_program_that_takes_too_long_is_an_error() -> None:
    huge = "tensor<fp16, [1, 16384, 1, 16384]>"
    body = f"{huge} y = relu(x=x)[];\n" + "\n".join(
        f"tensor<fp16, [16384, 16384]> m{i} = matmul(x=q, y=q)[];" for i in range(300)
    )
    reshape = "tensor<int32, [2]> s = const()[val=tensor<int32, [2]>([16384, 16384])];\n"
    reshape += "tensor<fp16, [16384, 16384]> q = reshape(shape=s, x=x)[];\n"
    text = program(f"{huge} x", reshape + body)
    with pytest.raises(MilError, match="multiply-adds, more than a run may"):
        Program(text)


def test_deep_nesting_is_an_error_not_a_crash() -> None:
    for piece in ("[" * 100_000, "tensor<fp16, [1]>(" * 100_000, "(" * 100_000):
        with pytest.raises(MilError, match="line 5"):
            Program(GOOD.replace("fp16(0.5)", piece, 1))


# ----------------------------------------------------------------------------------- Python's side


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"a": ONES}, "input 'b' of shape (1, 32, 1, 64) is missing"),
        ({"a": ONES, "b": ONES, "c": ONES}, "unknown input 'c': this function takes b, a"),
        ({"a": ONES, "b": ONES[0]}, "input 'b' has shape (32, 1, 64)"),
        ({"a": ONES, "b": ONES.astype(str)}, "expected numbers of shape (1, 32, 1, 64)"),
    ],
)
def test_call_with_wrong_inputs_is_refused(inputs: dict[str, Array], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Program(SUB)(**inputs)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"device": "cpu"}, "device cpu runs no MIL text; use sim"),
        ({"device": "tpu"}, "unknown device 'tpu': use one of auto, ane, cpu, sim"),
        ({"device": "sim:m9"}, "unknown device detail 'm9': use m1 to m6, dialect=1.3 or 1.0"),
        ({"chip": "m9"}, "unknown chip 'm9': use one of m1, m2, m3, m4, m5, m6"),
        ({"threads": 0}, "threads is 0"),
        ({"rules": {"speed": "off"}}, "unknown rule 'speed'"),
        (
            {"rules": {"width": "maybe"}},
            "rule width is 'maybe', expected one of off, report, error",
        ),
        ({"weights": {"g.bin": np.zeros(2)}}, "weight 'g.bin' is float64, expected float16"),
        ({"weights": {"g.bin": b"", "@model_path/weights/g.bin": b""}}, "is given twice"),
    ],
)
def test_program_with_wrong_options_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        Program(SUB, **options)


def test_numbers_beyond_fp16_become_infinite_and_other_types_are_converted() -> None:
    out = Program(SUB, rules={"saturation": "off"})(
        a=np.full(ONES.shape, 1e9), b=np.ones(ONES.shape, int)
    )
    assert np.isposinf(out).all()


def test_closed_program_cannot_run() -> None:
    compiled = Program(SUB)
    compiled.close()
    compiled.close()
    with pytest.raises(ClosedError):
        compiled(a=ONES, b=ONES)


def test_text_may_be_bytes_and_weights_of_any_buffer() -> None:
    file = struct.pack("<II56xIIQQ40x", 1, 2, 0xDEADBEEF, 1, 64, 128)
    file += np.full(32, 2, np.float16).tobytes()
    for data in (file, bytearray(file), memoryview(file)):
        assert (Program(WEIGHTED.encode(), {"g.bin": data})(x=ONES) == 2).all()
