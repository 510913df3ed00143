"""Adapters beside PEFT: gradients, logits, and what either has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import needs
import numpy as np
import pytest
from tolerances import assert_tensors_close

from anepy.engine import Engine
from anepy.models.lora import Lora
from anepy.models.model import Model


def gradients_of(model: Any, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Return PEFT's gradients of A and B under anepy's names, rows in its order."""
    torch = needs.peer("torch")
    logits = model(torch.from_numpy(ids[:-1])[None]).logits[0]
    torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:])).backward()
    found = {}
    for letter in "AB":
        of = {
            name.replace("base_model.model.", "").replace(f"lora_{letter}.default.", ""): p.grad
            for name, p in model.named_parameters()
            if f"lora_{letter}" in name
        }
        # Rows are those of the projection in B alone.
        if letter == "B":
            of = families.ours(model.base_model.model, {n: g.numpy() for n, g in of.items()})
        else:
            of = {rename(n): g.numpy() for n, g in of.items()}
        stems = {name.removesuffix("weight"): grad for name, grad in of.items()}
        found |= {f"{stem}lora_{letter.lower()}": grad for stem, grad in stems.items()}
    return found


def rename(name: str) -> str:
    for old, new in families._NAMES.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("name", families.CASES)
def test_gradients_and_logits_are_those_of_peft(tmp_path: Path, name: str) -> None:
    theirs = families.save(name, tmp_path / "base")
    model = families.with_adapter(theirs)
    model.save_pretrained(tmp_path / "adapter")
    ids = families.sequence(theirs)
    lora = Lora.load(tmp_path / "adapter")
    with Engine(
        Model.load(tmp_path / "base"), device="cpu", precision="fp32", threads=2, lora=lora
    ) as engine:
        found = engine.logits(ids[:-1])
        engine.step(ids[:-1], ids[1:])
        gradients = {name: np.array(value) for name, value in engine.gradients.items()}
    assert_tensors_close(gradients_of(model, ids), gradients, 1e-4)
    assert np.abs(found - families.logits_of(model, ids[:-1])).max() < 1e-4


@pytest.mark.parametrize("name", families.CASES)
def test_what_is_trained_here_computes_the_same_there(tmp_path: Path, name: str) -> None:
    theirs = families.save(name, tmp_path / "base")
    ids = families.sequence(theirs)
    base, lora = Model.load(tmp_path / "base"), Lora(rank=4, alpha=6, seed=1)
    with Engine(base, device="cpu", precision="fp32", threads=2, lora=lora) as engine:
        before = engine.logits(ids[:-1])
        for _ in range(5):
            engine.step(ids[:-1], ids[1:])
            engine.update(lr=2e-2)
        after = engine.logits(ids[:-1])
    lora.save(tmp_path / "adapter")
    peft = needs.peer("peft")
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert np.abs(families.logits_of(model, ids[:-1]) - after).max() < 1e-4
    assert np.abs(after - before).max() > 0.1
    lora.fuse(base)
    with Engine(base, device="cpu", precision="fp32", threads=2) as engine:
        assert np.abs(engine.logits(ids[:-1]) - after).max() < 1e-5 * np.abs(after).max()
