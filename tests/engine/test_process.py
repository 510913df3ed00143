"""Threads, fork, signals, floating-point mode, environment and exit: the engine as a guest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import children
import needs
import numpy as np
import pytest
from cases import BUSY, GQA, bits, make_engine, make_model, sequence

from anepy.engine import Decoder, Engine
from anepy.errors import AnepyError, ClosedError, ConfigError, NativeError
from anepy.models.model import Model
from anepy.native.info import library_info
from anepy.system.interrupts import Uninterrupted

PRELUDE = (
    "import os, signal, sys, threading, time\n"
    "import numpy as np\n"
    "from cases import *\n"
    "from anepy.engine import *\n"
    "from anepy.native.info import library_info\n"
    "from anepy.models.model import *\n"
    "from anepy.errors import *\n"
)


def start(code: str, **environment: str | None) -> subprocess.Popen[str]:
    """Start a Python that runs this code."""
    usual: dict[str, str | None] = {"ANEPY_NUM_THREADS": None}
    return children.start("-c", code, **usual | environment)


def run(code: str, **environment: str | None) -> str:
    """Run code after PRELUDE to its end, which must be a clean one; return what it printed."""
    process = start(PRELUDE + code, **environment)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, ""), out + err
    return out


# --------------------------------------------------------------------------------------- threads


def result_of(seed: int) -> list[object]:
    """Train a little with an engine of one's own."""
    results: list[object] = []
    with Engine(make_model(seed=seed), "opt", "cpu", "fp32", threads=2) as engine:
        for number in range(6):
            results.append(engine.step(*sequence(GQA, 65, number)).loss)
            engine.update(lr=1e-2, grad_clip=1.0)
        results.append(bits(engine.model.weights))
    return results


def test_threads_with_engines_of_their_own_work_at_once() -> None:
    expected = {seed: result_of(seed) for seed in range(3)}
    found: dict[int, list[object]] = {}

    def work(seed: int) -> None:
        found[seed] = result_of(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected


def test_engine_may_move_from_thread_to_thread() -> None:
    losses = []
    with make_engine(threads=2) as engine:
        for _ in range(4):
            thread = threading.Thread(
                target=lambda: losses.append(engine.step(*sequence(GQA, 40)).loss)
            )
            thread.start()
            thread.join()
    assert len(losses) == 4 and len(set(losses)) == 1


@contextlib.contextmanager
def repeating(call: Callable[[], object]) -> Iterator[list[AnepyError]]:
    """Repeat a call in another thread while the block runs; collect errors other than "busy"."""
    stop, failures = threading.Event(), []

    def work() -> None:
        while not stop.is_set() and not failures:
            try:
                call()
            except AnepyError as error:
                if not (isinstance(error, NativeError) and error.name == "busy"):
                    failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield failures
    finally:
        stop.set()
        thread.join()


def busy_error(call: Callable[[], object]) -> NativeError:
    """Repeat a call until it meets another thread's."""
    for _ in range(10_000):
        try:
            call()
        except NativeError as error:
            if error.name == "busy":
                return error
            assert error.name == "state"  # an update right after another
    raise AssertionError("never busy")


def test_second_thread_is_told_that_the_engine_is_busy() -> None:
    tokens, targets = sequence(BUSY, 256)
    with Engine(Model.init(BUSY), device="cpu") as engine:
        with repeating(lambda: engine.step(tokens, targets)) as failures:
            for call in (
                lambda: engine.evaluate([1], [1]),
                lambda: engine.logits([1]),
                lambda: engine.step([1], [1]),
                lambda: engine.update(1e-3),
            ):
                error = busy_error(call)
                assert error.code == -30 and "another thread" in str(error)
            assert engine.seq_len == 256 and engine.accumulated >= 0
        assert not failures
        assert engine.step([1], [1]).loss > 0


def test_second_thread_is_told_that_the_decoder_is_busy() -> None:
    """Two callers mixed their activations and got wrong logits."""
    with Decoder(Model.init(BUSY)) as decoder:
        expected = decoder.forward(7, 0).copy()
        with repeating(lambda: decoder.forward(7, 0)) as failures:
            error = busy_error(lambda: decoder.forward(9, 0))
            assert error.code == -30 and "another thread" in str(error)
        assert not failures
        assert decoder.forward(7, 0).tobytes() == expected.tobytes()


def test_close_during_a_step_waits_for_it() -> None:
    """It freed the memory the step was working in and brought the process down."""
    code = (
        "ids, _ = sequence(BUSY, 256)\n"
        "for _ in range(5):\n"
        "    engine, errors = Engine(Model.init(BUSY), device='cpu'), []\n"
        "    def work():\n"
        "        try:\n"
        "            while True: engine.step(ids, ids)\n"
        "        except ClosedError as error: errors.append(error)\n"
        "    thread = threading.Thread(target=work)\n"
        "    thread.start()\n"
        "    while engine.accumulated == 0: time.sleep(0.001)\n"
        "    engine.close()\n"
        "    thread.join()\n"
        "    assert len(errors) == 1\n"
    )
    assert run(code) == ""


# ------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize("variant", ["baseline", "opt"])
def test_fork_parent_and_child_both_go_on(variant: str) -> None:
    """The pool's threads do not exist in a child, which must start its own."""
    # One thread for numpy's BLAS, so that those counted are the engine's.
    code = (
        f"engine = make_engine(variant={variant!r}, threads=3)\n"
        "expected = [engine.step(*sequence(GQA, n)).loss for n in (65, 33)]\n"
        "before = bits(engine.gradients)\n"
        "def go_on():\n"
        "    loss = engine.step(*sequence(GQA, 65)).loss\n"
        "    assert loss == expected[0], loss\n"
        "    stats = engine.update(lr=1e-2, grad_clip=1.0)\n"
        "    return hash(tuple(bits(engine.model.weights).items())), stats.grad_norm\n"
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.write(write, repr(go_on()).encode())\n"
        "    if os.path.exists('/proc/self/task'):\n"
        "        assert len(os.listdir('/proc/self/task')) == 3, 'the child computes alone'\n"
        "    engine.close()\n"
        "    engine = make_engine(threads=2)\n"
        "    assert engine.step(*sequence(GQA, 33)).loss == expected[1]\n"
        "    sys.exit(0)\n"
        "_, status = os.waitpid(child, 0)\n"
        "assert status == 0, status\n"
        "assert bits(engine.gradients) == before, 'the child wrote into the parent'\n"
        "assert os.read(read, 1000).decode() == repr(go_on())\n"
    )
    alone = {"OPENBLAS_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "1"}
    assert run(code, **alone) == ""


def test_fork_while_another_thread_steps_leaves_the_child_usable() -> None:
    code = (
        "other = Engine(Model.init(BUSY), device='cpu', threads=2)\n"
        "ids, _ = sequence(BUSY, 256)\n"
        "stop = threading.Event()\n"
        "def work():\n"
        "    while not stop.is_set(): other.step(ids, ids)\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start()\n"
        "for _ in range(5):\n"
        "    time.sleep(0.02)\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        signal.alarm(20)\n"
        "        with make_engine(threads=2) as engine:\n"
        "            engine.step(*sequence(GQA, 65))\n"
        "        del other\n"
        "        os._exit(0)\n"
        "    _, status = os.waitpid(child, 0)\n"
        "    assert status == 0, status\n"
        "stop.set()\n"
        "thread.join()\n"
        "other.step(ids, ids)\n"
    )
    assert run(code, PYTHONWARNINGS="ignore") == ""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_workers_get_the_same_numbers(method: str) -> None:
    code = (
        "import multiprocessing\n"
        "from engine import test_process\n"
        "here = test_process.result_of(1)\n"  # starts threads before the fork
        f"with multiprocessing.get_context({method!r}).Pool(2) as pool:\n"
        "    assert pool.map(test_process.result_of, [1, 1, 1]) == [here] * 3\n"
    )
    assert run(code, PYTHONWARNINGS="ignore") == ""


# --------------------------------------------------------------------------------------- signals


def test_ctrl_c_in_a_loop_of_steps_is_raised_within_a_step() -> None:
    """Worker threads must leave signals to Python, and the engine must survive."""
    code = PRELUDE + (
        "engine = Engine(Model.init(BUSY), device='cpu', threads=2)\n"
        "ids, _ = sequence(BUSY, 256)\n"
        "for _ in range(3):\n"
        "    steps = 0\n"
        "    try:\n"
        "        while True:\n"
        "            engine.step(ids, ids)\n"
        "            steps += 1\n"
        "            print('step', flush=True)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', flush=True)\n"
        "loss = engine.step(ids, ids).loss\n"
        "engine.update(lr=0.0)\n"
        "assert loss == engine.evaluate(ids, ids)\n"
    )
    process = start(code)
    assert process.stdout is not None
    try:
        for _ in range(3):
            assert process.stdout.readline() == "step\n"
            process.send_signal(signal.SIGINT)
            # What was under way ends, and one more may have begun before the signal arrived.
            lines = [process.stdout.readline() for _ in range(1)]
            while lines[-1] == "step\n" and len(lines) < 50:
                lines.append(process.stdout.readline())
            assert lines[-1] == "interrupted\n" and len(lines) <= 10, lines
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (0, "", "")


# ------------------------------------------------------------------- floating-point mode and exit


def subnormals_work() -> bool:
    """Compute with subnormal numbers in numpy's scalar and vector loops."""
    tiny = np.full(1000, 1e-40, np.float32)
    return bool(
        np.float32(1e-40) * np.float32(0.5) > 0
        and (tiny * np.float32(0.5) > 0).all()
        and (tiny + tiny > tiny).all()
        and np.float64(5e-324) * 1.0 > 0
    )


def test_floating_point_mode_of_the_caller_is_given_back() -> None:
    assert subnormals_work(), "already broken by something else"
    with make_engine() as engine, Decoder(engine.model) as decoder:
        tokens, targets = sequence(GQA, 65)
        for call in (
            lambda: engine.step(tokens, targets),
            lambda: engine.update(lr=1e-3, grad_clip=1.0),
            lambda: engine.logits(tokens),
            lambda: engine.evaluate(tokens, targets),
            lambda: decoder.forward(1, 0),
            lambda: engine.restore(accumulated=0, updates=1),
        ):
            call()
            assert subnormals_work()
        for bad in (
            lambda: engine.step([9999], [1]),
            lambda: engine.update(lr=-1.0),
            lambda: engine.logits([-1]),
            lambda: decoder.forward(1, 5),
        ):
            with pytest.raises((ConfigError, NativeError)):
                bad()
            assert subnormals_work()


def test_subnormal_moments_are_as_good_as_zero() -> None:
    """Flushed inside the engine, where they would cost time; weights must not notice."""
    results = []
    for value in (0.0, 1e-41):
        with make_engine() as engine:
            for moment in (*engine.adam_m.values(), *engine.adam_v.values()):
                moment[...] = value
            engine.step(*sequence(GQA, 65))
            engine.update(lr=1e-3)
            results.append(bits(engine.model.weights))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    "ending",
    ["", "sys.exit(0)\n", "del engine\n", "engine.close()\n", "del model, engine\n"],
    ids=["open", "exit", "forgotten", "closed", "model-first"],
)
def test_exit_is_clean_and_silent(ending: str) -> None:
    code = (
        "model = make_model()\n"
        "engine = Engine(model, threads=4)\n"
        "decoder = Decoder(model, threads=4)\n"
        "decoder.forward(1, 0)\n"
        "view = engine.gradients['norm.weight']\n"
        "engine.step(*sequence(GQA, 65))\n"
    )
    assert run(code + ending, PYTHONWARNINGS="default") == ""


def test_exit_while_a_daemon_thread_steps_is_clean() -> None:
    code = (
        "engine = Engine(Model.init(BUSY), device='cpu', threads=2)\n"
        "ids, _ = sequence(BUSY, 256)\n"
        "def work():\n"
        "    while True: engine.step(ids, ids)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "while engine.accumulated < 2: time.sleep(0.001)\n"
    )
    assert run(code) == ""


def test_unhandled_error_with_an_open_engine_exits_normally() -> None:
    code = "with make_engine() as engine:\n    engine.step([1], [2])\n    raise SystemExit(3)\n"
    process = start(PRELUDE + code)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 3


# ------------------------------------------------------------------------------------- environment


def test_import_of_the_package_loads_nothing_heavy_and_no_library() -> None:
    code = (
        "import json, sys\n"
        "import numpy\n"
        "before = set(sys.modules)\n"
        "import anepy\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
        "print([line for line in open('/proc/self/maps') if 'libanepy' in line]"
        " if sys.platform == 'linux' else [])\n"
    )
    process = start(code, ANEPY_LIB="/nonexistent")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    modules, maps = out.splitlines()
    added = set(json.loads(modules))
    heavy = {"requests", "urllib3", "rich", "typer", "click", "platformdirs", "torch", "ctypes"}
    assert "anepy" in added and not added & (heavy - {"ctypes"})
    # Importing the package alone is the point: its modules come with the first name used.
    assert added - {"__future__"} <= {"anepy", "anepy.system", "anepy.system.version", "typing"}, (
        added
    )
    assert maps == "[]"


def default_threads(before: str = "", **environment: str) -> int:
    code = f"{before}\nprint(make_engine().threads, library_info()['threads'])"
    engine, library = run(code, **environment).split()
    assert engine == library
    return int(engine)


@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("3", 3), ("7", 7), ("100000", 256)])
def test_anepy_num_threads_sets_the_default(value: str, threads: int) -> None:
    assert default_threads(ANEPY_NUM_THREADS=value) == threads


def test_anepy_num_threads_yields_to_the_argument() -> None:
    assert run("print(make_engine(threads=2).threads)", ANEPY_NUM_THREADS="5") == "2\n"


@pytest.mark.parametrize("value", ["", "0", "-3", "many"])
def test_anepy_num_threads_that_is_no_number_is_ignored(value: str) -> None:
    assert default_threads(ANEPY_NUM_THREADS=value) == default_threads()


@needs.LINUX
def test_default_threads_respect_the_affinity() -> None:
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert default_threads(one) == 1
    assert default_threads() <= len(os.sched_getaffinity(0))


def kernel_sets() -> list[str]:
    """Return those of this processor, best first, whatever mask these tests run under."""
    return run("print(*library_info()['isa_available'])", ANEPY_CPU_MASK=None).split()


@pytest.mark.parametrize("mask", needs.KERNEL_SETS)
def test_anepy_cpu_mask_chooses_this_instruction_set_or_a_lower_one(mask: str) -> None:
    allowed = needs.KERNEL_SETS[needs.KERNEL_SETS.index(mask) :]
    expected = next(isa for isa in allowed if isa in kernel_sets())
    code = (
        "info = library_info()\n"
        "assert info['gemm'].endswith(info['isa'])\n"
        "print(info['isa'], make_engine().isa)\n"
    )
    assert run(code, ANEPY_CPU_MASK=mask) == f"{expected} {expected}\n"


@pytest.mark.parametrize("mask", ["", *needs.KERNEL_SETS])
def test_precision_bf16_without_its_instructions_is_refused_never_emulated(mask: str) -> None:
    """And "auto" is fp32 then, bf16 where they are."""
    code = (
        "print(library_info()['isa'])\n"
        "with Engine(make_model(), device='cpu') as engine: print(engine.precision)\n"
        "try: Engine(make_model(), device='cpu', precision='bf16')\n"
        "except AnepyError as error: print(error)\n"
    )
    isa, automatic, *refusal = run(code, ANEPY_CPU_MASK=mask).splitlines()
    if isa.endswith("bf16"):
        assert (automatic, refusal) == ("bf16", [])
    else:
        assert automatic == "fp32" and len(refusal) == 1
        assert "precision bf16 needs bf16 dot products" in refusal[0]
        assert f"kernel set {isa}" in refusal[0]
        assert refusal[0].endswith("use --precision fp32")


def test_anepy_cpu_mask_empty_is_none() -> None:
    isa = run("print(library_info()['isa'])", ANEPY_CPU_MASK="").strip()
    assert isa == kernel_sets()[0]


@pytest.mark.parametrize("mask", ["mmx", "AVX2", "avx2 ", "x" * 200])
def test_anepy_cpu_mask_unknown_is_one_line(mask: str) -> None:
    """With device "auto" it read: unknown device 'auto'."""
    code = (
        "model = make_model()\n"
        "for call in (lambda: Engine(model), lambda: Engine(model, device='cpu'),\n"
        "             lambda: Decoder(model), library_info):\n"
        "    try: call()\n"
        "    except ConfigError as error: print(error)\n"
    )
    lines = run(code, ANEPY_CPU_MASK=mask).splitlines()
    assert len(lines) == 4 and len(set(lines)) == 1
    assert f"ANEPY_CPU_MASK={mask[:31]}" in lines[0] and "scalar" in lines[0]


def test_training_is_the_same_in_another_process() -> None:
    code = "from engine import test_process\nprint(repr(test_process.result_of(2)[:6]))"
    assert run(code) == f"{result_of(2)[:6]!r}\n"


def test_close_in_another_thread_is_learned_of() -> None:
    engine = make_engine()
    engine.step([1], [2])
    thread = threading.Thread(target=engine.close)
    thread.start()
    thread.join()
    with pytest.raises(ClosedError):
        engine.step([1], [2])


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "199999 100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_threads_respect_the_cgroup_quota(files: dict[str, str], threads: int | None) -> None:
    """In a mount namespace of our own with a cgroup folder we wrote; None: as without a quota."""
    needs.mount_namespace()
    write = "".join(
        f"mkdir -p $(dirname /sys/fs/cgroup/{name}); echo '{text}' > /sys/fs/cgroup/{name}; "
        for name, text in files.items()
    )
    code = "from anepy.native.info import library_info; print(library_info()['threads'])"
    command = f"mount -t tmpfs none /sys/fs/cgroup && {write} exec '{sys.executable}' -c \"{code}\""
    environment = {k: v for k, v in os.environ.items() if k != "ANEPY_NUM_THREADS"}
    result = subprocess.run(
        ["unshare", "-m", "sh", "-c", command], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == (threads or library_info()["threads"])


class Raised(Exception):
    pass


def test_a_handler_that_raises_does_so_after_a_complete_step() -> None:
    """Interrupted at random moments, an engine is where one is that was not."""
    tokens, targets = sequence(GQA, 24, 1)

    def work(engine: Engine) -> None:
        if engine.accumulated < 2:
            engine.step(tokens, targets)
        else:
            engine.update(lr=1e-3)

    def state(engine: Engine) -> tuple[object, ...]:
        weights = bits(engine.model.weights)
        return engine.updates, engine.accumulated, weights, bits(engine.gradients)

    def handler(*_: object) -> None:
        raise Raised

    random, interrupted = np.random.default_rng(1), 0
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with Engine(make_model(GQA), device="cpu", threads=1) as engine:
            for _ in range(100):
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 3e-3))
                    while True:
                        work(engine)
                except Raised:
                    interrupted += 1
                norm = engine.gradients["norm.weight"]
                assert norm.any() == (engine.accumulated > 0)
                del norm  # while it is held, updates clear gradients at once
            found = state(engine)
            updates, accumulated = engine.updates, engine.accumulated
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 100
    with Engine(make_model(GQA), device="cpu", threads=1) as engine:
        while (engine.updates, engine.accumulated) != (updates, accumulated):
            work(engine)
        assert state(engine) == found


def test_signals_wait_for_the_end_of_the_outermost_block() -> None:
    seen: list[str] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("handled"))
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    wakeup = signal.set_wakeup_fd(writer.fileno())
    try:
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)
            seen.append("end")
        assert seen == ["end", "handled"]
        signal.raise_signal(signal.SIGUSR1)
        assert seen == ["end", "handled", "handled"]
        assert len(reader.recv(9)) == 3  # a signal that was held back is not a second one
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGUSR1, before)
        reader.close()
        writer.close()
