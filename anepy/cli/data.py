"""`anepy eval` and `anepy prepare`."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, DataError, ModelError, TokenizerError
from .common import (
    AdapterOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ModelOption,
    PrecisionOption,
    ThreadsOption,
    TokenizerOption,
    adapted_model,
    guarded,
    model_path,
    note,
    path_argument,
    path_option,
    print_json,
    table,
    unescaped,
)

if TYPE_CHECKING:
    from ..models.model import Model
    from ..text.data import TokenData, Window
    from ..text.tokenizer import Tokenizer

DEFAULT_WINDOWS = 64
BYTES = "bytes"


@guarded
def evaluate(
    model: ModelArgument = None,
    model_option: ModelOption = None,
    data: Annotated[Path | None, path_option(metavar="FILE", help="Token file.")] = None,
    text: Annotated[
        Path | None,
        path_option(metavar="FILE", help="Text file, instead of a token file."),
    ] = None,
    adapter: AdapterOption = None,
    tokenizer: TokenizerOption = None,
    seq: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens per sequence. Default: 256, for documents all; at most the context.",
            show_default=False,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Sequences, evenly spaced. Default: {DEFAULT_WINDOWS}, or all documents.",
            show_default=False,
        ),
    ] = None,
    documents: Annotated[
        bool, typer.Option("--documents", help="Each document from its start, one loss each.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure loss, perplexity and bits per byte on tokens or on text."""
    path = model_path(model, model_option)
    if (data is None) == (text is None):
        raise ConfigError("pass what to evaluate on: either --data FILE or --text FILE")
    from ..engine.engine import Engine
    from ..engine.evaluation import mean_loss, means, token_losses
    from ..models.model import sequence_length
    from ..models.soundness import overflow
    from ..system.words import perplexity, quantity
    from ..text.bits import bits_per_byte

    loaded = adapted_model(path, adapter)
    context = loaded.config.seq_len
    length = context if documents and seq is None else sequence_length(seq, context)
    with _tokens(data, text, tokenizer, loaded, dtype) as (tokens, words):
        tokens.check(loaded.config.vocab_size)
        sequences = _sequences(tokens, length, windows, documents, shorten=seq is None)
        longest = max(len(ids) for ids, _ in sequences)
        with Engine(
            loaded, device=device, precision=precision, seq_len=longest, threads=threads
        ) as engine:
            engine.reserve(len(sequences))
            began = time.perf_counter()
            each = token_losses(engine, sequences)
            seconds = time.perf_counter() - began
            facts: dict[str, Any] = {
                "device": engine.device,
                "device_note": engine.device_note,
                "precision": engine.precision,
            }
    losses = means(sequences, each)
    count = sum(n for n, _ in losses)
    loss = mean_loss(losses)
    if not math.isfinite(loss):
        raise ModelError(overflow(loaded))
    bits, nbytes = (words and bits_per_byte(words, sequences, each)) or (None, None)
    name = str(data if data is not None else text)
    if as_json:
        print_json(
            {
                "command": "eval",
                "model": str(path),
                "data": name,
                "loss": loss,
                "perplexity": perplexity(loss),
                "bits_per_byte": bits,
                "tokens": count,
                "bytes": nbytes,
                "sequences": [{"tokens": n, "loss": value} for n, value in losses],
                "seconds": seconds,
                "tokens_per_s": count / seconds,
                **facts,
            }
        )
        return
    note(facts["device_note"])
    rows = [
        ("model", f"{path.name}, {facts['device']}, {facts['precision']}"),
        ("data", f"{name}, {quantity(count)} tokens in {len(losses)} sequences"),
    ]
    if documents:
        rows += [(f"document {i}", f"{v:.4f} ({n} tokens)") for i, (n, v) in enumerate(losses, 1)]
    rows += [
        ("loss", f"{loss:.4f}"),
        ("perplexity", f"{perplexity(loss):,.3f}"),
        *([("bits per byte", f"{bits:.4f}")] if bits is not None else []),
        ("speed", f"{count / seconds:,.0f} tokens/s"),
    ]
    table("anepy eval", rows)


@contextmanager
def _tokens(
    data: Path | None, text: Path | None, tokenizer: Path | None, model: Model, dtype: str
) -> Iterator[tuple[TokenData, Tokenizer | None]]:
    """Yield the tokens to evaluate on, and what made them if that is known."""
    from ..system.files import scratch
    from ..text.data import TokenData
    from ..text.prepare import prepare
    from ..text.tokenizer_stored import resolve_tokenizer

    if data is not None:
        found = TokenData(data, dtype)
        try:
            yield found, resolve_tokenizer(tokenizer or found.tokenizer_file, model)
        except TokenizerError as error:
            if tokenizer is not None:
                raise
            note(f"no bits per byte: {error}")
            yield found, None
        return
    assert text is not None
    words = resolve_tokenizer(tokenizer, model)
    with scratch() as folder:
        prepared = prepare(text, words, folder / "tokens.bin", eos=False)
        tokens = TokenData(prepared.path)
        tokens.name = str(text)
        yield tokens, words


def _sequences(
    data: TokenData, length: int, count: int | None, documents: bool, shorten: bool
) -> list[Window]:
    """Return what to evaluate: documents cut to `length`, or evenly spaced windows."""
    import numpy as np

    from ..text.data import windows
    from ..text.document_windows import document_windows
    from ..text.tokenizer_pieces import BOS_ID

    if not documents:
        if shorten:
            # Short data is no error unless a length was asked for.
            length = max(1, min(length, len(data) - 1))
        return list(windows(data, length, count or DEFAULT_WINDOWS))
    starts = data.starts
    if starts is None:
        starts = np.flatnonzero(data.tokens[:] == BOS_ID)
    if not len(starts):
        raise DataError(f"{data.name} has no documents, no token {BOS_ID} begins one; leave it out")
    return document_windows(data, starts, length, count)


@guarded
def prepare(
    texts: Annotated[
        list[Path],
        path_argument(metavar="TEXT...", help="Text or JSON lines, .gz too; - is standard input."),
    ],
    output: Annotated[
        Path,
        path_option("--output", "-o", metavar="D.bin", help="Token file to write."),
    ],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "-z",
            metavar="FILE",
            help="Tokenizer, or a model that has one. Default: 'bytes'.",
            show_default=False,
        ),
    ] = None,
    train_tokenizer: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Train a vocabulary of N tokens on the text, and keep it beside the data.",
            show_default=False,
        ),
    ] = None,
    separator: Annotated[
        str,
        typer.Option(help=r"Text between documents, like '\n\n'; '' makes each file one document."),
    ] = "<|endoftext|>",
    split: Annotated[
        float, typer.Option(help="Part of the documents for validation, to D.val.bin.")
    ] = 0.0,
    mask_prompt: Annotated[
        bool, typer.Option("--mask-prompt", help="Of instructions, learn the answers only.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn text into training data.

    Writes token ids, and beside them where documents begin and how they were made.
    """
    if tokenizer is not None and train_tokenizer is not None:
        raise ConfigError("a tokenizer is either given or trained: leave one of the options out")
    from ..system.download import progress_bar
    from ..system.words import quantity
    from ..text.prepare import prepare as prepare_data
    from ..text.tokenizer import Tokenizer

    words: Tokenizer | int
    if train_tokenizer is not None:
        words = train_tokenizer
    elif tokenizer in (None, BYTES):
        words = Tokenizer.bytes()
        if tokenizer is None:
            note(
                "no tokenizer is named, so each byte is a token: --train-tokenizer 4096 makes "
                "better ones, --tokenizer FILE takes those of a model"
            )
    else:
        words = Tokenizer.load(str(tokenizer))
    with progress_bar("tokenizing") as progress:
        done = prepare_data(
            texts,
            words,
            output,
            separator=unescaped(separator),
            progress=progress,
            split=split,
            mask_prompt=mask_prompt,
        )
    if as_json:
        print_json(
            {
                "command": "prepare",
                "path": str(done.path),
                "sidecar": str(done.sidecar),
                "tokens": done.tokens,
                "documents": done.documents,
                "vocab_size": done.vocab_size,
                "dtype": done.dtype,
                "validation": str(done.validation) if done.validation else None,
                "validation_tokens": done.validation_tokens,
                "validation_documents": done.validation_documents,
                "tokenizer_file": str(done.tokenizer_file) if done.tokenizer_file else None,
                "masked": done.masked,
            }
        )
        return

    def counted(tokens: int, documents: int) -> str:
        return f"{quantity(tokens)} tokens, {documents:,} document{'' if documents == 1 else 's'}"

    print(
        f"{done.path}: {counted(done.tokens, done.documents)}, {done.dtype}, "
        f"vocabulary {done.vocab_size:,}"
    )
    if done.validation is not None:
        told = counted(done.validation_tokens, done.validation_documents)
        print(f"{done.validation}: {told}")
    if done.tokenizer_file is not None:
        print(f"{done.tokenizer_file}: the tokenizer, trained on this text")
