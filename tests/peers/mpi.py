"""What ranks cost: time per update of 2 ranks with a thread each against a process with 2.

    python tests/peers/mpi.py                      # the stories110M shape, in turns
    python tests/peers/mpi.py --shard --wire bf16

Both train on the same windows. The reduction alone, with nothing to hide behind, is timed as well.
ANEPY_TEST_MPIRUN names the launcher; needs the extra `mpi`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from common import TESTS, summary

sys.path.insert(0, str(TESTS / "helpers"))


def work(options: argparse.Namespace) -> None:
    """Be a rank, or the one process: print seconds and traffic of each update as JSON."""
    from anepy.models.model import PRESETS, Model
    from anepy.text.data import TokenData
    from anepy.training.config import TrainConfig
    from anepy.training.ranks import started
    from anepy.training.trainer import Trainer

    ranks = started()
    model = Model.init(PRESETS[options.preset], seed=0)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, 200_000)
    size = 1 if ranks is None else ranks.size
    config = TrainConfig(
        steps=10**6, accum=options.accum * 2 // size, device="cpu", precision=options.precision,
        threads=2 // size, shard=options.shard and size > 1, wire=options.wire,
        lora=options.lora, seq=options.seq,
    )  # fmt: skip
    with Trainer(model, TokenData.from_array(tokens), config, ranks=ranks) as trainer:
        began, found, steps = time.perf_counter(), [], []
        for report in trainer:
            steps.append(report.ms_per_step)
            if report.update is None:
                continue
            now = time.perf_counter()
            traffic = report.traffic
            found.append(
                {
                    "s": now - began,
                    "step_ms": sorted(steps)[len(steps) // 2],
                    "last_ms": steps[-1],
                    "update_ms": report.update.update_ms,
                    "busy_ms": traffic.busy_ms if traffic else 0.0,
                    "waited_ms": traffic.waited_ms if traffic else 0.0,
                    "nbytes": traffic.nbytes if traffic else 0,
                }
            )
            began, steps = now, []
            if len(found) > options.updates:
                break
        blocking = []
        parallel = trainer._parallel
        for _ in range(4 if parallel is not None else 0):
            assert ranks is not None and parallel is not None
            ranks.gather("settled")
            start = time.perf_counter()
            parallel.exchange.begin(1, 1.0).wait()
            blocking.append((time.perf_counter() - start) * 1e3)
        if ranks is None or ranks.first:
            print(json.dumps({"updates": found[1:], "blocking_ms": blocking[1:]}))
    if ranks is not None:
        ranks.close()


def measure(options: argparse.Namespace) -> None:
    """Run both in turns and print what they took."""
    import needs

    words = [sys.executable, str(Path(__file__).resolve()), "--work", "--preset", options.preset]
    words += ["--accum", str(options.accum), "--updates", str(options.updates)]
    words += ["--precision", options.precision, "--wire", options.wire, "--seq", str(options.seq)]
    words += ["--shard"] * options.shard + ["--lora"] * options.lora
    results: dict[str, list[dict[str, float]]] = {"2 ranks": [], "1 process": []}
    blocking: list[float] = []
    for _ in range(options.rounds):
        for name, before in (("2 ranks", needs.mpirun(2)), ("1 process", [])):
            out = subprocess.run([*before, *words], capture_output=True, text=True, check=True)
            told = json.loads(out.stdout.splitlines()[-1])
            results[name] += told["updates"]
            blocking += told["blocking_ms"]
    for name, updates in results.items():
        for key in ("s", "step_ms", "last_ms", "update_ms", "busy_ms", "waited_ms", "nbytes"):
            values = summary([each[key] for each in updates])
            print(f"{name:10} {key:10} " + " ".join(f"{k} {v:.5g}" for k, v in values.items()))
    ranks, alone = (summary([e["s"] for e in results[n]])["median"] for n in results)
    alone_ms = summary(blocking)["median"]
    waited = summary([e["waited_ms"] for e in results["2 ranks"]])["median"]
    print(f"2 ranks / 1 process: {ranks / alone:.3f}")
    hidden = 1 - waited / alone_ms
    print(f"reduction alone {alone_ms:.0f} ms, waited {waited:.0f} ms: {hidden:.1%} hidden")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="stories110M", help="model shape (%(default)s)")
    parser.add_argument("--accum", type=int, default=10, help="steps of a rank (%(default)s)")
    parser.add_argument("--seq", type=int, default=256, help="tokens of a window (%(default)s)")
    parser.add_argument("--updates", type=int, default=2, help="timed ones a turn (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns (%(default)s)")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16 (%(default)s)")
    parser.add_argument("--wire", default="fp32", help="fp32 or bf16 (%(default)s)")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options)
    else:
        measure(options)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", os.pathsep.join([str(TESTS.parent), str(TESTS)]))
    main()
