"""Logits for generation: of a prompt in one pass, then one token at a time."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..models.model import Model
from ..models.views import Array
from .handle import Owner, address, check_counts, float_pointer, id_pointer
from .ids import as_ids

_PASS = 512  # tokens in one call of the library, which Ctrl-C waits for


class Decoder(Owner):
    """Computes logits with a key/value cache, always on the CPU in fp32.

    Args:
        model: the model; its weights may change between tokens, not during one.
        max_len: positions to make room for; default the model's sequence length.
        threads: default from CPU affinity, cgroup quota and physical cores.

    Raises:
        ConfigError: a value out of range.
        NativeError: the system gives no memory.

    Example:
        >>> with Decoder(model) as decoder:
        ...     logits = decoder.prefill([1, 403, 407])
        ...     logits = decoder.forward(int(logits.argmax()), position=3)
        ...     text = generate(decoder, "Once", "tok512.bin")  # begins anew, in the same memory
    """

    def __init__(
        self, model: Model, max_len: int | None = None, threads: int | None = None
    ) -> None:
        check_counts(max_len=max_len, threads=threads)
        self.model = model
        self.max_len = model.config.seq_len if max_len is None else max_len
        self._lib = model.table.lib
        self._logits = np.zeros(model.config.vocab_size, dtype=np.float32)
        handle = ctypes.c_void_p()
        self._lib.anepy_decoder_create(
            ctypes.byref(handle),
            model.table.handle,
            address(model.arena),
            max_len or 0,
            threads or 0,
        )
        self._own(handle, self._lib.anepy_decoder_free)

    def forward(self, token: int, position: int) -> Array:
        """Return the logits after `token`, float32 (vocab_size,), valid until the next call.

        Positions run 0, 1, 2, ...; position 0 starts a new sequence.

        Raises:
            ConfigError: a token beyond the vocabulary or a position beyond `max_len`.
            NativeError: a position that is neither the next one nor 0.
            ClosedError: the decoder was closed.
        """
        _check(token=token, position=position)
        with self._call() as handle:
            self._lib.anepy_decoder_forward(
                handle, float_pointer(self._logits), int(token), position
            )
        return self._logits

    def prefill(self, tokens: npt.ArrayLike, position: int = 0) -> Array:
        """Read tokens in one pass, many at once, as a prompt is; return what `forward` would last.

        The weights are read once for up to 256 tokens. Sums are in another order than those of
        `forward`, so that logits differ by rounding; they do not depend on the threads.

        Args:
            tokens: (n,), at least one; the first is at `position`, the others follow.
            position: the next one, or 0 for a new sequence.

        Returns:
            The logits after the last token, float32 (vocab_size,), valid until the next call.

        Raises:
            ConfigError: as `forward` says, or tokens that are no ids; nothing was read then.
            NativeError: a position that is neither the next one nor 0.
            ClosedError: the decoder was closed.
        """
        _check(position=position)
        ids = as_ids(tokens, "tokens")
        if ids.ndim != 1:
            raise ConfigError(f"tokens have shape {ids.shape}, expected one sequence")
        vocabulary = self.model.config.vocab_size
        for extreme in (int(ids.min()), int(ids.max())):
            if not 0 <= extreme < vocabulary:
                raise ConfigError(f"token {extreme}, the vocabulary has 0 to {vocabulary - 1}")
        if position + len(ids) > self.max_len:
            raise ConfigError(
                f"{len(ids)} tokens from position {position} on, this decoder has room for "
                f"{self.max_len}"
            )
        with self._call() as handle:
            for start in range(0, len(ids), _PASS):
                part = ids[start : start + _PASS]
                last = start + len(part) == len(ids)
                self._lib.anepy_decoder_prefill(
                    handle,
                    float_pointer(self._logits) if last else None,
                    id_pointer(part),
                    len(part),
                    position + start,
                )
        return self._logits


def _check(**values: int) -> None:
    for name, value in values.items():
        if not 0 <= value < 2**31:
            raise ConfigError(f"{name} is {value}, expected a number >= 0")
