"""`anepy generate` and `anepy eval`: what they print, and what of it can be checked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import needs
import numpy as np
import pytest
from commands import Run, assert_one_line_error

from anepy.text.bits import bits_per_byte, spelled_bytes
from anepy.text.tokenizer import Tokenizer


def test_generate_prints_text_and_json(run: Run, files: dict[str, Path]) -> None:
    words = ["generate", "m.bin", "-p", "A cat", "-t", 0, "-n", 6]
    plain, record = run(*words), run(*words, "--json")
    assert plain.code == record.code == 0
    assert plain.out.startswith("A cat") and plain.out.endswith("\n")
    assert json.loads(record.out)["text"] == plain.out[:-1]


def test_generate_several_prompts_each_as_if_alone(run: Run, files: dict[str, Path]) -> None:
    Path("p.txt").write_text("A cat\n\nThe\\ndog\r\n", encoding="utf-8")
    words = ["generate", "m.bin", "-n", 6, "--seed", 3]
    result = run(*words, "--prompts", "p.txt", "--json")
    record = json.loads(result.out)
    alone = [json.loads(run(*words, "-p", p, "--json").out) for p in ("A cat", "The\ndog")]
    assert record["texts"] == [each["texts"][0] for each in alone], result.err
    assert [each["text"] for each in alone] == [text["text"] for text in record["texts"]]
    assert record["tokens"] == sum(each["tokens"] for each in alone) > 2
    assert record["prompt_tokens"] == sum(each["prompt_tokens"] for each in alone) == 16
    assert record["seed"] == 3 and record["tokens_per_s"] > 0 and "text" not in record
    plain = run(*words, "--prompts", "p.txt")
    assert plain.out == "\n\n".join(text["text"] for text in record["texts"]) + "\n"
    other = json.loads(run(*words[:-1], 4, "--prompts", "p.txt", "--json").out)
    assert other["texts"] != record["texts"]


@pytest.mark.parametrize(
    ("content", "parts"), [(b"\n \n", ["p.txt", "one prompt a line"]), (b"a\xff", ["byte 1"])]
)
def test_generate_refuses_bad_files_of_prompts(
    run: Run, files: dict[str, Path], content: bytes, parts: list[str]
) -> None:
    Path("p.txt").write_bytes(content)
    assert_one_line_error(run("generate", "m.bin", "--prompts", "p.txt"), *parts)
    assert_one_line_error(run("generate", "m.bin", "--prompts", "no.txt"), "no.txt")
    assert run("generate", "m.bin", "--prompts", "p.txt", "-p", "A").code == 2


def test_generate_greedy_story(run: Run) -> None:
    result = run("generate", needs.data("stories260K.bin"), "-t", 0, "-z", needs.data("tok512.bin"))
    assert result.out.startswith("Once upon a time, there was a little girl named Lily. She loved")


def test_eval_random_model_is_near_uniform(run: Run, files: dict[str, Path]) -> None:
    tokens = run("eval", "m.bin", "--data", "d.bin", "--windows", 8, "--json")
    record = json.loads(tokens.out)
    assert record["loss"] == pytest.approx(math.log(259), rel=0.05)
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert len(record["sequences"]) == 8 and record["tokens"] == 8 * 32
    text = json.loads(run("eval", "m.bin", "--text", "t.txt", "--documents", "--json").out)
    assert len(text["sequences"]) == 2
    shown = run("eval", "m.bin", "--text", "t.txt")
    assert shown.code == 0 and "perplexity:" in shown.out


def test_eval_tells_bits_per_byte_whatever_the_tokenizer(run: Run, files: dict[str, Path]) -> None:
    """Of one text by hand: each byte is a token, so loss and bits differ by ln 2 alone."""
    words = ["eval", "m.bin", "--text", "t.txt", "--seq", 16, "--json"]
    record = json.loads(run(*words).out)
    # The blank before a text is none of its bytes, nor is what begins the second document.
    assert record["tokens"] - 3 <= record["bytes"] < record["tokens"]
    assert record["bits_per_byte"] == pytest.approx(record["loss"] / math.log(2), rel=0.02)
    data = json.loads(run("eval", "m.bin", "--data", "d.bin", "--json").out)
    assert data["bits_per_byte"] > 0 and data["tokens_per_s"] > 0
    # Foreign data: wide ids without a file that says so, and a tokenizer that nobody knows.
    np.array(list(range(3, 200)) * 3, "<u4").tofile("wide.bin")
    assert_one_line_error(run("eval", "m.bin", "--data", "wide.bin"), "--dtype uint32")
    wide = run("eval", "m.bin", "--data", "wide.bin", "--dtype", "uint32", "--json")
    assert json.loads(wide.out)["bytes"] == json.loads(wide.out)["tokens"]
    turns = ["compare", "baseline", "opt", "--model", "m.bin", "--data", "wide.bin"]
    turns += ["--rounds", 1, "--steps", 1, "--warmup", 0, "--seq", 8]
    assert_one_line_error(run(*turns), "--dtype uint32")
    assert run(*turns, "--dtype", "uint32").code == 0


def test_bits_per_byte_of_spelled_targets_only() -> None:
    tokenizer = Tokenizer.bytes()
    ids = np.array(tokenizer.encode("a\xe9", eos=True), np.int32)
    tokens, targets = ids[:-1], ids[1:].copy()
    assert spelled_bytes(tokenizer, tokens, targets).tolist() == [0, 1, 1, 1, 0]
    losses = np.array([9.0, 1.0, 2.0, 3.0, 9.0])
    assert bits_per_byte(tokenizer, [(tokens, targets)], [losses]) == (
        pytest.approx(2 / math.log(2)), 3
    )  # fmt: skip
    targets[1:] = -100
    assert bits_per_byte(tokenizer, [(tokens, targets)], [losses]) is None


def test_eval_documents_reproduce_pytorch(run: Run) -> None:
    """The losses are those of llama2.c's model.py in PyTorch on the same five stories."""
    result = run(
        "eval", needs.data("stories260K.bin"), "--text", needs.data("tinystories_sample.txt"),
        "--tokenizer", needs.data("tok512.bin"), "--documents", "--precision", "fp32", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    record = json.loads(result.out)
    losses = [sequence["loss"] for sequence in record["sequences"]]
    assert losses == pytest.approx([1.3160, 1.2386, 0.9522, 1.4934, 1.1879], abs=2e-4)
    assert [s["tokens"] for s in record["sequences"]] == [373, 329, 222, 424, 456]
    assert record["loss"] == pytest.approx(1.2664, abs=2e-4)


def test_eval_needs_exactly_one_input(run: Run, files: dict[str, Path]) -> None:
    assert_one_line_error(run("eval", "m.bin"), "--data", "--text")
    assert_one_line_error(run("eval", "m.bin", "--data", "d.bin", "--text", "t.txt"), "either")


# Conversations, and tokenizers in folders

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant] {% endif %}"


@pytest.fixture
def talker(files: dict[str, Path], run: Run) -> Path:
    """Return a Hugging Face folder of a small model whose tokenizer was trained and may chat."""
    for name in ("tokenizers", "safetensors", "jinja2"):
        needs.module(name)
    assert run("prepare", "t.txt", "-o", "p.bin", "--train-tokenizer", 280).code == 0
    assert run("init", "--dim", 32, "--vocab", 280, "-o", "talker.bin").code == 0
    assert run("convert", "talker.bin", "talker", "-z", "p.tokenizer.json").code == 0
    settings = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    Path("talker/tokenizer_config.json").write_text(json.dumps(settings))
    return Path("talker")


def test_generate_chat_answers_alone_until_a_stop_string(run: Run, talker: Path) -> None:
    words = ["generate", talker, "-n", 30, "-t", 0, "--json"]
    asked = "[user] a cat [assistant] "
    plain = json.loads(run(*words, "-p", asked).out)
    chat = json.loads(run(*words, "--chat", "-p", "a cat").out)
    answer = chat["text"]
    assert plain["text"] == asked + answer and len(answer) > 4
    end = answer[2:4]
    stopped = json.loads(run(*words, "--chat", "--stop", end, "--stop", "\0", "-p", "a cat").out)
    assert stopped["text"] == answer[: answer.index(end)]
    Path("p.txt").write_text("a cat\na dog\n")
    several = json.loads(run(*words, "--chat", "--stop", end, "--prompts", "p.txt").out)
    assert several["texts"][0] == {"prompt": "a cat", "text": stopped["text"]}
    assert_one_line_error(run("generate", "m.bin", "--chat", "-p", "a"), "has no chat template")


def test_tokenizer_of_a_folder_is_taken_by_name(run: Run, talker: Path) -> None:
    result = run("prepare", "t.txt", "-o", "q.bin", "--tokenizer", talker, "--json")
    record = json.loads(result.out)
    assert record["vocab_size"] <= 280 and record["documents"] == 2, result.err
    assert Path("q.bin").read_bytes() == Path("p.bin").read_bytes()
    same = [json.loads(run("eval", "talker.bin", "--data", "q.bin", "--json", *more).out)
            for more in ([], ["-z", talker])]  # fmt: skip
    assert same[0]["bits_per_byte"] is None  # nothing beside it has 280 tokens
    assert same[1]["bits_per_byte"] > 0 and same[0]["loss"] == same[1]["loss"]


def test_adapter_learns_packed_answers_in_a_run_folder(run: Run, talker: Path) -> None:
    lines = [{"prompt": f"say {n} ", "completion": f"it is {n}"} for n in range(40)]
    Path("qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = run("prepare", "qa.jsonl", "-o", "qa.bin", "-z", talker, "--mask-prompt", "--json")
    assert json.loads(made.out)["masked"], made.err
    words = ["train", talker, "--data", "qa.bin", "--lora", "--rank", 2, "--seq", 64, "--accum", 1]
    words += ["--pack", "--held-out", 0.2, "--eval-every", 2, "--lr", 0.01, "--run", "r"]
    result = run(*words, "--steps", 4)
    assert result.code == 0, result.err
    kept = {path.name for path in Path("r").iterdir()}
    assert {"adapter", "best.npz", "checkpoint.npz", "log.jsonl", "plot.html"} <= kept
    result = run("train", "--run", "r", "--resume", "--steps", 6, "--json")
    record = json.loads(result.out)
    assert record["summary"]["step"] == 6 and record["settings"]["pack"], result.err
    assert record["summary"]["held_out_after"] < record["summary"]["held_out_before"]
    text = run("generate", talker, "--adapter", "r/adapter", "-p", "say 3 ", "-n", 8)
    assert text.code == 0 and text.out.startswith("say 3 "), text.err
