"""A long run with log and checkpoints: memory, open files and time per step stay what they were.

usage: python tests/reliability/long_run.py STEPS

`anepy train` of the shape stories260K. Its resident memory and its open files are read every tenth
of a second, its times from its log; the first fifth of the run, which warms up, is left out, and of
the rest the last quarter is held against the first. Prints one line of figures as JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]

import children  # noqa: E402
import numpy as np  # noqa: E402

from anepy import PRESETS, Model  # noqa: E402

MOST_MEMORY = 1.03  # the last quarter beside the first
MOST_TIME = 1.25  # on a machine that others use too


def attack(folder: Path, steps: int, most_time: float = MOST_TIME) -> dict[str, Any]:
    """Run so many steps; return what they took.

    Raises:
        AssertionError: something grew.
    """
    Model.init(PRESETS["stories260K"], seed=1).save(folder / "m.bin")
    np.random.default_rng(0).integers(3, 512, 100_000).astype("<u2").tofile(folder / "d.bin")
    process = children.start(
        "-m", "anepy", "train", "m.bin", "--data", "d.bin", "--seq", 64, "--accum", 2, "--threads",
        1, "--steps", steps, "--checkpoint", "c.npz", "--checkpoint-every", max(10, steps // 100),
        "--log", "l.jsonl", "--save", "s.bin",
        cwd=folder, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    memory, files = [], []
    try:
        while process.poll() is None:
            time.sleep(0.1)
            if not (folder / "c.npz").exists():
                continue
            try:
                status = Path(f"/proc/{process.pid}/statm").read_text()
                files.append(len(list(Path(f"/proc/{process.pid}/fd").iterdir())))
                memory.append(int(status.split()[1]))
            except (OSError, IndexError):
                break
        errors = process.communicate(timeout=children.PATIENCE)[1]
    finally:
        process.kill()
    assert process.returncode == 0, errors
    records = [json.loads(line) for line in (folder / "l.jsonl").open()]
    times = [record["ms"] for record in records if record["type"] == "step"]
    assert len(times) == steps
    grown = {name: _growth(values) for name, values in (("memory", memory), ("files", files))}
    grown["ms"] = _growth(times)
    assert grown["memory"] <= MOST_MEMORY and grown["ms"] <= most_time, grown
    assert grown["files"] == 1 and max(files) <= statistics.median(files) + 4, files
    return {"steps": steps, "ms": round(statistics.median(times), 3), "rss_mib": max(memory) >> 8,
            "files": max(files), "last_quarter_to_first": grown}  # fmt: skip


def _growth(values: list[Any]) -> float:
    warm = values[len(values) // 5 :]
    quarter = max(1, len(warm) // 4)
    first, last = warm[:quarter], warm[-quarter:]
    return round(statistics.median(last) / statistics.median(first), 4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(attack(Path(place), int(sys.argv[1]))))
