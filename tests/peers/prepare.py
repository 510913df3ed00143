"""Time `anepy prepare` and the package tokenizers on the same text, in turns, as whole processes.

    python tests/peers/prepare.py tinyshakespeare.txt     200 MB of copies, vocabulary of 512

Both read the text in pieces, encode its documents and write their ids; tokenizers gets 2,000
documents at once, which is what it spreads over the processors. Both must write the same ids.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import COLUMNS, describe_machine, header, progress, ratio, report, summary

SEPARATOR = "<|endoftext|>"
DOCUMENT = 1000  # characters, at least: about a story of TinyStories
ENCODE = """
import sys
import numpy as np
from tokenizers import Tokenizer

text, name, output = sys.argv[1:]
tokenizer = Tokenizer.from_file(name)
begin, end = (tokenizer.token_to_id(t) for t in ("<s>", "</s>"))

def documents(file):
    rest = ""
    while piece := file.read(1 << 22):
        *whole, rest = (rest + piece).split("<|endoftext|>")
        yield from whole
    yield rest

def write(batch, file):
    for found in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
        np.array([begin, *found.ids, end], np.uint16).tofile(file)

with open(text, encoding="utf-8", newline="") as source, open(output, "wb") as file:
    batch = []
    for document in documents(source):
        if document := document.strip():
            batch.append(document)
        if len(batch) == 2000:
            write(batch, file)
            batch = []
    write(batch, file)
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="text with empty lines between its parts")
    parser.add_argument("--megabytes", type=int, default=200, help="of copies (%(default)s)")
    parser.add_argument("--vocab", type=int, default=512, help="tokens (%(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="timed rounds (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the results; - for stdout, no table")
    options = parser.parse_args()
    if min(options.megabytes, options.rounds) < 1:
        parser.error("--megabytes and --rounds start at 1")
    return options


def write_copies(source: Path, target: Path, size: int) -> None:
    """Write documents of the parts of a text, again and again, until there are `size` bytes."""
    documents, document = [], ""
    for part in source.read_text(encoding="utf-8").split("\n\n"):
        document += part + "\n\n"
        if len(document) >= DOCUMENT:
            documents.append(document.strip())
            document = ""
    copy = (SEPARATOR.join(documents) + SEPARATOR).encode()
    with target.open("wb") as file:
        for _ in range(-(-size // len(copy))):
            file.write(copy)


def run(command: list[str]) -> tuple[float, float, int]:
    """Run a program; return its seconds, those of all processors, and its peak memory in bytes."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with {process.returncode}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let both take turns."""
    result: dict[str, Any] = header("prepare")
    text, small = folder / "text.txt", folder / "small.txt"
    write_copies(options.text, text, options.megabytes * 10**6)
    write_copies(options.text, small, 1)
    prepare = [sys.executable, "-m", "anepy", "prepare"]
    vocabulary = ["--train-tokenizer", str(options.vocab)]
    run([*prepare, str(small), "-o", str(folder / "small.bin"), *vocabulary])
    tokenizer = str(folder / "small.tokenizer.json")
    ours, theirs = folder / "ours.bin", folder / "theirs.bin"
    commands = {
        "anepy prepare": [*prepare, str(text), "-o", str(ours), "-z", tokenizer],
        "tokenizers": [sys.executable, "-c", ENCODE, str(text), tokenizer, str(theirs)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    busy: dict[str, list[float]] = {name: [] for name in commands}
    peaks = dict.fromkeys(commands, 0)
    for turn in range(options.rounds):
        progress(f"round {turn + 1} of {options.rounds}")
        order = list(commands.items())
        for name, command in order if turn % 2 == 0 else order[::-1]:
            passed, used, peak = run(command)
            seconds[name].append(passed)
            busy[name].append(used)
            peaks[name] = max(peaks[name], peak)
        if not filecmp.cmp(ours, theirs, shallow=False):
            raise SystemExit("the ids differ")
    progress("")
    result["bytes"] = text.stat().st_size
    result["tokens"] = ours.stat().st_size // 2
    result["seconds"] = {name: summary(values) for name, values in seconds.items()}
    result["cpu_seconds"] = {name: summary(values) for name, values in busy.items()}
    result["peak_bytes"] = peaks
    result["ratio"] = ratio(seconds["anepy prepare"], seconds["tokenizers"])
    return result


def print_table(result: dict[str, Any]) -> None:
    """Print what was measured."""
    print(describe_machine(result))
    print(f"{result['bytes'] / 1e6:.0f} MB of text, {result['tokens'] / 1e6:.1f} M tokens; s")
    for name, values in result["seconds"].items():
        spread = " ".join(f"{values[c]:8.2f}" for c in COLUMNS)
        used, peak = result["cpu_seconds"][name]["median"], result["peak_bytes"][name] / 1e6
        print(f"{name:14} {spread}   {used:.2f} of all CPUs, {peak:.0f} MB")
    print(f"{'ratio':14} " + " ".join(f"{result['ratio'][c]:8.3f}" for c in COLUMNS))


def main() -> None:
    """Measure and report."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    report(result, options.json, print_table)


if __name__ == "__main__":
    main()
