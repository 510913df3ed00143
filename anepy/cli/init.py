"""`anepy init`: a model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError
from .common import guarded, note, path_option

if TYPE_CHECKING:
    from ..models.model import ModelConfig
    from ..training.sizing import Suggestion


def _size(text: str, *spellings: str) -> Any:
    return typer.Option(*spellings, min=1, help=text, show_default=False)


@guarded
def init(
    preset: Annotated[
        str | None,
        typer.Argument(help="stories260K, stories15M, stories42M or stories110M."),
    ] = None,
    output: Annotated[
        Path, path_option("--output", "-o", metavar="MODEL", help="Result.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    like: Annotated[
        Path | None, path_option(metavar="MODEL", help="Take the dimensions of this model.")
    ] = None,
    dim: Annotated[int | None, _size("Width.")] = None,
    layers: Annotated[int | None, _size("Layers.")] = None,
    heads: Annotated[int | None, _size("Heads of attention.")] = None,
    kv_heads: Annotated[int | None, _size("Heads of keys and values.", "--kv-heads")] = None,
    hidden: Annotated[int | None, _size("Width inside of feed-forward layers.")] = None,
    vocab: Annotated[int | None, _size("Tokens of the vocabulary.")] = None,
    context: Annotated[int | None, _size("Longest sequence.")] = None,
    data: Annotated[
        Path | None,
        path_option(
            metavar="D.bin", help="Choose a size for this token file; its vocabulary is taken."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.01, help="With --data: how long training may take. Default: 20."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Of the weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing file.")] = False,
) -> None:
    """Write a model with random weights, to be trained.

    Its dimensions are those of a preset, of --like MODEL, or those given; what is not given follows
    from --dim. --data measures this machine and chooses them.
    """
    if output.exists() and not force:
        raise ConfigError(f"{output} exists: name another file, or add --force to replace it")
    sources = [preset is not None, like is not None, dim is not None, data is not None]
    if sum(sources) > 1 and not (like is not None and dim is not None and sum(sources) == 2):
        raise ConfigError("give one of PRESET, --like, --dim and --data")
    if not any(sources):
        raise typer.BadParameter("say how large: a preset, --like MODEL, --dim N or --data D.bin")
    if minutes is not None and data is None:
        raise typer.BadParameter("--minutes needs --data, the tokens to train on")
    from ..models.formats import check_writable
    from ..models.model import Model
    from ..system.words import quantity

    given = {
        "dim": dim,
        "hidden_dim": hidden,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "vocab_size": vocab,
        "seq_len": context,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    suggestion = None
    if data is not None:
        suggestion = _suggest(data, vocab, 60 * (20 if minutes is None else minutes))
        config, what = suggestion.config, f"chosen for {data}"
        changes.pop("vocab_size", None)
        config = _changed(config, changes)
    else:
        config, what = _config(preset, like, changes)
    check_writable(config, output)
    model = Model.init(config, seed=seed)
    model.save(output)
    print(f"{output}: {what}, {quantity(model.n_parameters)} parameters, seed {seed}")
    if suggestion is not None and data is not None:
        _say(suggestion, config, data, output)


def _config(
    preset: str | None, like: Path | None, changes: dict[str, int]
) -> tuple[ModelConfig, str]:
    from ..models.model import PRESETS, Model

    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
        return _changed(PRESETS[preset], changes), preset
    if like is not None:
        return _changed(Model.load(like).config, changes), f"like {like}"
    from ..training.sizing import shape

    missing = [name for name in ("vocab_size",) if name not in changes]
    if missing:
        raise ConfigError("--dim needs --vocab, the number of tokens of your tokenizer")
    width = changes["dim"]
    config = shape(width, changes["vocab_size"], changes.get("seq_len", 256))
    return _changed(config, changes), f"dim {width}"


def _changed(config: ModelConfig, changes: dict[str, int]) -> ModelConfig:
    from dataclasses import replace

    if "n_heads" in changes:
        changes = {"n_kv_heads": changes["n_heads"], **changes}
    return replace(config, **changes)  # type: ignore[arg-type]


def _suggest(data: Path, vocab: int | None, seconds: float) -> Suggestion:
    from ..text.data import TokenData
    from ..training.sizing import suggest

    tokens = TokenData(data)
    size = vocab or tokens.vocab_size
    if size is None:
        size = int(tokens.tokens[:].max()) + 1
        note(f"{data} has no .json beside it: its largest id makes a vocabulary of {size}")
    tokens.check(size)
    return suggest(tokens, size, seconds)


def _say(suggestion: Suggestion, config: ModelConfig, data: Path, output: Path) -> None:
    import shlex

    c = config
    print(
        f"dim {c.dim}, {c.n_layers} layers, {c.n_heads} heads, vocabulary {c.vocab_size:,}, "
        f"context {c.seq_len}"
    )
    minutes = suggestion.seconds / 60
    shown = f"{minutes:.0f} minutes" if minutes >= 1.5 else f"{max(1, suggestion.seconds):.0f} s"
    steps = suggestion.steps
    words = ["anepy", "train", str(output), "--data", str(data), "--steps", str(steps)]
    words += ["--batch", str(suggestion.batch), "--accum", "1", "--lr", "1e-3"]
    words += ["--schedule", "cosine", "--warmup", str(max(1, min(100, steps // 20)))]
    words += ["--clip", "1"]
    print(f"about {shown} on this machine, the data read {suggestion.readings:.1f} times:")
    print(f"  {shlex.join(words)}")
