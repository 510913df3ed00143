"""Tiny random models made by transformers, one for each way in which families differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import needs
import numpy as np
import numpy.typing as npt

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Heads of 8: of the four pairs one keeps its speed, one or two slow down in part.
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 24,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
_THETA = {"rope_type": "default", "rope_theta": 500000.0}
_NO_WINDOW = {"sliding_window": None}

# name -> class prefix in transformers, what differs from _SIZES.
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "theta-tied": ("Llama", {"rope_parameters": _THETA, "tie_word_embeddings": True}),
    "llama3": ("Llama", {"hidden_size": 32, "rope_parameters": _LLAMA3}),
    "linear": ("Llama", {"rope_parameters": _LINEAR, "rms_norm_eps": 0.01}),
    "wide-heads": ("Llama", {"head_dim": 10}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "rope_parameters": _THETA}),
    "mistral": ("Mistral", {"head_dim": 8, "num_key_value_heads": 1, **_NO_WINDOW}),
}


def build(name: str, **changes: Any) -> Any:
    """Make a model in float32 whose every weight matters: no bias is 0 and no norm weight 1."""
    torch, transformers = needs.peer("torch"), needs.peer("transformers")
    family, differences = CASES[name]
    config = getattr(transformers, f"{family}Config")(**_SIZES | differences | changes)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith("norm.weight"):
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0.0, 0.5 if key.endswith("bias") else 0.2, generator=generator)
    return model


def save(name: str, folder: Path, **changes: Any) -> Any:
    """Save such a model as transformers does and return it."""
    model = build(name, **changes)
    model.save_pretrained(folder)
    return model


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")


def with_adapter(model: Any, **settings: Any) -> Any:
    """Wrap a model in an adapter of PEFT whose B is not zero."""
    torch, peft = needs.peer("torch"), needs.peer("peft")
    config = {"r": 3, "lora_alpha": 5, "target_modules": [*PROJECTIONS]} | settings
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.normal_(0.0, 0.2, generator=generator)
    return wrapped


def sequence(model: Any, length: int = 33, seed: int = 3) -> npt.NDArray[Any]:
    """Draw length + 1 ids of the model's vocabulary."""
    random = np.random.default_rng(seed)
    return random.integers(0, model.config.vocab_size, length + 1)


def logits_of(model: Any, ids: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return transformers' logits (T, V) of one sequence."""
    torch = needs.peer("torch")
    with torch.no_grad():
        return model(torch.from_numpy(ids)[None]).logits[0].numpy()


def loss_and_gradients(
    model: Any, ids: npt.NDArray[Any]
) -> tuple[float, dict[str, npt.NDArray[Any]]]:
    """Return transformers' mean loss of one sequence, and gradients under anepy's names."""
    torch = needs.peer("torch")
    model.zero_grad()
    logits = model(torch.from_numpy(ids[:-1])[None]).logits[0]
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[1:]))
    loss.backward()
    gradients = {k: p.grad.numpy() for k, p in model.named_parameters()}
    return float(loss.detach()), ours(model, gradients)


_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "layers",
}


def ours(model: Any, theirs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Name tensors as anepy does and put the rows of rotary pairs side by side, row by row."""
    c = model.config
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    found = {}
    for key, values in theirs.items():
        name = key
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        if any(part in name for part in (".wq.", ".wk.", ".q_norm.", ".k_norm.")):
            rows = []
            for head in range(len(values) // width):
                for pair in range(width // 2):
                    rows += [head * width + pair, head * width + pair + width // 2]
            values = values[rows]
        found[name] = values
    return found
