"""Logits one token at a time, for generation."""

from __future__ import annotations

import ctypes

import numpy as np

from ..errors import ConfigError
from ..models.model import Model
from ..models.views import Array
from .handle import Owner, address, check_counts, float_pointer


class Decoder(Owner):
    """Computes logits one token at a time with a key/value cache, always on the CPU in fp32.

    Args:
        model: the model; its weights may change between tokens, not during one.
        max_len: positions to make room for; default the model's sequence length.
        threads: default from CPU affinity, cgroup quota and physical cores.

    Raises:
        ConfigError: a value out of range.
        NativeError: the system gives no memory.

    Example:
        >>> with Decoder(model) as decoder:
        ...     for position, token in enumerate([1, 403, 407]):
        ...         logits = decoder.forward(token, position)
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
        for name, value in (("token", token), ("position", position)):
            if not 0 <= value < 2**31:
                raise ConfigError(f"{name} is {value}, expected a number >= 0")
        with self._call() as handle:
            self._lib.anepy_decoder_forward(
                handle, float_pointer(self._logits), int(token), position
            )
        return self._logits
