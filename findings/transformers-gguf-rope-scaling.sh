#!/usr/bin/env bash
# transformers 5.24.0 loads a Llama of a GGUF file without its RoPE scaling, and says nothing.
#
# llama.cpp keeps linear scaling in `llama.rope.scaling.factor` and Llama 3's as divisors of the
# frequencies in the tensor `rope_freqs.weight`; its own loader applies both. transformers reads
# neither: the model it makes has rope_type "default", and beyond the first positions other logits
# than the file means. Seen with transformers 5.24.0, gguf 0.19.0, torch 2.13.0:
#
#   plain: rope_type default
#   linear: rope_type default, logits equal to those of plain: True
#   llama3: rope_type default, logits equal to those of plain: True
#
# Exits with 0 while that is so, with 1 when it changes.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install -q transformers==5.24.0 gguf==0.19.0 torch==2.13.0 accelerate

cat >"$room/show.py" <<'PYTHON'
import sys

import gguf
import numpy as np
import torch
import transformers

DIM, HIDDEN, HEADS, VOCABULARY, LENGTH = 32, 48, 2, 40, 64


def write(path: str, linear: float = 0.0, divisors: list[float] | None = None) -> None:
    """Write a Llama of one layer; the same weights each time."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(DIM)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(DIM // HEADS)
    writer.add_vocab_size(VOCABULARY)
    if linear:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(linear)
    shapes = {
        "token_embd": (VOCABULARY, DIM),
        "output": (VOCABULARY, DIM),
        "blk.0.ffn_down": (DIM, HIDDEN),
        "blk.0.ffn_gate": (HIDDEN, DIM),
        "blk.0.ffn_up": (HIDDEN, DIM),
    } | {f"blk.0.attn_{part}": (DIM, DIM) for part in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(DIM, np.float32))
    if divisors:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder: str, name: str) -> tuple[str, torch.Tensor]:
    """Return the kind of RoPE and the logits of a sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype="float32"
    )
    with torch.no_grad():
        logits = model(torch.arange(VOCABULARY)[None]).logits
    return model.config.rope_parameters["rope_type"], logits


folder = sys.argv[1]
write(f"{folder}/plain.gguf")
write(f"{folder}/linear.gguf", linear=4.0)
write(f"{folder}/llama3.gguf", divisors=[1, 1, 1.5, 4, 8, 8, 8, 8])
found = {name: load(folder, f"{name}.gguf") for name in ("plain", "linear", "llama3")}
print(f"plain: rope_type {found['plain'][0]}")
as_seen = found["plain"][0] == "default"
for name in ("linear", "llama3"):
    kind, logits = found[name]
    same = bool(torch.equal(logits, found["plain"][1]))
    print(f"{name}: rope_type {kind}, logits equal to those of plain: {same}")
    as_seen = as_seen and same and kind == "default"
sys.exit(0 if as_seen else 1)
PYTHON
"$room/venv/bin/python" "$room/show.py" "$room" 2>"$room/log" || {
    cat "$room/log" >&2
    echo "this has changed" >&2
    exit 1
}
