"""Time text and a prompt with weights stored as f32, bf16 and q8, in turns.

    python tests/peers/storage.py     stories110M, 64 tokens after 8, and a prompt of 512

Per storage: milliseconds per token, one after the other, and for a prompt in one pass; and for
float32 the same prompt token by token. A token reads every weight once, so the limit of a storage
is its bytes, at the speed of the memory, which is measured in each round. Before anything is timed,
text of each must be that of its widened numbers.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from common import (
    COLUMNS,
    SETTLE_SECONDS,
    add_common,
    check_common,
    describe_machine,
    header,
    progress,
    random_tokens,
    ratio,
    read_speed,
    report,
    summary,
    timed,
)

STORAGES = ("f32", "bf16", "q8")
BEFORE = 8  # tokens that are read before the clock starts


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common(parser)
    parser.add_argument("--tokens", type=int, default=64, help="per round (%(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="its tokens (%(default)s)")
    options = parser.parse_args()
    check_common(parser, options)
    if options.tokens < 1 or options.prompt < 1:
        parser.error("--tokens and --prompt start at 1")
    return options


def singly(decoder: Any, ids: np.ndarray, first: int = 0) -> Any:
    """Read tokens one after the other; return the last logits."""
    for position, token in enumerate(ids, first):
        logits = decoder.forward(int(token), position)
    return logits


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Let the storages take turns."""
    from anepy.engine import Decoder
    from anepy.models.model import PRESETS, Model

    result: dict[str, Any] = header("storage")
    model = Model.init(PRESETS[options.preset], seed=options.seed)
    context = model.config.seq_len
    count, prompt = min(options.tokens, context - BEFORE), min(options.prompt, context)
    ids, _ = random_tokens(model.config, max(prompt, BEFORE + count), options.seed)
    decoders = {}
    for storage in STORAGES:
        stored = model.stored(storage)
        decoders[storage] = Decoder(stored, threads=options.threads)
        with Decoder(stored.stored("f32"), threads=options.threads) as plain:
            expected = plain.prefill(ids[:prompt])
            found = decoders[storage].prefill(ids[:prompt])
            if np.abs(found - expected).max() > 1e-4 * np.abs(expected).max():
                raise SystemExit(f"{storage} has other logits: nothing is timed")
    token: dict[str, list[float]] = {storage: [] for storage in STORAGES}
    whole: dict[str, list[float]] = {storage: [] for storage in STORAGES}
    singles: list[float] = []
    limit: dict[str, list[float]] = {storage: [] for storage in STORAGES}
    for turn in range(-1, options.rounds):
        for storage in STORAGES if turn % 2 else reversed(STORAGES):
            progress(f"round {turn + 1} of {options.rounds}, {storage}")
            time.sleep(SETTLE_SECONDS)
            decoder = decoders[storage]
            decoder.prefill(ids[:BEFORE])
            ms = timed(lambda d=decoder: singly(d, ids[BEFORE : BEFORE + count], BEFORE))[0]
            all_ms = timed(lambda d=decoder: d.prefill(ids[:prompt]))[0]
            if turn >= 0:
                token[storage].append(ms / count)
                whole[storage].append(all_ms)
        if turn >= 0:
            gbs = read_speed(options.threads)
            for storage in STORAGES:
                limit[storage].append(decoders[storage].model.arena.nbytes / gbs / 1e6)
            singles.append(timed(lambda: singly(decoders["f32"], ids[:prompt]))[0])
    progress("")
    result["settings"] = {
        k: getattr(options, k) for k in ("preset", "tokens", "prompt", "rounds", "threads", "seed")
    }
    result["ms_per_token"] = {s: summary(v) for s, v in token.items()}
    result["prompt_ms"] = {s: summary(v) for s, v in whole.items()}
    result["ratio"] = {s: ratio(token[s], token["f32"]) for s in STORAGES[1:]}
    result["of_memory_speed"] = {s: ratio(limit[s], token[s]) for s in STORAGES}
    result["times_as_fast"] = ratio(singles, whole["f32"])
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print the comparison."""
    s = result["settings"]
    print(f"\n{s['preset']}: {s['tokens']} tokens, {s['threads']} threads, {s['rounds']} rounds")
    print(describe_machine(result))
    print(f"\n{'':24}" + "".join(f"{c:>9}" for c in COLUMNS))
    for label, rows in (("ms per token", "ms_per_token"), ("ms, prompt", "prompt_ms")):
        for storage, row in result[rows].items():
            print(f"{label + ', ' + storage:24}" + "".join(f"{row[c]:9.2f}" for c in COLUMNS))
    for storage, row in result["ratio"].items():
        label = f"per token, {storage} / f32"
        print(f"{label:24}" + "".join(f"{row[c]:9.3f}" for c in COLUMNS))
    for storage, row in result["of_memory_speed"].items():
        label = f"of the memory's, {storage}"
        print(f"{label:24}" + "".join(f"{row[c]:9.3f}" for c in COLUMNS))
    row = result["times_as_fast"]
    print(f"{'prompt, singly / at once':24}" + "".join(f"{row[c]:9.1f}" for c in COLUMNS))
    print(f"command: {result['command']}")


def main() -> None:
    """Run what the command line asks for."""
    options = parse_arguments()
    result = measure(options)
    report(result, options.json, print_table)


if __name__ == "__main__":
    main()
