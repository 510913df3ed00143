"""What `test_ane.py` runs in processes of its own, on a library that has the stand-ins in it.

Usage: ane_child.py COMMAND [JSON]; prints one line of JSON. Only here is the stand-ins' control
interface (`standin/control.h`) called.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from anepy.engine import Engine
from anepy.errors import AnepyError
from anepy.hardware.program import Program
from anepy.models.lora import Lora
from anepy.models.model import Model, ModelConfig

LIBRARY = ctypes.CDLL(os.environ["ANEPY_LIB"])
for name in ("broken_rule", "call_name"):
    getattr(LIBRARY, f"standin_{name}").restype = ctypes.c_char_p
for name in ("fault_hits", "calls", "live", "objects", "loaded"):
    getattr(LIBRARY, f"standin_{name}").restype = ctypes.c_int64
KINDS = ("none", "nil", "refuse", "silent", "throw", "hang", "lie", "missing")
TINY = ModelConfig(32, 48, 1, 2, 2, 61, 64)


def setting(options: dict[str, int]) -> None:
    for option, value in options.items():
        LIBRARY.standin_set(option.encode(), ctypes.c_int64(value))


def fault(call: str, nth: int, kind: str) -> None:
    LIBRARY.standin_fault(call.encode(), ctypes.c_int64(nth), KINDS.index(kind))


def calls(call: str) -> int:
    return int(LIBRARY.standin_calls(call.encode()))


def call_names() -> list[str]:
    names = []
    while (name := LIBRARY.standin_call_name(len(names))) is not None:
        names.append(name.decode())
    return names


def folders() -> list[str]:
    """Return what is left in the temporary folder; programs kept for people do not count."""
    here = Path(os.environ["TMPDIR"])
    return sorted(path.name for path in here.iterdir() if not path.name.endswith(".mil"))


def state() -> dict[str, Any]:
    """Return what must be zero, empty or nothing once all is closed."""
    return {
        "broken_rule": LIBRARY.standin_broken_rule().decode(),
        "live": LIBRARY.standin_live(),
        "loaded": LIBRARY.standin_loaded(),
        "folders": folders(),
        "gpu": [LIBRARY.gpu_take_broken(), LIBRARY.gpu_live()],
    }


def settle(objects: int) -> None:
    """Let hung calls return, and the threads that nobody waits for finish."""
    LIBRARY.standin_free_hung()
    for _ in range(20000):
        if LIBRARY.standin_live() == 0 and LIBRARY.standin_objects() <= objects:
            break
        time.sleep(0.001)


def digest(*arrays: np.ndarray) -> str:
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def sequence(vocab: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(7).integers(0, vocab, n + 1, dtype=np.int32)
    return ids[:-1], ids[1:]


def make_model(spec: str | list[int]) -> Model:
    return Model.load(spec) if isinstance(spec, str) else Model.init(ModelConfig(*spec), seed=1)


def run(
    device: str,
    model: Model,
    updates: int = 2,
    seq: int = 64,
    lora: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[str, int]:
    """Train; return a digest of every loss, gradient and weight, and the compilations."""
    seen: list[np.ndarray] = []
    tokens, targets = sequence(model.config.vocab_size, seq)
    adapter = None if lora is None else Lora(**lora)
    with Engine(model, device=device, seq_len=seq, lora=adapter, **options) as engine:
        for update in range(updates):
            for n in (seq, seq - 7):
                seen.append(np.array(engine.step(tokens[:n], targets[:n]).loss))
            seen += [value.copy() for value in engine.gradients.values()]
            engine.update(lr=1e-2 / (update + 1))
        seen.append(np.array(engine.evaluate(tokens, targets)))
        compiles = engine.compiles
    if adapter is not None:
        seen.append(adapter.arena)
    return digest(*seen, model.arena), compiles


def train(
    device: str, model: Any, settings: dict[str, int] | None = None, **options: Any
) -> dict[str, Any]:
    setting(settings or {})
    result, compiles = run(device, make_model(model), **options)
    return {"digest": result, "compiles": compiles, **state()}


def attempt(variant: str, device: str = "ane:budget=1000000") -> tuple[str, str]:
    """Return ("same", digest) or ("error", sentence), and ask a broken device twice."""
    model = Model.init(TINY, seed=1)
    tokens, targets = sequence(TINY.vocab_size, 64)
    try:
        engine = Engine(model, variant=variant, device=device, seq_len=64)
    except AnepyError as error:
        return "error", str(error)
    seen: list[np.ndarray] = []
    with engine:
        try:
            for _ in range(2):
                seen.append(np.array(engine.step(tokens, targets).loss))
                seen += [value.copy() for value in engine.gradients.values()]
                engine.update(lr=1e-2)
            seen.append(np.array(engine.evaluate(tokens, targets)))
        except AnepyError as error:
            arena = model.arena.copy()
            try:
                engine.step(tokens, targets)
            except AnepyError as again:
                if not np.array_equal(arena, model.arena) or not np.isfinite(arena).all():
                    return "damage", str(again)
                return "error", str(error)
            return "recovered", str(error)
    return "same", digest(*seen, model.arena)


def faults(selected: dict[str, list[str]], variant: str = "baseline") -> list[dict[str, Any]]:
    """Break each of the calls in each of the ways, at its first, a middle and its last time."""
    for _ in range(2):  # the second time all caches are filled
        LIBRARY.standin_reset()
        kind, expected = attempt(variant)
        assert kind == "same", expected
    counts = {call: calls(call) for call in call_names()}
    objects = LIBRARY.standin_objects()
    records = []
    for call, kinds in selected.items():
        n = max(1, counts[call])
        for how in kinds:
            for nth in [0] if how == "missing" else sorted({0, 1, (n + 1) // 2, n}):
                LIBRARY.standin_reset()
                fault(call, nth, how)
                outcome, text = attempt(variant)
                hits = LIBRARY.standin_fault_hits()
                settle(objects)
                if outcome == "same" and text != expected:
                    outcome = "different"
                records.append(
                    {
                        "call": call, "kind": how, "nth": nth, "outcome": outcome,
                        "text": text if outcome != "same" else "", "hits": hits,
                        "kept": sorted(p.name for p in Path(os.environ["TMPDIR"]).glob("*.mil")),
                        "objects": LIBRARY.standin_objects() - objects,
                        **state(),
                    }
                )  # fmt: skip
                for path in Path(os.environ["TMPDIR"]).glob("*.mil"):
                    path.unlink()
    return records


def refused(device: str, settings: dict[str, int], model: Any, **options: Any) -> dict[str, Any]:
    setting(settings)
    error = ""
    try:
        run(device, make_model(model), **options)
    except AnepyError as caught:
        error = str(caught)
    kept = sorted(path.name for path in Path(os.environ["TMPDIR"]).glob("*.mil"))
    return {"error": error, "kept": kept, **state()}


def twins(model: Any) -> dict[str, Any]:
    tokens, targets = sequence(model[5], 64)
    with Engine(make_model(model), "baseline", "ane", seq_len=64) as second:
        with Engine(make_model(model), "baseline", "ane", seq_len=64) as first:
            compiles = [second.compiles, first.compiles]
            folders_open = len(folders())
            before = [engine.evaluate(tokens, targets) for engine in (first, second)]
        after = [second.evaluate(tokens, targets)] * 2
    return {"compiles": compiles, "folders_open": folders_open, "before": before, "after": after,
            **state()}  # fmt: skip


def budget(model: Any) -> dict[str, Any]:
    error, name = "", ""
    try:
        run("ane:budget=3", make_model(model), updates=4)
    except AnepyError as caught:
        error, name = str(caught), type(caught).__name__
    return {
        "error": error, "name": name, "calls": calls("compileWithQoS:options:error:"), **state()
    }  # fmt: skip


def fork(model: Any) -> dict[str, Any]:
    tokens, targets = sequence(model[5], 64)
    reading, writing = os.pipe()
    with Engine(make_model(model), "baseline", "ane", seq_len=64) as engine:
        before = engine.evaluate(tokens, targets)
        pid = os.fork()
        if pid == 0:
            try:
                engine.evaluate(tokens, targets)
            except AnepyError as caught:
                os.write(writing, str(caught).encode())
            engine.close()
            os._exit(0)
        os.waitpid(pid, 0)
        sentence = os.read(reading, 1000).decode()
        after = engine.evaluate(tokens, targets)
    return {"child": sentence, "before": before, "after": after, **state()}


def die() -> None:
    """Leave without cleaning up."""
    engine = Engine(Model.init(TINY, seed=1), "baseline", "ane", seq_len=64)
    assert engine.device == "ane"
    os.kill(os.getpid(), signal.SIGKILL)


def modes(model: Any) -> dict[str, Any]:
    with Engine(make_model(model), "baseline", "ane", seq_len=64):
        root = Path(os.environ["TMPDIR"]) / folders()[0]
        found = [root, *sorted(root.rglob("*"))]
        names = ["" if path == root else str(path.relative_to(root)) for path in found]
        return {
            "modes": {
                name: f"{path.stat().st_mode & 0o777:o}"
                for name, path in zip(names, found, strict=True)
            }
        }


SUB = """program(1.3) { func main<ios18>(tensor<fp16, [1, 32]> b, tensor<fp16, [1, 32]> a) {
    tensor<fp16, [1, 32]> y = sub(x=b, y=a)[name=string("y")]; } -> (y); }"""
CONV = """program(1.3) { func main<ios18>(tensor<fp16, [1, 32, 1, 32]> x) {
    tensor<fp16, [32, 32, 1, 1]> w = const()[name=string("w"), val=tensor<fp16, [32, 32, 1, 1]>(
        BLOBFILE(path=string("@model_path/weights/w.bin"), offset=uint64(64)))];
    tensor<fp16, [1, 32, 1, 32]> y = conv(weight=w, x=x)[name=string("y")]; } -> (y); }"""


TWO = CONV.replace("y = conv(weight=w, x=x)", "z = conv(weight=v, x=x)").replace('"y"', '"z"')
TWO = TWO.replace("w.bin", "v.bin").replace(" w = ", " v = ").replace('string("w")', 'string("v")')
TWO = TWO[: TWO.index(" } ->")] + CONV[CONV.index("\n") :].replace("x=x", "x=z")


def caught(call: Any, *arguments: Any) -> str:
    try:
        call(*arguments)
    except AnepyError as error:
        return str(error)
    return ""


def trial(settings: dict[str, int] | None = None, device: str = "ane") -> dict[str, Any]:
    """Text on its own: two inputs, surfaces of any size, weights replaced, wrong file names."""
    setting(settings or {})
    nbytes = 65536 // 2
    one, two = np.full(nbytes, 1, np.float16), np.full(nbytes, 2, np.float16)
    out = np.zeros(nbytes, np.float16)
    seen: dict[str, Any] = {}
    with Program(SUB, device=device) as program:
        seen["compiled"] = program.compiled
        seen["small"] = caught(program.run_slots, [one[:40], two[:40]], [out[:40]])
        program.run_slots([one, two], [out])
        seen["sub"] = float(out[0])  # slots are a, b
        with Program(SUB, device=device) as again:
            seen["again"] = again.compiled
    old, new = np.full((32, 32), 0.5, np.float16), np.full((32, 32), 0.25, np.float16)
    with Program(CONV, {"w.bin": old}, device=device) as program:
        program.run_slots([one], [out])
        seen["before"] = float(out[0])
        program.reload({"w.bin": new})
        program.run_slots([one], [out])
        seen["after"] = float(out[0])
        fault("unloadWithQoS:error:", 1, "refuse")
        seen["reload"] = caught(program.reload, {"w.bin": new})
        seen["name"] = caught(program.reload, {"@model_path/other.bin": new})
    fault("compileWithQoS:options:error:", 1, "refuse")
    seen["refused"] = caught(lambda: Program(CONV, {"w.bin": new}, device=device))
    setting({"files": 1})
    with Program(TWO, {"v.bin": new, "w.bin": old}, device=device) as program:
        program.run_slots([one], [out])
        seen["packed"] = float(out[0])  # 32 times a quarter, and of these 32 times a half
        program.reload({"v.bin": old, "w.bin": old})
        program.run_slots([one], [out])
        seen["packed after"] = float(out[0])
    wide = "tensor<fp16, [1, 32]> i%02d"
    many = SUB.replace("tensor<fp16, [1, 32]> b", ", ".join(wide % i for i in range(36))).replace(
        "x=b", "x=i00"
    )
    with Program(many, device=device) as program:
        seen["many"] = caught(program.run_slots, [one] * 37, [out])
    return {**seen, **state()}


def damage(model: Any) -> dict[str, Any]:
    """A temporary folder that is missing, then one where no file can grow."""
    os.environ["TMPDIR"] += "/missing"
    missing = caught(run, "ane", make_model(model))
    os.environ["TMPDIR"] = os.path.dirname(os.environ["TMPDIR"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tokens, targets = sequence(model[5], 64)
    with Engine(make_model(model), "baseline", "ane", seq_len=64, defer=True) as engine:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # surfaces are there already
        full = caught(engine.step, tokens, targets)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"missing": missing, "full": full, **state()}


COMMANDS = {
    "train": train, "faults": faults, "refused": refused, "twins": twins, "budget": budget,
    "fork": fork, "die": die, "modes": modes, "names": call_names,
    "trial": trial, "damage": damage,
}  # fmt: skip

if __name__ == "__main__":
    arguments = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    print(json.dumps(COMMANDS[sys.argv[1]](**arguments)))
