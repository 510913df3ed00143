"""Text from a model: greedy or sampled, with a KV cache; the prompt is read in one pass.

Greedy output is what llama2.c's run.c prints: the prompt is encoded with BOS and printed too, and
the text ends at EOS, or at BOS with a tokenizer of llama2.c's. Only tokens that the tokenizer has
are drawn: a model may have more rows than that.
"""

from __future__ import annotations

import codecs
import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np
import numpy.typing as npt

from ..engine.decoder import Decoder
from ..engine.device import AUTO, choice_note
from ..errors import ConfigError, ModelError
from ..models.model import Model
from ..models.soundness import overflow
from ..models.storages import check_storage
from ..system.terminal import without_control
from .chat import encode_chat
from .tokenizer import Tokenizer
from .tokenizer_stored import resolve_tokenizer

P = ParamSpec("P")


@dataclass
class Speed:
    """What texts took: `stream` adds to it.

    Attributes:
        prompt_tokens: read, all at once.
        prompt_seconds: for that.
        tokens: written.
        passes: of the network for those; the first token of a text follows from its prompt.
        seconds: for those passes.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    passes: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens written one after the other per second; 0 before the first pass."""
        return self.passes / self.seconds if self.seconds else 0.0


def stream(
    model: Model | str | Path | Decoder,
    prompt: str = "",
    tokenizer: Tokenizer | str | Path | None = None,
    temperature: float = 1.0,
    top_p: float = 0.9,
    max_tokens: int = 256,
    seed: int = 0,
    threads: int | None = None,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    weights: str = "auto",
    speed: Speed | None = None,
) -> Iterator[str]:
    """Yield the prompt, then what a model continues it with; never half a character.

    Arguments are checked before the first piece is asked for.

    Args:
        model: a `Model`, the path of one, or a `Decoder`: it is used and left open, so that many
            texts of one model share its memory and threads.
        prompt: the beginning of the text; may be empty.
        tokenizer: a `Tokenizer` or the path of one; None takes the one that came with the model, or
            looks beside its file.
        temperature: 0 takes the likeliest token; 1 samples from the model's distribution.
        top_p: sample among the likeliest tokens that together exceed this probability;
            0 or 1 samples among all.
        max_tokens: new tokens at most; the context may end the text earlier.
        seed: of the sampling; equal settings give equal text.
        threads: CPU threads, None: as many as the process may use; not with a `Decoder`.
        stop: a string or several; the text ends before the first of them.
        chat: put the prompt into the model's chat template as what a user says, and yield the
            answer alone.
        weights: how the model's matrices are stored while it writes: "f32", "bf16" or "q8" (int8,
            a scale for 32 values of a row). Reading them is most of the time of a token. "auto"
            takes a `Model` as it is, and of a path what loses nothing: bf16 or Q8_0 where the
            file is so throughout, else "f32". Not with a `Decoder`.
        speed: counts and times of this text are added to it.

    Raises:
        ConfigError: a setting is out of range or the prompt exceeds the context.
        ModelError, TokenizerError: a file is missing, malformed or does not fit.

    Example:
        >>> for piece in stream("stories260K.bin", "Once", "tok512.bin", temperature=0.0):
        ...     print(piece, end="", flush=True)
    """
    _check_settings(temperature, top_p, max_tokens, seed)
    decoder = model if isinstance(model, Decoder) else None
    if decoder is not None and threads is not None:
        raise ConfigError("a Decoder has its threads already: leave threads out")
    if decoder is not None and weights != "auto":
        raise ConfigError("a Decoder has its weights already: leave weights out")
    loaded = _loaded(model, check_storage(weights, ("auto",)))
    config = loaded.config
    tokenizer = resolve_tokenizer(tokenizer, loaded)
    context = config.seq_len if decoder is None else decoder.max_len
    if chat:
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids = tokenizer.encode(prompt) or [tokenizer.start_id]
    if len(ids) > context:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, the context is {context}: shorten the prompt"
        )
    # The last position's logits still give a token, so one more than the context fits.
    length = min(len(ids) + max_tokens, context + 1)
    picks = Sampling(temperature, top_p, seed)
    ends = [stop] if isinstance(stop, str) else list(stop)
    if "" in ends:
        raise ConfigError("a stop string is empty, every text ends before it: leave it out")
    spent = speed or Speed()
    return _stream(decoder or loaded, tokenizer, ids, length, picks, threads, ends, not chat, spent)


def _joined(pieces: Callable[P, Iterator[str]]) -> Callable[P, str]:
    def generate(*args: P.args, **kwargs: P.kwargs) -> str:
        """Return in one text what `stream` yields for the same arguments: prompt and continuation.

        Raises:
            ConfigError, ModelError, TokenizerError: as `stream` says.

        Example:
            >>> generate("stories260K.bin", "Once upon a time", "tok512.bin", temperature=0.0)
        """
        return "".join(pieces(*args, **kwargs))

    generate.__qualname__ = "generate"
    generate.__signature__ = inspect.signature(pieces)  # type: ignore[attr-defined]
    return generate


generate = _joined(stream)


def _loaded(model: Model | str | Path | Decoder, weights: str) -> Model:
    if isinstance(model, Decoder):
        return model.model
    if not isinstance(model, Model):
        return Model.load(model, weights)
    return model if weights in ("auto", model.storage) else model.stored(weights)


def _stream(
    model: Model | Decoder,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    length: int,
    sampling: Sampling,
    threads: int | None,
    ends: Sequence[str],
    shown: bool,
    spent: Speed,
) -> Iterator[str]:
    # Characters outside the vocabulary come as single bytes: hold them until they are complete.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    stops = tokenizer.stop_ids

    def text(before: int, token: int) -> str:
        # Control characters can garble a terminal; a single one run.c leaves out, too.
        return without_control(decoder.decode(tokenizer.piece(before, token)))

    def written(network: Decoder) -> Iterator[str]:
        token, read = prompt[-1], len(prompt)
        if read < length:
            began = time.perf_counter()
            logits = network.prefill(prompt)
            spent.prompt_tokens += len(prompt)
            spent.prompt_seconds += time.perf_counter() - began
        while read < length:
            if not np.isfinite(logits).all():
                raise ModelError(overflow(model.model if isinstance(model, Decoder) else model))
            following = sampling.pick(logits[: tokenizer.vocab_size])
            if following in stops:
                break
            spent.tokens += 1
            yield text(token, following)
            token, read = following, read + 1
            if read < length:
                began = time.perf_counter()
                logits = network.forward(token, read - 1)
                spent.passes += 1
                spent.seconds += time.perf_counter() - began
        yield decoder.decode(b"", final=True)

    if shown:
        for before, token in pairwise([-1, *prompt]):
            if piece := text(before, token):
                yield piece
    with contextlib.ExitStack() as stack:
        if isinstance(model, Decoder):
            network = model
        else:
            context = min(length, model.config.seq_len)
            network = stack.enter_context(Decoder(model, max_len=context, threads=threads))
        yield from until(written(network), ends)


def until(pieces: Iterator[str], ends: Sequence[str]) -> Iterator[str]:
    """Yield a text up to the first of these strings, holding back what may be the begin of one."""
    waiting = ""
    for piece in pieces:
        waiting += piece
        found = [at for at in map(waiting.find, ends) if at >= 0]
        if found:
            waiting = waiting[: min(found)]
            break
        held = max(
            (n for end in ends for n in range(1, len(end)) if waiting.endswith(end[:n])), default=0
        )
        ready = len(waiting) - held
        if ready:
            yield waiting[:ready]
        waiting = waiting[ready:]
    if waiting:
        yield waiting


def choose_device(device: str) -> str:
    """Check the device text is to be generated on; for "auto" say in one line which it is.

    Raises:
        ConfigError: it is not one that generates text.
    """
    if device == AUTO:
        return choice_note("cpu", ["not ane: text is generated on the CPU only"])
    if device != "cpu":
        raise ConfigError(
            f"text is generated on the CPU, not on device {device}, whose programs compute whole "
            "sequences and keep nothing from one token to the next: leave --device out"
        )
    return ""


class Sampling:
    """Pick the next token from logits.

    Args:
        temperature: 0 for the likeliest token.
        top_p: probability mass to sample from; 0 or 1 for all of it.
        seed: of the random numbers.
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self._random = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits: npt.NDArray[np.float32]) -> int:
        """Return the id of the next token.

        Args:
            logits: float32 `(vocab,)`.
        """
        if self.temperature == 0:
            return int(np.argmax(logits))
        # Differences first: divided by a tiny temperature, large logits have none left.
        scaled = logits.astype(np.float64)
        scaled -= scaled.max()
        with np.errstate(over="ignore"):
            weights = np.exp(scaled / self.temperature)
        weights /= weights.sum()
        ids: npt.NDArray[Any] = np.arange(len(weights))
        if 0 < self.top_p < 1:
            # Tokens too rare to be reached are dropped before sorting: most of a large vocabulary.
            floor = (1.0 - self.top_p) / max(1, len(weights) - 1)
            ids = np.flatnonzero(weights >= floor)
            ids = ids[np.argsort(-weights[ids], kind="stable")]
            kept = int(np.searchsorted(np.cumsum(weights[ids]), self.top_p, side="right")) + 1
            ids = ids[:kept]
        bounds = np.cumsum(weights[ids])
        draw = self._random.random() * bounds[-1]
        return int(ids[min(int(np.searchsorted(bounds, draw, side="right")), len(ids) - 1)])


def _check_settings(temperature: float, top_p: float, max_tokens: int, seed: int) -> None:
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature is {temperature}, it must be finite and not negative")
    if not 0 <= top_p <= 1:
        raise ConfigError(f"top_p is {top_p}, it must be from 0 to 1")
    if max_tokens < 0:
        raise ConfigError(f"max_tokens is {max_tokens}, it must not be negative")
    if seed < 0:
        raise ConfigError(f"seed is {seed}, it must not be negative")
