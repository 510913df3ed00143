"""Inputs and float64 results of every device program, packed as its surfaces are.

Inputs are rounded to fp16 first, so that what is left between a program and the reference is the
program's own rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from reference import llama64 as ref
from tolerances import relative_error

from anepy.hardware import programs as mil
from anepy.models.model import Model, ModelConfig

Array = npt.NDArray[Any]

# Gradients as large as loss scaling makes them: far from fp16's smallest normal number, 6e-5.
GRADIENT = 32.0


@dataclass(frozen=True)
class Case:
    """One program with one input.

    Attributes:
        program: its description.
        inputs: by surface name, shaped as in the MIL text, fp16.
        expected: by tensor name, float64 in the reference's layout, (T, C) or (H, T, T).
        n: tokens T; the columns from there on are zero in the inputs.
    """

    program: mil.Description
    inputs: dict[str, Array]
    expected: dict[str, Array]
    n: int

    @property
    def packed(self) -> Array:
        """The packed input as float32 (channels, width)."""
        return np.asarray(self.inputs["a_in"][0, :, 0], np.float32)

    def errors(self, packed: npt.ArrayLike) -> dict[str, float]:
        """Compare a packed output, (channels, width) or as in the text, with what is expected.

        Returns:
            tensor name -> relative error, infinite if a number is not finite.
        """
        out = np.asarray(packed, np.float64).reshape(self.program.output_channels, -1)
        found = {}
        for port in self.program.kind("output"):
            rows = out[port.channel : port.channel + port.channels]
            expected = self.expected[port.name]
            if expected.ndim == 3:  # channel = head * width + query
                actual = rows.reshape(len(expected), -1, self.program.width)
                # Beyond the diagonal, dprobs is unspecified: probabilities are zero there.
                actual, expected = np.tril(actual[:, : self.n, : self.n]), np.tril(expected)
            else:
                actual = rows[:, : self.n].T
            finite = bool(np.isfinite(rows).all())
            found[port.name] = relative_error(actual, expected) if finite else np.inf
        return found


def f64(array: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Widen an array; np.float64(array) makes a scalar of it in older versions of numpy."""
    return np.asarray(array, np.float64)


def _half(x: npt.ArrayLike) -> Array:
    return np.asarray(x).astype(np.float16)


def grouped_softmax(logits: Array) -> Array:
    """Normalise (T, V) logits within the groups of `libsrc/programs/programs.h`: v modulo V/128."""
    groups = -(-logits.shape[1] // 128)
    probs = np.empty_like(logits)
    for group in range(groups):
        probs[:, group::groups] = ref.softmax(logits[:, group::groups])
    return probs


def join_groups(probs: Array, logits: Array) -> tuple[Array, Array]:
    """Do what the host does with the groups: return probabilities (T, V) and log-sum-exp (T,)."""
    groups = -(-logits.shape[1] // 128)
    lse = np.empty((len(logits), groups))
    for group in range(groups):
        p, x = probs[:, group::groups], logits[:, group::groups]
        best = p.argmax(axis=1)[:, None]
        lse[:, group] = np.take_along_axis(x - np.log(p), best, 1)[:, 0]
    top = lse.max(axis=1, keepdims=True)
    total = np.log(np.exp(lse - top).sum(axis=1)) + top[:, 0]
    weights = np.exp(lse - total[:, None])
    return probs * weights[:, np.arange(logits.shape[1]) % groups], total


def _tensors(
    name: str, model: Model, program: mil.Description, n: int, rng: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return inputs (fp16) and expected outputs of a program."""
    config, weights = model.config, model.weights
    w = ref.layer_weights(weights, program.layer)
    frequencies = ref.rope_frequencies(config)
    x = _half(rng.standard_normal((n, config.dim)))
    dy = _half(rng.standard_normal((n, config.dim)) * GRADIENT)
    x64, dy64 = f64(x), f64(dy)
    if name == "sdpa_fwd":
        o = ref.sdpa_fwd(x64, w, config)
        return {"x": x}, {**o, "out": o["o_out"]}
    if name == "ffn_fwd":
        o = ref.ffn_fwd(x64, w, config.norm_eps)
        return {"x": x}, {**o, "out": o["ffn_out"], "xnorm": o["x2norm"]}
    if name == "ffn_bwd":
        o = ref.ffn_fwd(x64, w, config.norm_eps)
        ins = {"dy": dy, "h1": _half(o["h1"]), "h3": _half(o["h3"])}
        dx, dh1, dh3 = ref.ffn_bwd(dy64, f64(ins["h1"]), f64(ins["h3"]), w)
        return ins, {"dx": dx, "dh1": dh1, "dh3": dh3}
    if name in ("sdpa_bwd1", "sdpa_bwd2", "qkv_bwd"):
        o = ref.sdpa_fwd(x64, w, config)
        q, k, v = (_half(o[t]) for t in "qkv")
        q64, k64, v64 = f64(q), f64(k), f64(v)
        dv, probs, dprobs = ref.sdpa_bwd1(q64, k64, v64, dy64, w, config)
        if name == "sdpa_bwd1":
            return {"q": q, "k": k, "v": v, "dy": dy}, {"dv": dv, "probs": probs, "dprobs": dprobs}
        ins = {"probs": _half(probs), "dprobs": _half(dprobs), "q": q, "k": k}
        dq, dk = ref.sdpa_bwd2(f64(ins["probs"]), f64(ins["dprobs"]), q64, k64, config)
        dq, dk = (ref.rope(d, frequencies, inverse=True) for d in (dq, dk))
        if name == "sdpa_bwd2":
            return ins, {"dq": dq, "dk": dk}
        ins = {"dq": _half(dq), "dk": _half(dk), "dv": _half(dv)}
        dq, dk, dv = (f64(ins[t]) for t in ("dq", "dk", "dv"))
        return ins, {"dx": ref.qkv_bwd(dq, dk, dv, w)}
    final = f64(weights["norm.weight"])
    if name.startswith("rmsnorm_bwd"):
        norm = {"rmsnorm_bwd": "attention_norm", "rmsnorm_bwd_ffn": "ffn_norm"}.get(name)
        scale = final if norm is None else w[norm]
        return {"dy": dy, "x": x}, {
            "dx": ref.rmsnorm_backward(dy64, x64, scale, config.norm_eps)[0]
        }
    if name == "final_rmsnorm":
        return {"x": x}, {"xnorm": ref.rmsnorm(x64, final, config.norm_eps)}
    classifier = weights["tok_embeddings.weight" if config.tied else "output.weight"]
    if name == "classifier_fwd":
        rows = slice(program.first_row, program.first_row + program.output_channels)
        return {"x": x}, {"logits": ref.linear(x64, f64(classifier[rows]))}
    if name == "classifier_bwd":
        rows = slice(program.first_row, program.first_row + program.input_channels)
        dlogits = _half(rng.standard_normal((n, program.input_channels)))
        return {"dlogits": dlogits}, {"dx": f64(dlogits) @ f64(classifier[rows])}
    assert name == "softmax", f"no reference for program {name}"
    logits = _half(rng.standard_normal((n, config.vocab_size)) * 2.0)
    return {"logits": logits}, {"probs": grouped_softmax(f64(logits))}


def _pack(tensor: Array, width: int) -> Array:
    """(T, C) -> (C, width), (H, T, T) -> (H * width, width); zeros behind."""
    n = tensor.shape[-2]
    if tensor.ndim == 3:
        packed = np.zeros((len(tensor), width, width), np.float16)
        packed[:, :n, :n] = tensor
        return packed.reshape(-1, width)
    packed = np.zeros((tensor.shape[1], width), np.float16)
    packed[:, :n] = tensor.T
    return packed


def weight_surface(model: Model, port: mil.Port) -> Array:
    """Fill the surface of a live weight: fp16 (1, channels, 1, columns)."""
    rows, cols = port.shape
    weight = model.arena[port.offset : port.offset + rows * cols].reshape(rows, cols)
    surface = np.zeros((1, port.channels, 1, port.columns), np.float16)
    if rows == 1:
        surface[0, :, 0] = weight.T  # a norm repeats along its row
    else:
        surface[0, :rows, 0, :cols] = weight
    return surface


def make_case(
    model: Model,
    name: str,
    n: int,
    *,
    width: int = 64,
    layer: int = 0,
    part: int = 0,
    live: bool = False,
    seed: int = 5,
) -> Case:
    """Draw the inputs of a program and compute what it must return.

    Args:
        model: whose weights it uses.
        name: of the program.
        n: tokens, at most `width`.
        width: columns of the surfaces.
        layer: whose weights.
        part: slice of the vocabulary.
        live: weights are inputs.
        seed: of the inputs.
    """
    program = mil.describe(model.table, name, width=width, layer=layer, part=part, live=live)
    tensors, expected = _tensors(name, model, program, n, np.random.default_rng(seed))
    packed = np.concatenate([_pack(tensors[port.name], width) for port in program.kind("input")])
    assert packed.shape == (program.input_channels, width)
    inputs = {"a_in": packed[None, :, None]}
    if live:
        inputs |= {port.surface: weight_surface(model, port) for port in program.kind("weight")}
    return Case(program, inputs, expected, n)


def random_model(config: ModelConfig, seed: int = 3) -> Model:
    """Draw a model whose norm weights are not 1 and whose activations stay near 1."""
    model = Model(config)
    for name, values in ref.random_weights(config, seed, 1.0 / config.dim**0.5).items():
        model.weights[name][...] = values
    return model
