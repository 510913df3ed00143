"""The pool beside a busy neighbour: threads move, and may use the same processors afterwards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import needs
import numpy as np

from anepy import Engine, Model, ModelConfig


@needs.LINUX
def test_threads_that_moved_may_use_the_processors_they_could_before() -> None:
    needs.proc()
    usable = needs.processors(2)
    model = Model.init(ModelConfig(64, 172, 2, 8, 4, 512, 128), seed=0)
    ids = np.random.default_rng(0).integers(3, 500, 129)
    busy = f"import os; os.sched_setaffinity(0, [{min(usable)}])\nwhile True: pass"
    with Engine(model, precision="fp32", threads=2) as engine:
        expected = engine.step(ids[:-1], ids[1:]).loss
        with subprocess.Popen([sys.executable, "-c", busy]) as other:
            try:
                losses = {engine.step(ids[:-1], ids[1:]).loss for _ in range(400)}
            finally:
                other.kill()
        tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
        assert len(tasks) >= 2
        assert {frozenset(os.sched_getaffinity(task)) for task in tasks} == {frozenset(usable)}
    assert losses == {expected}
