"""The program table, its MIL text and weight file, and the native forms: what they compute.

Every program runs on the simulator with all rules of the oldest chip as errors, and natively, and
both must equal the float64 reference. The last section mutates the text: a change that no check
here notices would mean that a line does nothing, or that nothing looks at it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

import needs
import numpy as np
import pytest
from cases import LINEAR, LLAMA3, message
from program_cases import Array, Case, f64, join_groups, make_case, random_model
from reference import llama64 as ref
from tolerances import relative_error

from anepy.errors import AnepyError, ConfigError, UnsupportedError
from anepy.hardware import programs as mil
from anepy.hardware.program import CHIPS, Program
from anepy.models.model import Model, ModelConfig

# About ten roundings of 2^-11 in a row, at random; the largest measured is 2.1e-3.
FP16_PROGRAM = 4e-3
# float32 sums of up to 40000 terms in soft-max; products are below 2e-6.
NATIVE_PROGRAM = 2e-5

STATIC = ("sdpa_fwd", "ffn_fwd", "ffn_bwd", "sdpa_bwd1", "sdpa_bwd2", "qkv_bwd")
OFFLOADS = (
    *("rmsnorm_bwd", "rmsnorm_bwd_ffn", "rmsnorm_bwd_final", "final_rmsnorm"),
    *("classifier_fwd", "classifier_bwd", "softmax"),
)
NAMES = (*STATIC, *OFFLOADS)
# Of whole layers and of weight gradients: held against float64 as parts of a step, in tests/engine.
WHOLE = ("layer_fwd", "layer_bwd", "layer_dw", "head_fwd", "head_bwd", "classifier_dw")

# name -> (dimensions, tokens, width). Between them: head sizes that are and are not multiples of
# 32, groups of 1 to 4 query heads, one head, one KV head, sizes no chip's alignment divides,
# vocabularies of one product, of several, and of two parts.
SHAPES: dict[str, tuple[ModelConfig, int, int]] = {
    "stories260K": (ModelConfig(64, 172, 1, 8, 4, 512, 512), 100, 128),
    "stories15M": (ModelConfig(288, 768, 1, 6, 6, 700, 256), 60, 64),
    "stories110M": (ModelConfig(768, 2048, 1, 12, 12, 600, 1024), 64, 64),
    "three heads": (ModelConfig(96, 100, 1, 3, 1, 4500, 64), 33, 64),
    "five heads": (ModelConfig(60, 50, 1, 5, 5, 40000, 64), 64, 64),
    "group of four": (ModelConfig(256, 300, 1, 8, 2, 9000, 192), 150, 192),
    "one head": (ModelConfig(32, 64, 1, 1, 1, 40, 64, tied=False), 1, 64),
    "wide heads": (ModelConfig(64, 96, 1, 4, 2, 160, 128, 32, 1e-6, 1e6, LLAMA3), 100, 128),
    "biases": (ModelConfig(64, 96, 1, 6, 2, 160, 128, 20, qkv_bias=True), 100, 128),
    "norms": (ModelConfig(64, 96, 1, 4, 2, 160, 128, 32, 1e-6, 1e6, qk_norm=True), 100, 128),
    "norms and biases": (
        ModelConfig(60, 96, 1, 6, 3, 160, 128, 20, qkv_bias=True, qk_norm=True),
        *(33, 64),
    ),
    "narrow heads": (ModelConfig(100, 80, 1, 3, 1, 97, 64, 20, 0.01, 500.0, LINEAR), 33, 64),
}
FORMS = {
    "1.3": ("1.3", False),
    "1.0": ("1.0", False),
    "live": ("1.3", True),
    "live 1.0": ("1.0", True),
}

_models: dict[str, Model] = {}


def model_of(shape: str) -> Model:
    """Return the model of a shape, made once."""
    if shape not in _models:
        _models[shape] = random_model(SHAPES[shape][0])
    return _models[shape]


def compile_text(text: str, blob: bytes, chip: str = "m1") -> Program:
    """Parse a text as the oldest chip would, every rule an error.

    Values below 2^-14 are the inputs' business, not the program's: that one is only reported.
    """
    files = {mil.WEIGHT_FILE: blob} if blob else {}
    return Program(text, files, chip=chip, strict=True, rules={"subnormal": "report"})


def simulate(case: Case, text: str, blob: bytes, chip: str = "m1", function: str = "main") -> Array:
    """Run a case on the simulator and return z_out."""
    with compile_text(text, blob, chip) as program:
        outputs = program.run(case.inputs, function)
        assert set(program.reports) <= {"subnormal"}
    assert list(outputs) == ["z_out"]
    return outputs["z_out"]


def parts_of(model: Model, name: str, width: int) -> int:
    return mil.describe(model.table, name, width=width).parts


# --------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_program_on_the_simulator_equals_the_reference(shape: str, form: str, name: str) -> None:
    model, (_, n, width), (dialect, live) = model_of(shape), SHAPES[shape], FORMS[form]
    for part in range(parts_of(model, name, width)):
        case = make_case(model, name, n, width=width, part=part, live=live)
        out = simulate(case, *mil.generate(model, [case.program], dialect))
        errors = case.errors(out)
        assert max(errors.values()) < FP16_PROGRAM, errors


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_program_run_natively_equals_the_reference(shape: str, name: str) -> None:
    model, (_, n, width) = model_of(shape), SHAPES[shape]
    for part in range(parts_of(model, name, width)):
        case = make_case(model, name, n, width=width, part=part)
        errors = case.errors(mil.run_native(model, case.program, case.packed, n=n, threads=2))
        assert max(errors.values()) < NATIVE_PROGRAM, errors


@pytest.mark.parametrize("name", NAMES)
def test_program_of_a_trained_model_is_right_in_the_last_layer(name: str) -> None:
    model = Model.load(needs.data("stories260K.bin"))
    case = make_case(model, name, 128, width=128, layer=model.config.n_layers - 1)
    out = simulate(case, *mil.generate(model, [case.program]))
    assert max(case.errors(out).values()) < FP16_PROGRAM
    native = mil.run_native(model, case.program, case.packed)
    assert max(case.errors(native).values()) < NATIVE_PROGRAM


def test_programs_are_right_at_the_length_models_train_with() -> None:
    model = random_model(ModelConfig(128, 344, 1, 4, 2, 300, 1024))
    for name in ("sdpa_fwd", "sdpa_bwd1", "sdpa_bwd2"):
        case = make_case(model, name, 256, width=256)
        errors = case.errors(simulate(case, *mil.generate(model, [case.program])))
        assert max(errors.values()) < FP16_PROGRAM, errors


def test_parts_of_the_classifier_add_up() -> None:
    model = model_of("five heads")
    classifier = f64(model.weights["tok_embeddings.weight"])
    dx, rows = np.zeros((64, 60)), []
    assert parts_of(model, "classifier_bwd", 64) == 2
    for part in range(2):
        case = make_case(model, "classifier_bwd", 64, part=part)
        out = simulate(case, *mil.generate(model, [case.program]))
        dx += f64(out[0, :, 0].T)
        rows.append(f64(case.packed.T))
    expected = np.concatenate(rows, axis=1) @ classifier
    assert relative_error(dx, expected) < FP16_PROGRAM


@pytest.mark.parametrize("vocab", [32000, 512, 300, 40])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_softmax_groups_join_to_the_probabilities_of_the_whole_vocabulary(
    vocab: int, spread: float
) -> None:
    """One soft-max over 32000 near-equal logits is 3e-5 throughout, zero on the engine: seen."""
    model = random_model(ModelConfig(32, 32, 1, 1, 1, vocab, 64))
    program = mil.describe(model.table, "softmax")
    rng = np.random.default_rng(4)
    logits = (7.0 + spread * rng.standard_normal((64, vocab))).astype(np.float16)
    case = Case(program, {"a_in": logits.T[None, :, None]}, {}, 64)
    out = simulate(case, *mil.generate(model, [program]))[0, :, 0].T
    with np.errstate(divide="ignore"):  # a flushed probability is never the largest of its group
        probs, lse = join_groups(f64(out), f64(logits))
    expected = f64(logits)
    assert relative_error(probs, ref.softmax(expected)) < FP16_PROGRAM
    top = expected.max(axis=1)
    assert np.abs(lse - top - np.log(np.exp(expected.T - top).sum(axis=0))).max() < 1e-3


@pytest.mark.parametrize("dim", [64, 288, 768])
@pytest.mark.parametrize("size", [0.01, 0.02, 0.1, 0.5, 3.0, 30.0, 300.0])
def test_rmsnorm_keeps_its_precision_over_the_range_of_activations(dim: int, size: float) -> None:
    """0.02 is a fresh model's embedding: squares of it vanish in fp16; 300 squared overflows."""
    model = random_model(ModelConfig(dim, 32, 1, dim // 32, dim // 32, 32, 64))
    weight = f64(model.weights["norm.weight"])
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((64, dim)) * size).astype(np.float16)
    dy = (rng.standard_normal((64, dim)) * 4.0).astype(np.float16)
    x64, dy64 = f64(x), f64(dy)
    for name, packed, expected in (
        ("final_rmsnorm", x, ref.rmsnorm(x64, weight)),
        (
            "rmsnorm_bwd_final",
            np.concatenate([dy, x], 1),
            ref.rmsnorm_backward(dy64, x64, weight)[0],
        ),
    ):
        program = mil.describe(model.table, name)
        case = Case(program, {"a_in": packed.T[None, :, None]}, {}, 64)
        out = simulate(case, *mil.generate(model, [program]))
        assert relative_error(out[0, :, 0].T, expected) < 1e-3


def test_rmsnorm_of_zeros_is_zero() -> None:
    model = model_of("stories260K")
    program = mil.describe(model.table, "final_rmsnorm")
    zeros = {"a_in": np.zeros((1, 64, 1, program.width), np.float16)}
    assert not simulate(Case(program, zeros, {}, 0), *mil.generate(model, [program])).any()


def test_attention_with_extreme_scores_stays_finite() -> None:
    """Scores of +-12000 plus the mask: -65504 would give infinities, and with them NaN."""
    model = model_of("stories110M")
    case = make_case(model, "sdpa_bwd1", 64)
    packed = case.inputs["a_in"].copy()
    rng = np.random.default_rng(2)
    signs = rng.choice((-1.0, 1.0), (64, 1, 64))
    for port in case.program.kind("input")[:2]:
        block = np.tile(signs[:, 0] * 38.0, (port.channels // 64, 1))
        packed[0, port.channel : port.channel + port.channels, 0] = block
    case = Case(case.program, {"a_in": packed}, {}, 64)
    out = f64(simulate(case, *mil.generate(model, [case.program])))
    assert np.isfinite(out).all()
    probs = out[0, 768 : 768 + 12 * 64, 0].reshape(12, 64, 64)
    assert np.allclose(probs.sum(-1), 1.0, atol=5e-3)
    assert not np.triu(probs, 1).any()


def test_columns_behind_the_tokens_change_nothing_before_them() -> None:
    """Padding columns may hold anything finite forward; backward their gradients are zero."""
    model, n = model_of("three heads"), 40
    rng = np.random.default_rng(3)
    for name, dirty in (("sdpa_fwd", ("x",)), ("sdpa_bwd1", ("q", "k", "v"))):
        case = make_case(model, name, n)
        text, blob = mil.generate(model, [case.program])
        clean = simulate(case, text, blob)
        packed = case.inputs["a_in"].copy()
        for port in case.program.kind("input"):
            if port.name in dirty:
                rows = slice(port.channel, port.channel + port.channels)
                packed[0, rows, 0, n:] = rng.standard_normal((port.channels, 64 - n))
        other = simulate(Case(case.program, {"a_in": packed}, {}, n), text, blob)
        for port in case.program.kind("output"):
            rows = slice(port.channel, port.channel + port.channels)
            if port.name in ("probs", "dprobs"):
                a, b = (o[0, rows, 0].reshape(3, 64, 64)[:, :n, :n] for o in (clean, other))
            else:
                a, b = (o[0, rows, 0, :n] for o in (clean, other))
            assert a.tobytes() == b.tobytes(), f"{name}.{port.name}"


# ----------------------------------------------------------------------------- several procedures


@pytest.mark.parametrize("dialect", mil.DIALECTS)
@pytest.mark.parametrize("live", [False, True], ids=["baked", "live"])
def test_procedures_of_one_text_equal_single_programs(dialect: str, live: bool) -> None:
    config = ModelConfig(64, 100, 3, 4, 2, 300, 64)
    model = random_model(config)
    cases = [
        make_case(model, name, 64, layer=layer, live=live)
        for layer in range(config.n_layers)
        for name in STATIC
    ]
    text, blob = mil.generate(model, [case.program for case in cases], dialect)
    alone = 0
    with compile_text(text, blob) as program:
        names = tuple(f"procedure{i:03}" for i in range(len(cases)))
        assert program.functions == names and tuple(sorted(names)) == names
        for name, case in zip(names, cases, strict=True):
            single = mil.generate(model, [case.program], dialect)
            alone += len(single[1])
            expected = simulate(case, *single)
            assert program.run(case.inputs, name)["z_out"].tobytes() == expected.tobytes()
    # Masks, angles and the like are there once.
    assert len(blob) < 0.9 * alone


def test_text_and_weights_are_the_same_each_time() -> None:
    model = model_of("stories260K")
    programs = [mil.describe(model.table, name) for name in STATIC]
    assert mil.generate(model, programs) == mil.generate(model, programs)


# ------------------------------------------------------------------------------- text and weights

HEADERS = {
    "1.3": "program(1.3)\n"
    '[buildInfo = dict<string, string>({{"coremlc-component-MIL", "3510.2.1"}, '
    '{"coremlc-version", "3505.4.1"}, {"coremltools-component-milinternal", ""}, '
    '{"coremltools-version", "9.0"}})]\n{\n    func main<ios18>(tensor<fp16, [1, ',
    "1.0": "program(1.0)\n"
    "[buildInfo = dict<tensor<string, []>, tensor<string, []>>("
    '{{"coremlc-component-MIL", "3510.2.1"}, {"coremlc-version", "3505.4.1"}, '
    '{"coremltools-component-milinternal", ""}, {"coremltools-version", "9.0"}})]\n{\n'
    "    func main<ios16>(tensor<fp16, [1, ",
}
# What both dialects have and every generation compiles (docs/neural-engine.md#operations).
OPERATIONS = {
    *("const", "conv", "matmul", "softmax", "pow", "tanh", "mul", "add", "sub"),
    *("slice_by_size", "concat", "reshape", "transpose"),
}
LINE = re.compile(
    r"^        (\S+(?: \[[^\]]*\]>)?) (\w+) = (\w+)\((.*)\)\[name = [^(]+\(\"(\w+)\"\)"
)


def check_frame(text: str, dialect: str) -> None:
    """Fail if the frame is not exactly one the compilers have been seen to accept."""
    assert text.startswith(HEADERS[dialect])
    assert text.endswith("    } -> (z_out);\n}\n")


def every_text() -> Iterator[tuple[str, str, bytes]]:
    """Yield dialect, text and weights of every program in every form, at an awkward shape."""
    for shape in ("stories260K", "three heads"):
        model = model_of(shape)
        for dialect, live in FORMS.values():
            for name in NAMES:
                program = mil.describe(model.table, name, width=64, live=live)
                yield dialect, *mil.generate(model, [program], dialect)


def test_text_has_the_frame_and_only_operations_every_chip_knows() -> None:
    for dialect, text, _ in every_text():
        check_frame(text, dialect)
        body = text.split(") {\n", 1)[1].split("    } ->")[0].splitlines()
        names = set()
        for line in body:
            match = LINE.match(line)
            assert match is not None, line
            name, operation, label = match.group(2, 3, 5)
            assert operation in OPERATIONS and name == label
            assert name not in names, f"{name} is declared twice"
            assert re.fullmatch(r"[ckv]\d\d+(_\w+)?|z_out", name)
            names.add(name)
        for name in names:
            assert len(re.findall(rf"\b{name}\b", text)) > 2, f"nothing uses {name}"


def test_text_of_the_old_dialect_has_no_bare_scalar() -> None:
    for dialect, text, _ in every_text():
        scalars = re.findall(r"(?<!<)\b(?:string|bool|int32|fp16|uint64)[ (]", text)
        assert bool(scalars) == (dialect == "1.3")
        assert all(re.fullmatch(r"-?0x1(\.[0-9a-f]+)?p[+-]\d+", v) for v in half_scalars(text))


def half_scalars(text: str) -> list[str]:
    """Return the fp16 scalars of a text."""
    return re.findall(r"val = (?:fp16|tensor<fp16, \[\]>)\(([^)]*)\)", text)


def test_scalars_of_a_text_are_exact_fp16() -> None:
    for _, text, _ in every_text():
        for scalar in half_scalars(text):
            value = float.fromhex(scalar)
            assert float(np.float16(value)) == value and abs(value) >= 2.0**-14


def records(text: str, blob: bytes) -> dict[int, bytes]:
    """Return the payload of every record a text names."""
    found = {}
    for offset in map(int, re.findall(r"offset = (?:uint64|tensor<uint64, \[\]>)\((\d+)\)", text)):
        sentinel, kind, n, start = struct.unpack_from("<IIQQ", blob, offset)
        assert (sentinel, kind, start) == (0xDEADBEEF, 1, offset + 64)
        assert start + n <= len(blob)
        found[offset] = blob[start : start + n]
    return found


def test_weights_are_the_rounded_weights_of_the_layer_forward_and_transposed() -> None:
    config = ModelConfig(96, 100, 2, 3, 1, 4500, 64)
    model = random_model(config)
    w = {k: v.astype(np.float16) for k, v in model.weights.items()}
    for name, wanted in (
        ("ffn_fwd", {"feed_forward.w1": False, "feed_forward.w3": False, "feed_forward.w2": False}),
        ("ffn_bwd", {"feed_forward.w1": True, "feed_forward.w3": True, "feed_forward.w2": True}),
        ("qkv_bwd", {"attention.wq": True, "attention.wk": True, "attention.wv": True}),
        ("sdpa_fwd", {"attention.wq": False, "attention.wk": False, "attention.wo": False}),
        ("sdpa_bwd1", {"attention.wo": True}),
    ):
        text, blob = mil.generate(model, [mil.describe(model.table, name, layer=1)])
        payloads = set(records(text, blob).values())
        for key, transposed in wanted.items():
            matrix = w[f"layers.1.{key}.weight"]
            assert (matrix.T if transposed else matrix).tobytes() in payloads, f"{name}: {key}"


def test_every_record_of_the_weight_file_is_named() -> None:
    for _, text, blob in every_text():
        count = len(records(text, blob))
        assert count == (struct.unpack_from("<I", blob)[0] if blob else 0)
        assert ("BLOBFILE" in text) == bool(blob)


def test_live_text_does_not_depend_on_the_weights() -> None:
    a, b = (random_model(SHAPES["three heads"][0], seed) for seed in (1, 2))
    for name in NAMES:
        program = mil.describe(a.table, name, live=True)
        assert mil.generate(a, [program]) == mil.generate(b, [program])
        assert mil.generate(a.table, [program]) == mil.generate(a, [program])


# -------------------------------------------------------------------------------------- the table


def test_names_are_those_of_the_design() -> None:
    assert sorted(mil.names()) == sorted((*NAMES, *WHOLE))
    model = model_of("stories260K")
    for name in WHOLE:
        program = mil.describe(model.table, name, width=64)
        with pytest.raises(UnsupportedError, match=f"device cpu has no program {name}"):
            mil.run_native(model, program, np.zeros((program.input_channels, 64)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_ports_fill_the_packed_surfaces_without_gaps(shape: str, name: str) -> None:
    program = mil.describe(model_of(shape).table, name, live=True)
    for kind, surface, total in (
        ("input", "a_in", program.input_channels),
        ("output", "z_out", program.output_channels),
    ):
        at = 0
        for port in program.ports:
            if port.kind == kind:
                assert (port.surface, port.channel, port.columns) == (surface, at, program.width)
                at += port.channels
        assert at == total > 0
    surfaces = ["a_in", *(port.surface for port in program.kind("weight"))]
    assert sorted(surfaces) == surfaces
    for port in program.kind("weight"):
        assert port.columns % 32 == 0
        assert port.shape[0] == 1 or port.channels % 32 == 0


def test_width_defaults_to_the_sequence_length_rounded_up() -> None:
    table = random_model(ModelConfig(32, 32, 1, 1, 1, 40, 70)).table
    assert mil.describe(table, "ffn_fwd").width == 128


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"name": "sdpa"}, "unknown program 'sdpa': use one of sdpa_fwd, ffn_fwd"),
        ({"width": 100}, "width 100, expected a multiple of 64"),
        ({"width": 32}, "width 32, expected a multiple of 64"),
        ({"width": 16448}, "up to 16384"),
        ({"width": -64}, "width is -64"),
        ({"layer": 1}, "layer 1, the model has 0 to 0"),
        ({"layer": 1 << 40}, "layer is"),
        ({"part": 1}, "part 1, it has 0 to 0"),
    ],
)
def test_description_of_what_cannot_be_is_refused(options: dict[str, object], why: str) -> None:
    arguments = {"name": "sdpa_fwd", **options}
    assert why in message(lambda: mil.describe(model_of("one head").table, **arguments))  # type: ignore[arg-type]


def test_unknown_dialect_is_refused() -> None:
    model = model_of("one head")
    program = mil.describe(model.table, "ffn_fwd")
    assert "use one of 1.3, 1.0" in message(lambda: mil.generate(model, [program], "1.5"))
    assert "name at least one" in message(lambda: mil.generate(model, []))


@pytest.mark.parametrize(
    ("config", "name", "width", "why"),
    [
        (ModelConfig(64, 16448, 1, 2, 2, 40, 64), "ffn_fwd", 64, "sums over 16448 terms"),
        (ModelConfig(128, 64, 1, 64, 1, 40, 512), "sdpa_fwd", 512, "an extent above 16384"),
        (ModelConfig(256, 64, 1, 128, 128, 40, 512), "sdpa_bwd1", 512, "takes at most 65536"),
        (ModelConfig(32, 64, 1, 1, 1, 65537, 64), "softmax", 64, "65536 channels"),
    ],
)
def test_program_too_large_for_the_chips_is_refused(
    config: ModelConfig, name: str, width: int, why: str
) -> None:
    model = Model(config)
    program = mil.describe(model.table, name, width=width)
    text = message(lambda: mil.generate(model, [program]), AnepyError)
    assert text.startswith(f"program {name}: ") and why in text


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e6])
@pytest.mark.parametrize("tensor", ["attention.wk", "attention_norm"])
def test_weight_that_does_not_fit_fp16_is_refused(value: float, tensor: str) -> None:
    model = random_model(ModelConfig(32, 64, 2, 1, 1, 40, 64))
    model.weights[f"layers.1.{tensor}.weight"].flat[7] = value
    mil.generate(model, [mil.describe(model.table, "sdpa_fwd", layer=0)])
    for name in ("sdpa_fwd", "qkv_bwd" if tensor == "attention.wk" else "rmsnorm_bwd"):
        program = mil.describe(model.table, name, layer=1)
        text = message(lambda p=program: mil.generate(model, [p]), AnepyError)  # type: ignore[misc]
        assert f"program {name}: layer 1: a value of {tensor.split('.')[-1]}" in text


def test_native_run_checks_the_shape_of_its_input() -> None:
    model = model_of("one head")
    program = mil.describe(model.table, "ffn_fwd")
    with pytest.raises(ConfigError, match="takes 32 x 64 values, not 32 x 63"):
        mil.run_native(model, program, np.zeros((32, 63)))


def test_native_run_does_not_depend_on_threads() -> None:
    model = model_of("group of four")
    for name in NAMES:
        case = make_case(model, name, 150, width=192)
        one, two = (mil.run_native(model, case.program, case.packed, threads=t) for t in (1, 2))
        assert one.tobytes() == two.tobytes()


# -------------------------------------------------------------------------------------- mutations


def caught(case: Case, text: str, blob: bytes) -> bool:
    """Tell whether any check of this module fails for a text."""
    try:
        check_frame(text, "1.3")
        errors = case.errors(simulate(case, text, blob))
    except (AnepyError, AssertionError):
        return True
    return not max(errors.values()) < FP16_PROGRAM


def mutants(text: str) -> Iterator[tuple[str, str]]:
    """Yield what was done, and the text: every line removed, slices swapped, offsets changed."""
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        yield f"without line {i + 1}: {line.strip()}", "".join(lines[:i] + lines[i + 1 :])
    slices = [i for i, line in enumerate(lines) if " = slice_by_size(" in line]
    for i in slices:
        for j in slices:
            for part in ("begin", "size"):
                a, b = (re.search(rf"{part} = (\w+)", lines[k]) for k in (i, j))
                assert a is not None and b is not None
                if i < j and a.group(1) != b.group(1):
                    changed = lines.copy()
                    changed[i] = lines[i].replace(a.group(), b.group())
                    changed[j] = lines[j].replace(b.group(), a.group())
                    yield f"{part} of lines {i + 1} and {j + 1} swapped", "".join(changed)
    for i, line in enumerate(lines):
        listed = re.search(r"values = \(([^)]*)\)", line)
        values = listed.group(1).split(", ") if listed else []
        for j in range(len(values) - 1):
            other = [*values[:j], values[j + 1], values[j], *values[j + 2 :]]
            swapped = line.replace(", ".join(values), ", ".join(other))
            yield f"values {j} and {j + 1} swapped", "".join([*lines[:i], swapped, *lines[i + 1 :]])
        operands = re.search(r" = sub\(x = (\w+), y = (\w+)\)", line)
        if operands:
            swapped = line.replace(
                operands.group(), " = sub(x = {1}, y = {0})".format(*operands.groups())
            )
            yield (
                f"operands of line {i + 1} swapped",
                "".join([*lines[:i], swapped, *lines[i + 1 :]]),
            )
    for word, other_word in (("false", "true"), ("true", "false")):
        if f"bool({word})" in text:
            yield f"{word} to {other_word}", text.replace(f"bool({word})", f"bool({other_word})")
    offsets = sorted({int(o) for o in re.findall(r"uint64\((\d+)\)", text)})
    for old in offsets:
        for new in sorted({0, old - 64, old + 64, old + 1, *offsets} - {old}):
            yield f"offset {old} to {new}", text.replace(f"uint64({old})", f"uint64({new})")


# Heads in groups and padded; and heads of equal number, so that slices can be mistaken for others.
MUTATED = {
    "grouped": ModelConfig(64, 96, 1, 8, 4, 200, 64),
    "plain": ModelConfig(64, 64, 1, 2, 2, 4500, 64, tied=False),
    "norms": ModelConfig(64, 96, 1, 4, 2, 200, 64, 32, qk_norm=True),
}


@pytest.mark.parametrize("live", [False, True], ids=["baked", "live"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [(n, s) for n in NAMES for s in MUTATED if s != "norms" or n == "sdpa_fwd"],
)
def test_change_of_one_place_in_the_text_is_noticed(name: str, shape: str, live: bool) -> None:
    """None of 4151 changes survives: 324 fall with the frame, 3504 with the parser and its rules,
    323 parse and return other numbers (counted on 2026-11-29; all of them run here each time).
    """
    if shape not in _models:
        _models[shape] = random_model(MUTATED[shape])
    case = make_case(_models[shape], name, 50, live=live)
    text, blob = mil.generate(_models[shape], [case.program])
    assert not caught(case, text, blob)
    survivors = [what for what, changed in mutants(text) if not caught(case, changed, blob)]
    assert not survivors


def test_program_is_the_same_for_every_chip() -> None:
    model = model_of("stories260K")
    for name in NAMES:
        case = make_case(model, name, 64)
        text, blob = mil.generate(model, [case.program])
        for chip in CHIPS[1:]:
            assert max(case.errors(simulate(case, text, blob, chip)).values()) < FP16_PROGRAM
