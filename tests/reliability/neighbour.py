"""A step beside another process: how much longer it takes, and where the pool's threads are.

usage: python tests/reliability/neighbour.py [ROUNDS]

In turns: alone; beside a busy loop of lowest priority on CPU 0; beside a process of lowest priority
on CPU 0 whose memory grows by 100 MB a second; beside a busy loop of equal priority there. Prints,
for each, the median of a step over that of the step alone in the same round, and the share of
moments at which all threads of the pool were on one processor. Needs two processors of its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent)]

import numpy as np  # noqa: E402

from anepy import PRESETS, Engine, Model  # noqa: E402

GROWING = (
    "import mmap, time\n"
    "while True:\n"
    "    held, began = [], time.monotonic()\n"
    "    for number in range(200):\n"
    "        block = mmap.mmap(-1, 10 << 20)\n"
    "        for at in range(0, 10 << 20, 4096): block[at] = 1\n"
    "        held.append(block)\n"
    "        while time.monotonic() < began + number * 0.1: pass\n"
)
BUSY = "while True: pass"
NEIGHBOURS = {
    "nice 19, busy": (19, BUSY),
    "nice 19, growing": (19, GROWING),
    "equal, busy": (0, BUSY),
}
SECONDS = 4.0  # of each measurement


def measure(step: Callable[[], object]) -> tuple[float, float]:
    """Return the median of a step in ms, and the share of moments with both threads on one CPU."""
    times, together = [], []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            running = []
            for task in Path("/proc/self/task").iterdir():
                if int(task.name) == threading.get_native_id():
                    continue
                words = (task / "stat").read_text().rpartition(")")[2].split()
                if words[0] == "R":
                    running.append(words[36])
            if len(running) > 1:
                together.append(len(set(running)) == 1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    while time.perf_counter() < began + SECONDS:
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    over.set()
    watcher.join()
    return statistics.median(times), statistics.mean(together or [0])


def attack(rounds: int) -> dict[str, object]:
    """Measure so many rounds."""
    model = Model.init(PRESETS["stories15M"], seed=0)
    ids = np.random.default_rng(0).integers(3, 500, 257)
    ratios: dict[str, list[float]] = {name: [] for name in NEIGHBOURS}
    shares: dict[str, list[float]] = {name: [] for name in (*NEIGHBOURS, "alone")}
    with Engine(model, precision="fp32", seq_len=256, threads=2) as engine:
        for _ in range(rounds):
            alone, share = measure(lambda: engine.step(ids[:-1], ids[1:]))
            shares["alone"].append(share)
            for name, (nice, code) in NEIGHBOURS.items():
                command = [
                    "taskset",
                    "-c",
                    "0",
                    "nice",
                    "-n",
                    str(nice),
                    sys.executable,
                    "-c",
                    code,
                ]
                with subprocess.Popen(command) as other:
                    try:
                        beside, share = measure(lambda: engine.step(ids[:-1], ids[1:]))
                    finally:
                        other.kill()
                ratios[name].append(beside / alone)
                shares[name].append(share)
            engine.update(lr=0)
    return {
        "ms_alone": round(alone, 1),
        "ratio": {name: [round(value, 3) for value in found] for name, found in ratios.items()},
        "on_one_cpu": {name: round(statistics.mean(found), 3) for name, found in shares.items()},
        "processors": len(os.sched_getaffinity(0)),
    }


if __name__ == "__main__":
    print(json.dumps(attack(int(sys.argv[1]) if len(sys.argv) > 1 else 5)))
