"""SIGKILL at random moments of `anepy train`: what is left always resumes to the same bits.

usage: python tests/reliability/kill_anywhere.py KILLS [SEED]

A run of a small model writes a checkpoint after every step, so that most of its time goes into
writing. It is killed at a random moment, its checkpoint is looked at, and the run is resumed and
killed again, until it comes to its end: weights and log must be those of a run nobody disturbed.
Prints one line of figures as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]

import children  # noqa: E402
import numpy as np  # noqa: E402

from anepy import Model, ModelConfig  # noqa: E402
from anepy.training.checkpoint import Checkpoint  # noqa: E402

CONFIG = ModelConfig(
    dim=64, hidden_dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=259, seq_len=32
)
STEPS = 60
WORDS = (
    "train", "m.bin", "--data", "d.bin", "--seq", 16, "--accum", 3, "--steps", STEPS,
    "--threads", 1, "--checkpoint-every", 1, "--checkpoint", "c.npz", "--save", "s.bin",
    "--log", "l.jsonl",
)  # fmt: skip
# A process that imports everything once and makes each run in a child of its own: killing costs
# no start of Python.
SERVER = """
import os, sys
import anepy.cli.main as cli, anepy.cli.run, anepy.cli.plan
for line in sys.stdin:
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(null, stream)
        sys.argv = ["anepy", *line.split()]
        cli.main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Starts `anepy train` in a folder, again and again."""

    def __init__(self, folder: Path) -> None:
        Model.init(CONFIG, seed=1).save(folder / "m.bin")
        random_ids = np.random.default_rng(0).integers(3, 259, 4000)
        random_ids.astype("<u2").tofile(folder / "d.bin")
        environment = {**os.environ, "PYTHONPATH": children.PYTHONPATH}
        self.folder = folder
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], cwd=folder, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()

    def run(self, *more: object, kill_after: float | None = None) -> int:
        """Run to its end, or until it is killed; return the exit code, negative for a signal."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(" ".join(map(str, (*WORDS, *more))) + "\n")
        self._server.stdin.flush()
        child = int(self._server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it had come to its end
                os.kill(child, signal.SIGKILL)
        return int(self._server.stdout.readline())


def attack(folder: Path, kills: int, seed: int) -> dict[str, float]:
    """Kill runs so often; return how many ends they came to, and what was found.

    Raises:
        AssertionError: a checkpoint was damaged, a run went on with other bits, something was left.
    """
    draw = random.Random(seed)
    runs = Runs(folder)
    try:
        began = time.perf_counter()
        assert runs.run() == 0
        longest = time.perf_counter() - began
        expected, whole = (folder / "s.bin").read_bytes(), _steps(folder)
        assert whole == list(range(1, STEPS + 1))
        killed = ends = writing = before_any = 0
        while killed < kills:
            for name in ("s.bin", "c.npz", "c-previous.npz", "l.jsonl"):
                (folder / name).unlink(missing_ok=True)
            code = 1
            while code:
                there = (folder / "c.npz").exists()
                resume = ("--resume", "c.npz") if there else ()
                last = draw.random() < 0.1 or killed >= kills
                code = runs.run(*resume, kill_after=None if last else draw.uniform(0, longest))
                if code == -signal.SIGKILL:
                    killed += 1
                    writing += any(folder.glob(".anepy-*.tmp"))
                    before_any += not (folder / "c.npz").exists()
                    if (folder / "c.npz").exists():
                        Checkpoint(folder / "c.npz").close()
                else:
                    assert code == 0, code
            ends += 1
            assert (folder / "s.bin").read_bytes() == expected
            assert _steps(folder) == whole
            left = {path.name for path in folder.iterdir()}
            known = {"m.bin", "d.bin", "s.bin", "c.npz", "c-previous.npz", "l.jsonl"}
            assert left == known, left - known
    finally:
        runs.close()
    return {"kills": killed, "ends": ends, "while_writing": writing, "before_any": before_any}


def _steps(folder: Path) -> list[int]:
    records = [json.loads(line) for line in (folder / "l.jsonl").open()]
    return [record["step"] for record in records if record["type"] == "step"]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        wanted = int(sys.argv[2]) if len(sys.argv) > 2 else 0
        print(json.dumps(attack(Path(place), int(sys.argv[1]), wanted)))
