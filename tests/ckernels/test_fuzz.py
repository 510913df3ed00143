"""The simulator against broken programs, under AddressSanitizer and UndefinedBehaviorSanitizer.

Here a short run; the recorded long one is in RECORDED. To repeat or extend it:
`python tests/ckernels/test_fuzz.py FOLDER COUNT [FIRST]` (builds everything in FOLDER). With
`guided` for FIRST, clang's libFuzzer looks for inputs that reach new code; FOLDER keeps them.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    tests = CHECKOUT / "tests"
    sys.path[:0] = [str(CHECKOUT), str(tests), str(tests / "helpers")]

import needs  # noqa: E402
from mil_samples import SAMPLES  # noqa: E402
from mil_text import Sample, old_dialect  # noqa: E402

from anepy import Model, ModelConfig  # noqa: E402
from anepy.hardware import programs as mil  # noqa: E402
from ckernels import toolchain  # noqa: E402

# The long run: clang 19, seed 1, one thread; nothing failed.
RECORDED = {
    "inputs": 4_000_000,
    "seeds": 264,
    "rejected": 2_526_600,
    "accepted": 1_473_400,  # mutations that left the program valid, or made another valid one
    "functions_run": 1_296_739,
    "runs_stopped_by_a_rule": 230_215,
    "slowest_ms": 70.0,
    "seconds": 565,
    "max_rss_kib": 316_640,
}
TYPES = {"float16": 1, "uint8": 3, "int8": 4}


def merged(sample: Sample) -> tuple[str, bytes]:
    """Put the weight files of a sample into one, and their offsets into its text."""
    text, data = sample.text, struct.pack("<II56x", len(sample.weights), 2)
    for name, array in sample.weights.items():
        payload = np.ascontiguousarray(array).tobytes()
        text = re.sub(
            rf'weights/{re.escape(name)}"\), offset=uint64\(64\)',
            f'weights/weight.bin"), offset=uint64({len(data)})',
            re.sub(r"\s+offset=uint64", " offset=uint64", text),
        )
        kind = TYPES[str(array.dtype)]
        at = len(data) + 64
        data += struct.pack("<IIQQ40x", 0xDEADBEEF, kind, len(payload), at)
        data += payload + bytes(-len(payload) % 64)
    return text, data


def write_corpus(folder: Path) -> list[str]:
    """Write the samples and generated programs of a small model, both dialects; list the texts."""
    pairs = [merged(sample) for sample in SAMPLES]
    pairs += [(old_dialect(text), data) for text, data in pairs]
    model = Model.init(ModelConfig(16, 48, 2, 2, 1, 32, 64), seed=0)
    for dialect in ("1.3", "1.0"):
        for name in mil.names():
            one = mil.describe(model.table, name)
            pairs.append(mil.generate(model, [one], dialect))
            if one.kind("weight"):
                live = mil.describe(model.table, name, live=True)
                pairs.append(mil.generate(model.table, [live], dialect))
                two = mil.describe(model.table, name, layer=1)
                pairs.append(mil.generate(model, [one, two], dialect))
    found = []
    for index, (text, data) in enumerate(pairs):
        path = folder / f"{index:03}.mil"
        path.write_text(text)
        path.with_suffix(".bin").write_bytes(data)
        found.append(str(path))
    return found


FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


def find_compiler(folder: Path) -> str:
    """Return a compiler that has the sanitizers' libraries."""
    return needs.compiler_with(FLAGS, (*needs.CLANGS, "gcc", "cc"), folder)


def build(folder: Path, compiler: str, guided: bool = False) -> Path:
    """Compile library and harness with both sanitizers, and for libFuzzer if it is guided."""
    flags = toolchain.script_flags(folder, "--werror", "--asan", "--ubsan")
    flags += ["-fsanitize=fuzzer-no-link"] if guided else []
    objects = toolchain.compile_files(compiler, flags, toolchain.library_sources(), folder)
    harness = CHECKOUT / "tests" / "ckernels" / "fuzz" / "fuzz_mil.c"
    own = [*flags, "-std=gnu11", *(["-DANEPY_LIBFUZZER"] if guided else [])]
    objects += toolchain.compile_files(compiler, own, [harness], folder)
    linked = [*FLAGS, *(["-fsanitize=fuzzer"] if guided else [])]
    return toolchain.link(compiler, linked, objects, folder / "fuzz_mil")


def run_guided(harness: Path, texts: list[str], count: int) -> None:
    """Let libFuzzer try so many inputs, from the samples and what it found before."""
    found, samples = harness.parent / "found", harness.parent / "samples"
    for folder in (found, samples):
        folder.mkdir(exist_ok=True)
    for text in map(Path, texts):
        content = text.read_bytes() + b"\0" + text.with_suffix(".bin").read_bytes()
        (samples / text.stem).write_bytes(content)
    # Its limit is of the clock on the wall; that of the harness is of processor time.
    limits = (f"-runs={count}", "-max_len=300000", "-timeout=600", "-rss_limit_mb=1500")
    command = [harness, *texts, *limits, "-print_final_stats=1", found, samples]
    environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"}
    subprocess.run(list(map(str, command)), cwd=harness.parent, env=environment, check=True)


def run(harness: Path, seeds: list[str], seed: int, first: int, count: int) -> dict[str, float]:
    """Run a stretch of inputs; returns the figures."""
    # Through a shell that starts another process: Linux counts the largest memory of a process on
    # from the one that started it, and this one may be large.
    done = subprocess.run(
        [
            "bash",
            "-c",
            '"$0" "$@"; exit $?',
            str(harness),
            str(seed),
            str(first),
            str(count),
            *seeds,
        ],
        cwd=harness.parent,
        capture_output=True,
        text=True,
        env={**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"},
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


@needs.LINUX
def test_broken_programs_give_errors_and_nothing_worse(tmp_path: Path) -> None:
    harness = build(tmp_path, find_compiler(tmp_path))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    figures = run(harness, write_corpus(corpus), 1, 0, 10_000)
    assert figures["rejected"] > 2_000  # mutations break most programs
    assert figures["ran"] > 500  # but not all: what still parses is run
    assert figures["max_rss"] < 1 << 20  # KiB


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "corpus").mkdir(parents=True, exist_ok=True)
    guided = sys.argv[3:] == ["guided"]
    made = build(target, os.environ.get("CC") or find_compiler(target) or "cc", guided)
    texts = write_corpus(target / "corpus")
    if guided:
        run_guided(made, texts, int(sys.argv[2]))
        sys.exit()
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    for start in range(first, first + int(sys.argv[2]), 50_000):
        print(json.dumps(run(made, texts, 1, start, 50_000)), flush=True)
