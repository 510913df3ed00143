"""Instructions: conversations, masks, and windows of whole documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import needs
import numpy as np
import pytest

from anepy.errors import DataError, TokenizerError
from anepy.models.model import Model, ModelConfig
from anepy.text.chat import encode_chat, render
from anepy.text.data import TokenData
from anepy.text.document_windows import DocumentSampler
from anepy.text.prepare import prepare
from anepy.text.tokenizer import Tokenizer
from anepy.text.tokenizer_pieces import PieceTokenizer, byte_tokenizer
from anepy.training.config import TrainConfig
from anepy.training.trainer import Trainer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def speaker() -> PieceTokenizer:
    entries, scores = byte_tokenizer().pieces()
    return PieceTokenizer(entries, scores, "speaker", chat_template=TEMPLATE)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def counted(data: TokenData, document: int) -> str:
    assert data.starts is not None and data.mask is not None
    ends = [*data.starts[1:], len(data)]
    begin, end = int(data.starts[document]), ends[document]
    ids = data.tokens[begin:end][data.mask[begin:end] == 1]
    raw = b"".join(b"$" if i == 2 else speaker().piece(-2, int(i)) for i in ids)
    return raw.decode()


def test_answers_alone_count(tmp_path: Path) -> None:
    needs.module("jinja2")
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    line = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = write(tmp_path / "t.jsonl", line, {"prompt": "2+2=", "completion": "4"}, {"text": "xy"})
    done = prepare(path, speaker(), tmp_path / "d.bin", mask_prompt=True)
    data = TokenData(done.path)
    assert done.masked and done.documents == 3
    # A special token begins the next text of this kind, so a blank stands after it.
    assert counted(data, 0) == "a1$a2$"
    assert counted(data, 1) == "4$"
    assert counted(data, 2) == " xy$"
    everything = TokenData(prepare(path, speaker(), tmp_path / "e.bin").path)
    assert everything.mask is not None and everything.starts is not None
    assert np.flatnonzero(everything.mask == 0).tolist() == everything.starts.tolist()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: it is no JSON"),
        ('{"other": 1}', "line 2: it has none of messages, text, or prompt with completion"),
        ('{"messages": "hi"}', "line 2: messages is no list of objects with role and content"),
        ('{"prompt": 1, "completion": "x"}', "line 2: prompt and completion are not both strings"),
        ('{"text": 5}', "line 2: its text is no string"),
    ],
)
def test_malformed_lines_are_named_by_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        prepare(path, speaker(), tmp_path / "d.bin")
    assert [each.name for each in tmp_path.iterdir()] == ["t.jsonl"]


def test_messages_need_a_template(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(TokenizerError, match="line 1 holds messages, and bytes has no chat templ"):
        prepare(path, Tokenizer.bytes(), tmp_path / "d.bin")


def test_template_runs_in_a_sandbox() -> None:
    needs.module("jinja2")
    words = speaker()
    assert render(words, [{"role": "user", "content": "x"}], True) == "<|user|>x\n<|assistant|>"
    assert encode_chat(words, [{"role": "assistant", "content": "x"}], False).count(2) == 1
    words.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match="the chat template of speaker fails"):
        render(words, [{"role": "user", "content": "x"}], True)


def documents(*lengths: int) -> TokenData:
    data = TokenData.from_array(np.arange(1, sum(lengths) + 1))
    data.starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    return data


@pytest.mark.parametrize("pack", [False, True])
def test_windows_hold_whole_documents_once_a_pass(pack: bool) -> None:
    lengths = [3, 9, 5, 2, 4, 8, 3, 12, 1]
    data = documents(*lengths)
    sampler = DocumentSampler(data, 8, seed=3, pack=pack)
    assert sampler.cut == 1 and sampler.windows < len(lengths)
    seen: list[int] = []
    for _ in range(sampler.windows):
        tokens, targets, *starts = sampler.next()
        inside = targets >= 0
        assert (targets[inside] == tokens[inside] + 1).all()
        assert data.starts is not None
        firsts = set((data.starts + 1).tolist())
        assert not firsts & set(targets.tolist())
        if pack:
            begins = np.flatnonzero(starts[0] & inside)
            assert set(tokens[begins].tolist()) <= firsts
            assert set(tokens[inside].tolist()) & firsts == set(tokens[begins].tolist())
        seen += tokens[inside].tolist()
    assert len(seen) == len(set(seen)) == sum(min(n - 1, 8) for n in lengths)


def test_windows_go_on_where_they_were() -> None:
    data = documents(*([5, 3, 7] * 20))
    first = DocumentSampler(data, 8, seed=1, pack=True)
    for _ in range(13):
        first.next()
    again = DocumentSampler(data, 8, seed=9, pack=True)
    again.restore(first.state())
    for _ in range(40):
        for one, other in zip(first.next(), again.next(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("pack", [False, True])
def test_trainer_learns_answers_alone(tmp_path: Path, pack: bool) -> None:
    lines = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(9)]
    path = write(tmp_path / "t.jsonl", *lines)
    done = prepare(path, Tokenizer.bytes(), tmp_path / "d.bin", mask_prompt=True)
    model = Model.init(ModelConfig(32, 48, 1, 2, 2, 300, 32))
    config = TrainConfig(steps=2, seq=24, accum=1, device="cpu", pack=pack)
    with Trainer(model, done.path, config) as trainer:
        assert any("vocabulary of 259, the model has 300" in note for note in trainer.notes)
        counted = [report.stats.tokens for report in trainer]
    # The answer and EOS of each line; three lines of seven tokens fit.
    assert counted == ([6, 6] if pack else [2, 2])


def test_packing_takes_the_window_with_the_least_room() -> None:
    data = documents(*([7, 3] * 50))
    assert DocumentSampler(data, 8, seed=0, pack=True).windows == 50
