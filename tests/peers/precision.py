"""Train in bf16 and in fp32 from the same seeds and compare the losses on held-out text.

    python tests/peers/precision.py --seeds 8

The demo is trained from random weights; stories260K is fine-tuned on tinyshakespeare where
`--data` (or ANEPY_TEST_DATA) is the folder that has both and tok512.bin. Each run is the command of
the README with `--precision` and `--seed`, in a process of its own. The script fails if the middle
of the pairs is more than 0.5 % apart: single ones scatter as seeds of one precision do, since
training is chaotic.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    describe_machine,
    header,
    progress,
    tolerances,
    usable_cpus,
    write_json,
)

BOUND = tolerances.BF16_HELD_OUT
PRECISIONS = ("fp32", "bf16")
MODEL, TEXT, TOKENIZER = "stories260K.bin", "tinyshakespeare.txt", "tok512.bin"
FINE_TUNING = "--steps 200 --accum 1 --lr 1e-3 --held-out 0.1 --eval-every 20 --no-checkpoint"


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(os.environ.get("ANEPY_TEST_DATA") or os.curdir)
    parser.add_argument("--seeds", type=int, default=8, help="runs of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, help="of each run; the default is the README's")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=folder, metavar="DIR", help="%(default)s")
    parser.add_argument("--only", choices=("demo", "fine-tuning"), help="one of the two")
    parser.add_argument("--json", metavar="FILE", help="write the results; - for stdout, no table")
    options = parser.parse_args()
    for name in ("seeds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} starts at 1")
    return options


def command(*words: str) -> str:
    """Run a command of this very anepy and return what it prints."""
    import anepy

    finished = subprocess.run(
        [sys.executable, "-m", "anepy", *words],
        env={**os.environ, "PYTHONPATH": str(Path(anepy.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise SystemExit(f"anepy {' '.join(words)}: {finished.stderr.strip()}")
    return finished.stdout


def pairs(name: str, words: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Train in both precisions from each seed; sum up their losses."""
    from anepy.comparing.estimates import paired_ratio

    if options.steps is not None:
        words = [*words, "--steps", str(options.steps)]
    losses: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    for seed in range(options.seeds):
        for precision in PRECISIONS:
            progress(f"{name}, seed {seed}, {precision}")
            chosen = ["--precision", precision, "--seed", str(seed)]
            printed = command(*words, *chosen, "--threads", str(options.threads), "--json")
            losses[precision].append(json.loads(printed)["summary"]["held_out_after"])
    ratio = paired_ratio(losses["fp32"], losses["bf16"])
    assert ratio is not None
    changes = [b / a - 1 for a, b in zip(losses["fp32"], losses["bf16"], strict=True)]
    return {
        "command": ["anepy", *words],
        "held_out": losses,
        "change": changes,
        "largest": max(map(abs, changes)),
        "ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high},
        "scatter": {
            precision: statistics.stdev(values) / statistics.mean(values)
            for precision, values in losses.items()
            if len(values) > 1
        },
    }


def fine_tuning(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the text and fine-tune on it, if the files are there."""
    files = [options.data / name for name in (MODEL, TEXT, TOKENIZER)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        return {"reason": f"{options.data} has no {', '.join(missing)}: --data DIR"}
    with tempfile.TemporaryDirectory() as folder:
        tokens = f"{folder}/shake.bin"
        command("prepare", str(files[1]), "-o", tokens, "--tokenizer", str(files[2]))
        words = ["train", str(files[0]), "--data", tokens, *FINE_TUNING.split()]
        return pairs("fine-tuning", words, options)


def print_table(name: str, found: dict[str, Any]) -> None:
    """Print a line per seed and what follows from them."""
    if "reason" in found:
        print(f"{name}: {found['reason']}")
        return
    print(f"{name:16} {'fp32':>9} {'bf16':>9} {'bf16 against fp32':>18}")
    held_out = found["held_out"]
    for seed, change in enumerate(found["change"]):
        fp32, bf16 = (held_out[precision][seed] for precision in PRECISIONS)
        print(f"  seed {seed:<9} {fp32:9.5f} {bf16:9.5f} {change:>+17.2%}")
    fp32, bf16 = (statistics.mean(held_out[precision]) for precision in PRECISIONS)
    ratio = found["ratio"]
    line = f"  {'mean':14} {fp32:9.5f} {bf16:9.5f} {ratio['value'] - 1:>+17.2%}"
    if ratio["low"] is not None:
        line += f" (95 % interval {ratio['low'] - 1:+.2%} to {ratio['high'] - 1:+.2%})"
    print(line)
    if found["scatter"]:
        fp32, bf16 = (found["scatter"][precision] for precision in PRECISIONS)
        print(f"  {'between seeds':14} {fp32:9.2%} {bf16:9.2%} (standard deviation)")
    print(f"  largest difference of a pair: {found['largest']:.2%}")


def main() -> None:
    """Train, print the tables, and fail if bf16 ends elsewhere."""
    options = parse_arguments()
    result: dict[str, Any] = header("precision")
    result["threads"], result["runs"] = options.threads, {}
    if options.only != "fine-tuning":
        result["runs"]["demo"] = pairs("demo", ["train"], options)
    if options.only != "demo":
        result["runs"]["fine-tuning"] = fine_tuning(options)
    progress("")
    if options.json != "-":
        print(describe_machine(result))
        for name, found in result["runs"].items():
            print_table(name, found)
        print(f"command: {result['command']}")
    write_json(result, options.json)
    far = [
        name
        for name, run in result["runs"].items()
        if "ratio" in run and abs(run["ratio"]["value"] - 1) > BOUND
    ]
    if far:
        raise SystemExit(
            f"{' and '.join(far)}: the middle of the pairs is more than {BOUND:.1%} apart"
        )


if __name__ == "__main__":
    main()
