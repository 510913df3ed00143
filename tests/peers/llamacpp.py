"""Time a prompt and text after it by anepy and by llama.cpp, from one GGUF file, in turns.

    anepy convert stories110M.bin stories110M.gguf --dtype q8_0 -z tokenizer.bin
    python tests/peers/llamacpp.py stories110M.gguf     a prompt of 512 tokens, 64 tokens after it

llama.cpp is the package xllamacpp, in a process of its own, whose clocks are used: they start when
the prompt is read. Both take the likeliest token each time. Before anything is timed both must find
the same probabilities after the prompt, within what llama.cpp's 8-bit activations leave of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    COLUMNS,
    SETTLE_SECONDS,
    describe_machine,
    header,
    progress,
    ratio,
    report,
    summary,
    timed,
    usable_cpus,
)

BOS = 1
NEAR = 0.1  # of a logarithm of a probability
SHOWN = 5  # probabilities that are compared, after so many tokens:
CHECKED = 64


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="GGUF file, of any storage")
    parser.add_argument("--tokens", type=int, default=64, help="per round (%(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="its tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (%(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="for both (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results; - for stdout, no table")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.tokens, options.prompt, options.rounds, options.threads) < 1:
        parser.error("numbers start at 1")
    return options


# ------------------------------------------------------------------------------------ llama.cpp


def serve(options: argparse.Namespace) -> None:
    """Answer each line, a list of ids, with llama.cpp's clocks and what it found."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = options.model
    params.n_ctx = options.prompt + options.tokens + 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = llama.Server(params)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = {"prompt": json.loads(line), "max_tokens": options.tokens, "ignore_eos": True}
        asked |= {"temperature": 0, "cache_prompt": False}
        answer = server.handle_completions(asked)
        found = answer if isinstance(answer, dict) else json.loads(answer)
        print(json.dumps(found), flush=True)


class LlamaCpp:
    """llama.cpp in a process of its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--serve", options.model]
        for name in ("tokens", "prompt", "threads"):
            command += [f"--{name}", str(getattr(options, name))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._line()

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("llama.cpp ended; is xllamacpp installed and the file a GGUF model?")
        return line

    def ask(self, ids: list[int]) -> dict[str, Any]:
        """Return its answer to a prompt."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(ids).encode() + b"\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._line())
        return found

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


# ---------------------------------------------------------------------------------------- anepy


def write(decoder: Any, logits: Any, first: int, count: int) -> None:
    """Take the likeliest token each time."""
    for position in range(first, first + count):
        logits = decoder.forward(int(np.argmax(logits)), position)


def distance(decoder: Any, path: Path, ids: list[int]) -> float:
    """Return how far the probabilities of the likeliest tokens are apart, in logarithms."""
    import llama_cpp

    theirs = llama_cpp.log_probabilities(path, ids)
    scores = decoder.prefill(np.array(ids)).astype(np.float64)
    ours = scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())
    likeliest = np.argsort(ours)[-SHOWN:]
    return float(np.abs(ours - theirs)[likeliest].max())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Let both take turns."""
    from anepy.engine import Decoder
    from anepy.models.model import Model

    result: dict[str, Any] = header("llama-cpp")
    model = Model.load(Path(options.model), "auto")
    rng = np.random.default_rng(0)
    ids = [BOS, *map(int, rng.integers(3, model.config.vocab_size, options.prompt - 1))]
    longest = options.prompt + options.tokens + 1
    times: dict[str, list[float]] = {
        f"{side} {what}": [] for what in ("prompt", "token") for side in ("anepy", "llama.cpp")
    }
    llama = LlamaCpp(options)
    try:
        with Decoder(model, longest, threads=options.threads) as decoder:
            apart = distance(decoder, Path(options.model), ids[:CHECKED])
            if apart > NEAR:
                raise SystemExit(f"probabilities are {apart:.2f} apart: nothing is timed")
            for turn in range(-1, options.rounds):
                progress(f"round {turn + 1} of {options.rounds}")
                time.sleep(SETTLE_SECONDS)
                whole, logits = timed(lambda: decoder.prefill(np.array(ids)).copy())
                rest, _ = timed(
                    lambda found=logits: write(decoder, found, options.prompt, options.tokens - 1)
                )
                time.sleep(SETTLE_SECONDS)
                clocks = llama.ask(ids)["timings"]
                if turn >= 0:
                    times["anepy prompt"].append(whole)
                    times["anepy token"].append(rest / (options.tokens - 1))
                    times["llama.cpp prompt"].append(clocks["prompt_ms"])
                    times["llama.cpp token"].append(clocks["predicted_per_token_ms"])
    finally:
        llama.close()
    progress("")
    result["settings"] = {"model": Path(options.model).name, "storage": model.storage} | {
        k: getattr(options, k) for k in ("tokens", "prompt", "rounds", "threads")
    }
    result["apart"] = float(apart)
    result["ms"] = {name: summary(values) for name, values in times.items()}
    result["ratio"] = {
        what: ratio(times[f"anepy {what}"], times[f"llama.cpp {what}"])
        for what in ("prompt", "token")
    }
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the comparison."""
    s = result["settings"]
    print(f"\n{s['model']}: {s['prompt']} tokens, then {s['tokens']}, {s['threads']} threads")
    print(describe_machine(result))
    print(f"likeliest tokens apart by {result['apart']:.4f} at most")
    print(f"\n{'':24}" + "".join(f"{c:>9}" for c in COLUMNS))
    for name, row in result["ms"].items():
        print(f"{'ms, ' + name:24}" + "".join(f"{row[c]:9.2f}" for c in COLUMNS))
    for what, row in result["ratio"].items():
        print(f"{'ratio, ' + what:24}" + "".join(f"{row[c]:9.3f}" for c in COLUMNS))
    print(f"command: {result['command']}")


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    if options.serve:
        serve(options)
    else:
        report(measure(options), options.json, print_table)


if __name__ == "__main__":
    main()
