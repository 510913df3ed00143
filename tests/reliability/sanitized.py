"""`anepy train`, LoRA, `eval` and `generate` themselves, with a library built by a sanitizer.

usage: python tests/reliability/sanitized.py address|thread FOLDER      (builds everything there)

`address` looks for wrong addresses, undefined behaviour and, at the end, leaks; `thread` for races.
Python is not instrumented: a report counts if a frame of the library stands in it. Prints one line
of figures as JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]

import children  # noqa: E402
import numpy as np  # noqa: E402

from anepy import Model, ModelConfig  # noqa: E402

CONFIG = ModelConfig(
    dim=64, hidden_dim=128, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=259, seq_len=64
)
DATA = "--data d.bin --seq 48 --accum 2 --steps 6 --threads 2 --no-checkpoint"
COMMANDS = (
    f"train m.bin {DATA} --precision fp32 --batch 3 --save s.bin",
    f"train m.bin {DATA} --precision bf16 --recompute",
    f"train m.bin {DATA} --variant baseline --optimizer muon",
    f"train m.bin {DATA} --lora --rank 4 --base q8 --save adapter",
    f"train m.bin {DATA} --device sim --variant resident",
    f"train m.bin {DATA} --device sim --freeze tok_embeddings*",
    "eval s.bin --data d.bin --windows 4 --threads 2",
    "generate s.bin -p A -t 1 -n 40 --threads 2",
    "generate m.bin --adapter adapter -p A -n 40 --weights f32 --threads 2",
    "generate s.bin -p A -n 40 --weights q8 --threads 2",
    "mil sdpa_fwd --model m.bin",
)
OPTIONS = {
    "address": ("--asan", "--ubsan"),
    "thread": ("--tsan",),
}
LEAK = """
import anepy
decoder = anepy.Decoder(anepy.Model.load("m.bin"))
decoder._finalizer.detach()
decoder._handle.value = None
del decoder
"""  # this and the next must be reported, or nothing would be
RACE = """
#include <pthread.h>
static int count;
static void *add(void *unused) {
    for (int i = 0; i < 100000; i++) count++;
    return unused;
}
int libanepy_race(void) {
    pthread_t other;
    pthread_create(&other, 0, add, 0);
    add(0);
    pthread_join(other, 0);
    return count;
}
"""
REPORT = re.compile(r"(ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|runtime error|leak of)")


def attack(kind: str, folder: Path) -> dict[str, object]:
    """Build the library and run the commands.

    Raises:
        AssertionError: a command failed, or a sanitizer found something in the library.
    """
    script = TESTS.parent / "build_lib.sh"
    target = folder / kind
    command = ["bash", str(script), "--quiet", *OPTIONS[kind], "--out", str(target)]
    subprocess.run(command, env={**os.environ, "CC": "gcc"}, check=True)
    name = "libasan.so" if kind == "address" else "libtsan.so"
    words = ["gcc", f"-print-file-name={name}"]
    runtime = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    Model.init(CONFIG, seed=1).save(folder / "m.bin")
    np.random.default_rng(0).integers(3, 259, 4000).astype("<u2").tofile(folder / "d.bin")
    environment = {
        **os.environ, "PYTHONPATH": children.PYTHONPATH, "PYTHONMALLOC": "malloc",
        "ANEPY_LIB": str(target / "libanepy.so"), "OPENBLAS_NUM_THREADS": "1",
        "LD_PRELOAD": runtime, "UBSAN_OPTIONS": "print_stacktrace=1",
        "ASAN_OPTIONS": f"log_path={folder}/report:exitcode=0:detect_leaks=1",
        "TSAN_OPTIONS": f"log_path={folder}/report:exitcode=0:ignore_noninstrumented_modules=1",
    }  # fmt: skip
    # Where a sanitizer keeps its shadow must be free, whatever the system draws.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []

    def reports(words: list[str]) -> list[str]:
        """Run Python; return what was reported about the library."""
        for old in folder.glob("report.*"):
            old.unlink()
        done = subprocess.run(
            [*fixed, sys.executable, *words], cwd=folder, env=environment,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, (words, done.stdout[-500:], done.stderr[-3000:])
        assert "which ANEPY_LIB names" in done.stderr, done.stderr
        texts = [path.read_text(errors="replace") for path in folder.glob("report.*")]
        lines = [line for line in done.stderr.splitlines() if not line.startswith("anepy: ")]
        cut = r"\n(?====|(?:Direct|Indirect) leak)"
        blocks = [block for text in (*texts, "\n".join(lines)) for block in re.split(cut, text)]
        ours = re.compile(r"libsrc/|libanepy")
        return [block for block in blocks if REPORT.search(block) and ours.search(block)]

    planted = LEAK
    if kind == "thread":
        (folder / "race.c").write_text(RACE)
        flags = ["-g", "-shared", "-fPIC", "-fsanitize=thread", "-pthread"]
        subprocess.run(["gcc", *flags, "race.c", "-o", "race.so"], cwd=folder, check=True)
        planted = "import anepy, ctypes; anepy.library_info()\n"
        planted += "ctypes.CDLL('./race.so').libanepy_race()"
    assert reports(["-c", planted]), "a planted fault was not reported"
    found = {line: reports(["-m", "anepy", *line.split()]) for line in COMMANDS}
    assert not any(found.values()), json.dumps(found, indent=1)
    return {"sanitizer": kind, "commands": len(COMMANDS), "reports": 0}


if __name__ == "__main__":
    place = Path(sys.argv[2])
    place.mkdir(parents=True, exist_ok=True)
    print(json.dumps(attack(sys.argv[1], place)))
