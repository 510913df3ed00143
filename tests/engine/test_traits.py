"""Device details behind the colon, the compile budget in the engine, and MIL text slot by slot."""

from __future__ import annotations

import children
import numpy as np
import pytest
from cases import bits

from anepy.engine import Engine
from anepy.errors import ConfigError
from anepy.hardware.program import Program
from anepy.models.model import Model, ModelConfig

SMALL = ModelConfig(64, 96, 2, 4, 2, 97, 64)
BAKED = 2 * 7 + 4  # programs with weights: all but sdpa_bwd2 and softmax
ALL = BAKED + 2  # these two are the same for all layers


def train(device: str, **options: bool) -> tuple[list[float], dict[str, bytes], int]:
    """Make three updates; return losses, weights and compilations."""
    ids = np.random.default_rng(0).integers(0, 97, 65)
    model, losses = Model.init(SMALL, seed=1), []
    with Engine(model, device=device, **options) as engine:
        for _ in range(3):
            losses.append(engine.step(ids[:-1], ids[1:]).loss)
            engine.update(lr=1e-2)
        losses.append(engine.evaluate(ids[:-1], ids[1:]))
        return losses, bits(model.weights), engine.compiles


@pytest.mark.parametrize(
    ("details", "compiles"),
    [
        ("m4", 4),
        ("m4,dialect=1.0", 4),
        ("dialect=1.3", 4),
        ("surface=131072", 4),
        ("surface=64,reuse=no", 4),
        ("m4,procedures=no", ALL + 3 * BAKED),
    ],
)
def test_details_change_how_programs_are_compiled_and_no_number(
    details: str, compiles: int
) -> None:
    losses, weights, count = train("sim")
    assert count == 4
    assert train(f"sim:{details}") == (losses, weights, compiles)


@pytest.mark.parametrize(
    "details",
    [
        "", "m0", "m7", "M4", "m4,", ",m4", "m4 ,budget=3", "budget=", "budget=0", "budget=-1",
        "budget=1e3", "budget=9999999999", "budget=3x", "surface=0", "surface=100", "dialect=1.2",
        "procedures=yes", "reuse", "speed=9", "x" * 300,
    ],
)  # fmt: skip
def test_unknown_details_are_refused_with_what_there_is(details: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown device detail '.*': use m1 to m6, dialect="):
        Engine(Model.init(SMALL), device=f"sim:{details}")


@pytest.mark.parametrize("details", ["", "threads=4", "m4", "budget=3"])
def test_device_cpu_takes_no_details(details: str) -> None:
    """Any text was accepted and ignored."""
    with pytest.raises(ConfigError) as caught:
        Engine(Model.init(SMALL), device=f"cpu:{details}")
    assert str(caught.value) == f"device cpu takes no details: use cpu, not cpu:{details}"


def test_what_only_tests_ask_for_is_not_offered() -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(Model.init(SMALL), device="sim:fails=1")
    assert "'fails=1'" in str(caught.value) and "test-" not in str(caught.value)


def test_deferred_engine_compiles_once_for_what_is_restored() -> None:
    ids = np.arange(64)
    with Engine(Model.init(SMALL, seed=1), device="sim") as engine:
        expected = engine.evaluate(ids, ids)
    model = Model.init(SMALL, seed=2)
    with Engine(model, device="sim", defer=True) as engine:
        assert (engine.compiles, engine.stale) == (0, True)
        model.arena[...] = Model.init(SMALL, seed=1).arena
        engine.restore(0, 5)
        assert (engine.compiles, engine.stale) == (1, False)
        assert engine.evaluate(ids, ids) == expected
        assert (engine.compiles, engine.compile_budget) == (1, 0)
    assert train("sim", defer=True) == train("sim")
    with Engine(Model.init(SMALL), device="cpu", defer=True) as engine:
        engine.step(ids, ids)
        assert (engine.compiles, engine.compile_budget, engine.stale) == (0, 0, False)


BUDGET = f"""
import numpy as np
from anepy import Engine, Model, ModelConfig, Program
from anepy.errors import AnepyError, CompileBudgetError, NativeError

def refused(call):
    try:
        call()
    except CompileBudgetError as error:
        assert isinstance(error, NativeError) and (error.code, error.name) == (-42, "budget")
        return str(error)
    raise AssertionError("not refused")

model, ids = Model.init(ModelConfig({SMALL.dim}, 96, 2, 4, 2, 97, 64), seed=1), np.arange(64)
"""


def run(code: str) -> None:
    """Run code in a process of its own, for that is what a budget counts."""
    result = children.run("-c", BUDGET + code)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr


def test_budget_ends_after_a_complete_update_and_every_later_call_says_so() -> None:
    run("""
other = Engine(Model.init(model.config), device="sim")  # all engines of a process share it
engine = Engine(model, device="sim:m4,budget=3")
assert engine.compile_budget == 3
engine.step(ids, ids)
engine.update(lr=1e-2)
assert not engine.stale
stats = engine.step(ids, ids)
before = model.arena.copy()
update = engine.update(lr=1e-2)
assert engine.stale and not update.skipped and engine.updates == 2 and engine.accumulated == 0
assert not np.array_equal(model.arena, before)
after = model.arena.copy()
for call in (lambda: engine.step(ids, ids), lambda: engine.evaluate(ids, ids),
             lambda: engine.logits(ids), lambda: Engine(model, device="sim:budget=3")):
    text = refused(call)
    assert "weights need 1 compilations, this process has made 3 of the 3" in text
    assert "go on in a new process" in text
assert np.array_equal(model.arena, after) and engine.compiles == 2
engine.restore(0, 2)
refused(lambda: engine.step(ids, ids))
other.step(ids, ids)  # has no budget of its own
with Engine(model, device="sim:budget=9") as wider:  # the same weights, elsewhere
    with Engine(model, device="cpu") as exact:
        assert abs(wider.evaluate(ids, ids) - exact.evaluate(ids, ids)) < 2e-2
""")


def test_budget_is_checked_before_anything_is_compiled() -> None:
    run(f"""
device = "sim:m4,procedures=no,budget={ALL + BAKED - 1}"
engine = Engine(model, device=device)
assert engine.compiles == {ALL}
engine.step(ids, ids)
engine.update(lr=1e-2)
assert engine.stale and engine.compiles == {ALL}
assert "{BAKED} compilations, this process has made {ALL} of" in refused(
    lambda: engine.step(ids, ids))
""")


def test_failing_compilation_leaves_a_complete_update_and_is_tried_again() -> None:
    run("""
engine = Engine(model, device="sim:m4,test-fails=2")
engine.step(ids, ids)
engine.update(lr=1e-2)
engine.step(ids, ids)
engine.update(lr=1e-2)
assert engine.stale and engine.updates == 2 and engine.compiles == 2
after = model.arena.copy()
for number in (4, 5):
    try:
        engine.step(ids, ids)
    except NativeError as error:
        assert error.name == "program" and f"compilation {number} of this process" in str(error)
assert np.array_equal(model.arena, after) and engine.accumulated == 0
""")


def test_budget_of_the_interpreter_is_its_rule() -> None:
    run("""
text = '''program(1.3) { func main<ios18>(tensor<fp16, [1, 16]> x) {
    tensor<fp16, [1, 16]> y = relu(x=x)[name=string("y")]; } -> (y); }'''
made = []
try:
    for _ in range(9):
        made.append(Program(text, device="sim:m4,budget=2,test-fails=5"))
except AnepyError as error:
    assert "rule compile_budget: compilation 6 of this process, 5 are safe" in str(error)
assert len(made) == 5
""")


SUB = """program(1.3) { func main<ios18>(tensor<fp16, [1, 32]> b, tensor<fp16, [1, 32]> a) {
    tensor<fp16, [1, 32]> y = sub(x=b, y=a)[name=string("y")]; } -> (y); }"""


def test_slots_are_in_the_order_of_names_and_surfaces_have_their_own_sizes() -> None:
    one, two = np.full(40, 1, np.float16), np.full(32, 2, np.float16)
    out = np.full(50, 7, np.float16)
    with Program(SUB) as program:
        program.run_slots([one, two], [out])
        assert program.compiled and (out[:32] == 1).all() and (out[32:] == 7).all()
        with pytest.raises(ConfigError, match="1 inputs and 1 outputs, function 0 has 2 and 1"):
            program.run_slots([one], [out])
        with pytest.raises(ConfigError, match="not contiguous"):
            program.run_slots([one[::2], two], [out])


def test_reload_keeps_the_weights_of_a_finished_program() -> None:
    text = """program(1.3) { func main<ios18>(tensor<fp16, [1, 32]> x) {
        tensor<fp16, [1, 32]> w = const()[name=string("w"), val=tensor<fp16, [1, 32]>(BLOBFILE(
            path=string("@model_path/weights/w.bin"), offset=uint64(64)))];
        tensor<fp16, [1, 32]> y = mul(x=x, y=w)[name=string("y")]; } -> (y); }"""
    with Program(text, {"w.bin": np.full((1, 32), 2, np.float16)}) as program:
        program.reload({"w.bin": np.full((1, 32), 3, np.float16)})
        assert (program(x=np.ones((1, 32))) == 2).all()
