"""Adapters in files: a folder as PEFT reads and writes it.

Source: PEFT 0.21.2, `LoraConfig` and the names in the adapters that it saves.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError
from ..system import files
from . import hf_config, tensor_file, tensors
from .lora import Lora, projections
from .model import ModelConfig
from .tensor_file import Place
from .views import Array

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What makes an adapter compute something else; "bias" and these beside A and B.
_OTHER = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save",
          "layer_replication", "trainable_token_indices", "target_parameters", "use_qalora",
          "alora_invocation_tokens", "fan_in_fan_out")  # fmt: skip
_NAME = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)\.lora_([AB])\.weight")


# -------------------------------------------------------------------------------------- reading


def load(path: str | os.PathLike[str]) -> Lora:
    """Read an adapter, as `Lora.load` says. Its tensors are read when it gets a model."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"cannot read adapter {folder}: there is no {CONFIG} in it")
    settings = hf_config.json_object(folder / CONFIG)
    _check(folder, settings)
    if not (folder / WEIGHTS).is_file():
        other = "adapter_model.bin"
        hint = f", only {other}: save it as safetensors" if (folder / other).is_file() else ""
        raise ModelError(f"adapter {folder} has no {WEIGHTS}{hint}")
    places = _places(folder / WEIGHTS)
    rank = settings["r"]
    # PEFT divides by the root of the rank then.
    alpha = settings["lora_alpha"] * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)
    lora = Lora(rank, alpha, tuple({target for _, target, _ in places}))

    def fill(config: ModelConfig, weights: Mapping[str, Array]) -> None:
        _fill(lora, places, config, weights, folder / WEIGHTS)

    lora._fill = fill
    return lora


def _check(folder: Path, settings: Mapping[str, Any]) -> None:
    where = folder / CONFIG
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{where} is of a {kind} adapter, anepy computes LORA")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < 1 << 20:
        raise ModelError(f"{where}: r is {rank!r}, expected a rank of at least 1")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise ModelError(f"{where}: lora_alpha is {alpha!r}, expected a number above 0")
    for name in _OTHER:
        if settings.get(name):
            raise ModelError(f"{where}: {name} is {settings[name]!r}, which anepy cannot compute")
    if settings.get("bias", "none") != "none":
        raise ModelError(f"{where}: bias is {settings['bias']!r}, anepy computes none")


def _places(path: Path) -> dict[tuple[int, str, str], Place]:
    """Return where A and B of each projection are, by layer, target and letter."""
    targets = {module: target for target, module in tensors.PROJECTIONS.items()}
    found = {}
    for name, place in tensor_file.places(path).items():
        match = _NAME.fullmatch(name.removeprefix(_PREFIX))
        if match is None or match[2] not in targets:
            raise ModelError(
                f"{path} adapts {name.removeprefix(_PREFIX)}, anepy only the projections of layers:"
                f" {', '.join(targets)}"
            )
        if place.dtype not in tensor_file.DTYPES:
            raise ModelError(f"{path}: tensor {name} is {place.dtype}; save it in f32, f16 or bf16")
        found[int(match[1]), targets[match[2]], match[3]] = place
    if not found:
        raise ModelError(f"{path} holds no tensor; get the adapter again")
    for layer, target, _ in found:
        if (layer, target, "A") not in found or (layer, target, "B") not in found:
            raise ModelError(f"{path} holds only one of A and B of layer {layer}, {target}")
    return found


def _fill(
    lora: Lora,
    places: Mapping[tuple[int, str, str], Place],
    config: ModelConfig,
    weights: Mapping[str, Array],
    path: Path,
) -> None:
    """Copy what the file has; a projection that it leaves out keeps a B of zeros."""
    layers = max(layer for layer, _, _ in places)
    if layers >= config.n_layers:
        raise ModelError(f"{path} adapts layer {layers}, the model has {config.n_layers} layers")
    for tensor in projections(config, lora.targets):
        _, layer, *_, target, _ = tensor.name.split(".")
        for letter in "AB":
            place = places.get((int(layer), target, letter))
            if place is None:
                continue
            name = f"{tensor.name.removesuffix('weight')}lora_{letter.lower()}"
            where = f"{path}: {letter} of layer {layer}, {target},"
            if place.shape != weights[name].shape:
                raise ModelError(
                    f"{where} has shape {list(place.shape)}, with this model it must have "
                    f"{list(weights[name].shape)}"
                )
            values = tensor_file.values(place)
            if letter == "B" and tensor.heads:
                values = tensors.from_half_split(values, tensor.heads)
            tensors.put(weights, name, values, where)


# -------------------------------------------------------------------------------------- writing


def check_writable(lora: Lora, path: str | os.PathLike[str]) -> None:
    """Check that an adapter can be saved, as `Lora.check_writable` says."""
    folder = Path(path)
    tensor_file.package()
    if os.path.lexists(folder) and not folder.is_dir():
        raise ModelError(f"cannot write adapter {folder}: it is no folder; choose another path")
    target = folder / CONFIG if folder.is_dir() else folder
    files.check_writable(target, "adapter", lora.arena.nbytes)


def save(lora: Lora, path: str | os.PathLike[str], base: str | None = None) -> int:
    """Write an adapter, as `Lora.save` says."""
    folder = Path(path)
    weights = lora.weights
    tensor_file.package()
    stored = {}
    for tensor in projections(lora.config, lora.targets):
        stem = tensor.name.removesuffix("weight")
        b = weights[f"{stem}lora_b"]
        if tensor.heads:
            b = tensors.to_half_split(b, tensor.heads)
        theirs = _PREFIX + tensor.hugging_face.removesuffix("weight")
        stored[f"{theirs}lora_A.weight"] = np.ascontiguousarray(weights[f"{stem}lora_a"], "<f4")
        stored[f"{theirs}lora_B.weight"] = np.ascontiguousarray(b, "<f4")
    whole = lora.alpha.is_integer()
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if whole else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [tensors.PROJECTIONS[t].split(".")[-1] for t in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    try:
        with files.replacing_in(folder) as room:
            (room / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
            tensor_file.write(room / WEIGHTS, stored, "f32")
            return sum(each.stat().st_size for each in room.iterdir())
    except OSError as error:
        raise ModelError(files.write_failure(folder, "adapter", error)) from None
