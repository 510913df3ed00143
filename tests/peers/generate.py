"""Time the generation of text by anepy and by llama2.c's run.c, against the memory's speed.

    python tests/peers/generate.py --run-c /path/to/llama2.c/run.c     stories110M, 256 tokens

`--run-c` names the program or its source, which is then compiled with -O3 -march=native -fopenmp.
Both read the same model file, take the likeliest token each time, one token after the other, and
must write the same tokens. Every weight is read once per token, so the limit is the speed at which
this machine reads memory. Where neighbours share the memory, that speed changes within seconds: it
is measured after every 64 tokens of anepy, and each round is held against its own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    COLUMNS,
    SETTLE_SECONDS,
    add_common,
    check_common,
    describe_machine,
    header,
    parameter_count,
    progress,
    ratio,
    read_speed,
    report,
    summary,
)

BOS = 1
COMPILE = ("-O3", "-march=native", "-fopenmp")
SLICE = 64  # tokens between two measurements of the memory's speed


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.set_defaults(rounds=5)
    parser.add_argument("--tokens", type=int, default=256, help="per round (%(default)s)")
    parser.add_argument("--run-c", type=Path, metavar="PATH", help="run.c, or the compiled program")
    options = parser.parse_args()
    check_common(parser, options)
    if options.tokens < 3:
        parser.error("--tokens starts at 3")
    if options.run_c is not None and not options.run_c.is_file():
        parser.error(f"--run-c {options.run_c}: there is no such file")
    return options


# ---------------------------------------------------------------------------------------- run.c


def compiled(path: Path, folder: Path) -> tuple[Path, str]:
    """Return the program, and how it was made."""
    if path.suffix != ".c":
        return path.resolve(), "as given"
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None:
        raise SystemExit(f"no C compiler to make a program of {path}")
    program = folder / "run"
    command = [compiler, *COMPILE, str(path), "-lm", "-o", str(program)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(f"{path} does not compile: {finished.stderr.strip()[:300]}")
    return program, " ".join([Path(compiler).name, *COMPILE])


def write_tokenizer(path: Path, vocab: int) -> None:
    """Write a tokenizer.bin whose tokens spell their own number: "t17 "."""
    pieces = [f"t{index} ".encode() for index in range(vocab)]
    with path.open("wb") as file:
        file.write(struct.pack("i", max(map(len, pieces))))
        for piece in pieces:
            file.write(struct.pack("fi", 0.0, len(piece)) + piece)


def run_c(
    program: Path, model: Path, tokenizer: Path, options: argparse.Namespace
) -> tuple[float, list[int]]:
    """Generate once; return ms per token by its own clock, and the tokens."""
    finished = subprocess.run(
        [str(program), str(model), "-z", str(tokenizer), "-t", "0", "-n", str(options.tokens)],
        env={**os.environ, "OMP_NUM_THREADS": str(options.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    speed = re.search(r"achieved tok/s: ([\d.]+)", finished.stderr)
    if finished.returncode or speed is None:
        raise SystemExit(f"{program} failed: {finished.stderr.strip()[:300]}")
    return 1e3 / float(speed[1]), [int(n) for n in re.findall(r"t(\d+) ", finished.stdout)]


# ---------------------------------------------------------------------------------------- anepy


def generate(
    decoder: Any, count: int, pause: Callable[[], None] = lambda: None
) -> tuple[float, list[int]]:
    """Generate once, the likeliest token each time; return ms per token and the tokens.

    The clock starts after the first token, as that of run.c does, and stands still in a pause.
    """
    tokens, token, passed, start = [], BOS, 0.0, 0.0
    for position in range(count):
        if position % SLICE == 1:
            passed += time.perf_counter() - start if position > 1 else 0.0
            pause()
            start = time.perf_counter()
        token = int(np.argmax(decoder.forward(token, position)))
        if token == BOS:
            break
        tokens.append(token)
    passed += time.perf_counter() - start
    pause()
    return passed * 1e3 / max(1, len(tokens) - 1), tokens


def bytes_per_token(model: Any, count: int) -> float:
    """Count what has to be read for a token: all weights once, and half of the final cache."""
    c = model.config
    weights = parameter_count(model) - (0 if c.tied else c.vocab_size * c.dim)
    cache = 2 * c.n_layers * (c.dim // c.n_heads * c.n_kv_heads) * count / 2
    return 4.0 * (weights + cache)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Let both take turns."""
    from anepy.engine import Decoder
    from anepy.models.model import PRESETS, Model

    result: dict[str, Any] = header("generate")
    model = Model.init(PRESETS[options.preset], seed=options.seed)
    if options.tokens > model.config.seq_len:
        raise SystemExit(f"{options.preset} knows {model.config.seq_len} positions")
    # Random weights of the usual size repeat one token for ever; larger ones wander.
    model.arena *= 3.0
    times: dict[str, list[float]] = {"anepy": []}
    reads: list[float] = []
    speeds: list[float] = []  # of one round

    def measure_memory() -> None:
        speeds.append(read_speed(options.threads))

    with tempfile.TemporaryDirectory() as name, Decoder(model, threads=options.threads) as decoder:
        folder = Path(name)
        if options.run_c is not None:
            program, result["compiled"] = compiled(options.run_c, folder)
            model.save(folder / "model.bin")
            write_tokenizer(folder / "tokenizer.bin", model.config.vocab_size)
            times["run.c"] = []
        expected = generate(decoder, options.tokens)[1]
        if len(expected) < options.tokens // 2:
            raise SystemExit(f"the text ends after {len(expected)} tokens: use another --seed")
        for turn in range(-1, options.rounds):
            for side in sorted(times, reverse=turn % 2 == 0):
                progress(f"round {turn + 1} of {options.rounds}, {side}")
                time.sleep(SETTLE_SECONDS)
                if side == "anepy":
                    speeds.clear()
                    ms, tokens = generate(decoder, options.tokens, measure_memory)
                    reads += [statistics.harmonic_mean(speeds)] if turn >= 0 else []
                else:
                    files = folder / "model.bin", folder / "tokenizer.bin"
                    ms, tokens = run_c(program, *files, options)
                # run.c counts the given token as one of its steps and may print one less.
                same = min(len(tokens), len(expected))
                if same < len(expected) - 2 or tokens[:same] != expected[:same]:
                    raise SystemExit(
                        f"{side} writes other tokens in round {turn}: nothing is timed"
                    )
                if turn >= 0:
                    times[side].append(ms)
    progress("")
    result["settings"] = {
        k: getattr(options, k) for k in ("preset", "tokens", "rounds", "threads", "seed")
    }
    moved = bytes_per_token(model, options.tokens)
    result["bytes_per_token"] = moved
    result["read"] = summary(reads)
    result["distinct_tokens"] = len(set(expected))
    result["ms_per_token"] = {side: summary(values) for side, values in times.items()}
    limits = [moved / read / 1e6 for read in reads]
    result["share"] = {side: ratio(limits, values) for side, values in times.items()}
    if "run.c" in times:
        result["ratio"] = ratio(times["anepy"], times["run.c"])
    result["rounds"] = {**times, "read": reads}
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the comparison."""
    s, read = result["settings"], result["read"]
    moved = result["bytes_per_token"]
    print(
        f"\n{s['preset']}: {s['tokens']} tokens, fp32, {s['threads']} threads, {s['rounds']} rounds"
    )
    print(describe_machine(result))
    print(f"run.c: {result.get('compiled', 'not given (--run-c PATH)')}\n")
    print(f"{'':24}" + "".join(f"{c:>9}" for c in COLUMNS))
    for side, row in result["ms_per_token"].items():
        print(f"{'ms per token, ' + side:24}" + "".join(f"{row[c]:9.2f}" for c in COLUMNS))
    if "ratio" in result:
        print(f"{'anepy / run.c':24}" + "".join(f"{result['ratio'][c]:9.3f}" for c in COLUMNS))
    for side, row in result["share"].items():
        print(f"{'share of limit, ' + side:24}" + "".join(f"{row[c]:9.3f}" for c in COLUMNS))
    print(f"{'GB/s read':24}" + "".join(f"{read[c]:9.1f}" for c in COLUMNS))
    print(f"\nlimit: {moved / 1e6:.1f} MB are read per token, at the speed of the same round")
    for side, row in result["ms_per_token"].items():
        print(f"  {side:6}{1e3 / row['median']:8.1f} tokens/s")
    if "ratio" in result:
        print(f"checked: both write the same tokens ({result['distinct_tokens']} different ones)")
    print(f"command: {result['command']}")


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    result = measure(options)
    report(result, options.json, print_table)


if __name__ == "__main__":
    main()
