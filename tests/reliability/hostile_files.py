"""Broken files for every reader in Python: one line of AnepyError each, and nothing worse.

usage: python tests/reliability/hostile_files.py COUNT [SEED]

Input number i of a reader depends on SEED and i alone. An input is a whole file with one to eight
bytes, numbers, words or stretches changed, or a value of its JSON replaced; a reader may take it or
raise AnepyError in a line that is short and holds no control character, in bounded time and memory.
Prints one line of figures as JSON for each reader.
"""

from __future__ import annotations

import copy
import io
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "helpers")]

import numpy as np  # noqa: E402
from comparisons import make_comparison  # noqa: E402

from anepy import Lora, Model, ModelConfig, TokenData, TrainConfig, Trainer  # noqa: E402
from anepy.comparing import file as comparison_file  # noqa: E402
from anepy.errors import AnepyError  # noqa: E402
from anepy.native import release  # noqa: E402
from anepy.system.version import __version__  # noqa: E402
from anepy.text.prepare import prepare  # noqa: E402
from anepy.text.tokenizer import Tokenizer  # noqa: E402
from anepy.text.tokenizer_pieces import PieceTokenizer  # noqa: E402
from anepy.training import convert, runs  # noqa: E402

CONFIG = ModelConfig(
    dim=16, hidden_dim=32, n_layers=1, n_heads=2, n_kv_heads=2, vocab_size=259, seq_len=16
)
SLOW_S = 20.0  # of processor time for one input: far more than any needs
MOST_MEMORY = 4 << 30  # bytes of addresses beyond those at the start
WORDS = (
    b"NaN", b"-1", b"1e999", b"null", b"[]", b"{}", b'""', b"true", b"18446744073709551616",
    b"\\u001b[31m", b"\x1b]0;x\x07", b"../../x", b"\xff\xfe", b"\x00", b"9" * 400, b"[" * 2000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1.5, 1 << 31, 1 << 64, 1e308, float("inf"), "", "\x1b[31m", "a", [], {},
    [[]], {"a": 1},
)  # fmt: skip
NUMBERS = (0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return a file with some bytes changed; of JSON perhaps a value."""
    if draw.random() < 0.3 and (changed := _other_value(data, draw)) is not None:
        return changed
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
        at = draw.randrange(len(out) + 1)
        if draw.random() < 0.5:
            at = min(at, draw.randrange(400))  # heads decide more than weights
        kind = draw.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            number = draw.choice(NUMBERS)
            width = draw.choice((1, 2, 4, 8))
            out[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 2:
            word = draw.choice(WORDS)
            out[at : at + (len(word) if draw.random() < 0.5 else 0)] = word
        elif kind == 3:
            del out[at : at + draw.randint(1, 64)]
        elif kind == 4:
            begin = draw.randrange(len(out) + 1)
            out[at:at] = out[begin : begin + draw.randint(1, 64)]
        else:
            del out[at:]
    return bytes(out)


def _other_value(data: bytes, draw: random.Random) -> bytes | None:
    """Replace a value somewhere in a text of JSON, or in one of its lines."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    at = draw.randrange(len(lines))
    try:
        record = json.loads(lines[at])
    except ValueError:
        return None
    spots = list(_spots(record))
    if not spots:
        return None
    holder, key = draw.choice(spots)
    if draw.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    lines[at] = json.dumps(record).encode()
    return b"\n".join(lines)


def _spots(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield value, key
        yield from _spots(item)


def _mutated_archive(data: bytes, draw: random.Random) -> bytes:
    """Change members of a zip file, and write it anew: what a checksum alone would refuse."""
    if draw.random() < 0.4:
        return mutated(data, draw)
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = {info.filename: old.read(info) for info in old.infolist()}
    name = "meta.npy" if draw.random() < 0.5 else draw.choice(list(members))
    if name == "meta.npy" and draw.random() < 0.7:
        text = str(np.load(io.BytesIO(members[name])))
        changed = mutated(text.encode(), draw).decode("utf-8", "replace")
        out = io.BytesIO()
        np.save(out, np.array(changed))
        members[name] = out.getvalue()
    elif draw.random() < 0.1:
        del members[name]
    else:
        members[name] = mutated(members[name], draw)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for member, content in members.items():
            new.writestr(member, content)
    return out.getvalue()


class Reader:
    """A file that is broken, and who reads it.

    Args:
        path: the file, whole.
        read: what is called.
        change: how it is broken.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[], object],
        change: Callable[[bytes, random.Random], bytes] = mutated,
    ) -> None:
        self.path, self.read, self.change = path, read, change
        self.whole = path.read_bytes()


def readers(folder: Path) -> dict[str, Reader]:
    """Make a whole file of every kind, and return what reads each."""
    model = Model.init(CONFIG, seed=1)
    entries = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % value for value in range(256))]
    template = "{% for m in messages %}<s>{{ m.role }}{{ m.content }}</s>{% endfor %}"
    tokenizer = PieceTokenizer(entries, [0.0] * 259, chat_template=template)
    tokenizer.save(folder / "tokenizer.bin")
    text = folder / "t.txt"
    text.write_text("A cat sat on a mat. " * 20)
    prepare(text, Tokenizer.bytes(), folder / "d.bin")
    lines = [{"prompt": "a", "completion": "b"}, {"text": "c"}, {"messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]  # fmt: skip
    (folder / "t.jsonl").write_text("\n".join(json.dumps(lines[0]) for _ in range(4)))
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(lines[2]) for _ in range(4)))
    found: dict[str, Reader] = {}

    def add(label: str, name: str, read: Callable[[Path], object], **options: Any) -> None:
        path = folder / name
        found[label] = Reader(path, lambda: read(path), **options)

    for ending in ("bin", "gguf"):
        model.save(folder / f"m.{ending}")
        add(f"model .{ending}", f"m.{ending}", Model.load)
    model.save(folder / "hf")
    for name in ("config.json", "model.safetensors"):
        add(f"folder {name}", f"hf/{name}", lambda path: Model.load(path.parent))
    lora = Lora(2)
    lora.attach(CONFIG)
    lora.save(folder / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        add(name, f"adapter/{name}", lambda path: Lora.load(path.parent))
    add("tokenizer.bin", "tokenizer.bin", Tokenizer.load)
    add("tokens and sidecar", "d.bin.json", lambda _: TokenData(folder / "d.bin"))
    add("tokens", "d.bin", lambda path: TokenData(path).check(259))
    out = folder / "out.bin"
    for name in ("t.jsonl", "chat.jsonl", "t.txt"):
        add(name, name, lambda path: prepare(path, tokenizer, out))
    checkpoint = folder / "c.npz"
    with Trainer(model, folder / "d.bin", TrainConfig(steps=2, accum=2, seq=8)) as trainer:
        trainer.run_step()
        trainer.save_checkpoint(checkpoint)

    def resume(path: Path) -> object:
        settings = TrainConfig(steps=2, accum=2, seq=8, threads=1)
        with Trainer(Model.init(CONFIG, seed=1), folder / "d.bin", settings, path) as trainer:
            return trainer.steps_done

    add("checkpoint, resumed", "c.npz", resume, change=_mutated_archive)
    add("checkpoint, converted", "c.npz", convert.read, change=_mutated_archive)
    comparison_file.save(make_comparison(ablate=True), folder / "compare.json")
    add("comparison", "compare.json", comparison_file.load)
    log = [{"type": "run", "model": "m", "settings": asdict(TrainConfig())}]
    log += [
        {"type": "step", "step": i, "loss": 2.0, "lr": 1e-3, "ms": 1.0, "tokens": 8,
         "tokens_per_s": 9.0} for i in range(1, 9)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    add("log of a run", "log.jsonl", runs.read)
    pinned = {"name": "a.so", "size": 9, "sha256": "0" * 64}
    record = {"version": __version__, "sources": "0", "base_url": "https://x"}
    record_text = json.dumps({**record, "files": {"linux-x86_64-glibc": pinned}})
    (folder / "release.json").write_text(record_text)
    add("release.json", "release.json", lambda path: release.read(path.parent))
    for version in (2, 4):
        name = f"research{version}.bin"
        convert.convert(checkpoint, folder / name, version=version)
        add(f"research checkpoint, version {version}", name, convert.read)
    return found


def attack(reader: Reader, label: str, seed: int, first: int, count: int) -> dict[str, Any]:
    """Read broken files; return how many were refused and taken, and the slowest.

    Raises:
        AssertionError: one was answered with anything else, or took too long.
    """
    refused = taken = 0
    slowest = 0.0
    for number in range(first, first + count):
        draw = random.Random(f"{seed} {label} {number}")
        reader.path.write_bytes(reader.change(reader.whole, draw))
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read()
            taken += 1
        except AnepyError as error:
            refused += 1
            message = str(error)
            assert "\n" not in message and len(message) < 4000, (label, number, message[:200])
        except MemoryError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"{label}, seed {seed}, input {number}: {error!r}") from error
        slowest = max(slowest, time.process_time() - began)
        assert slowest < SLOW_S, f"{label}, seed {seed}, input {number} takes {slowest:.1f} s"
    reader.path.write_bytes(reader.whole)
    return {
        "reader": label, "inputs": count, "refused": refused, "taken": taken,
        "slowest_ms": round(slowest * 1e3, 1),
    }  # fmt: skip


def limit_memory() -> None:
    """Let a reader that would take as much as a header claims fail instead."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_MEMORY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    wanted, start = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    place = Path(tempfile.mkdtemp(prefix="hostile-", dir="/dev/shm"))
    try:
        made = readers(place)
        limit_memory()
        for title, one in made.items():
            try:
                print(json.dumps(attack(one, title, start, 0, wanted)), flush=True)
            except AssertionError as failure:
                print(f"FAILED {failure}", flush=True)
                if "-v" in sys.argv and failure.__cause__ is not None:
                    import traceback

                    traceback.print_exception(failure.__cause__)
                one.path.write_bytes(one.whole)
    finally:
        shutil.rmtree(place, ignore_errors=True)
