"""What a run needs in memory, against what there is, before any of it is used.

The engine reserves addresses for all that its steps will use, and the system gives memory for them
only when they are written: so its own figures are known before anything is taken.
"""

from __future__ import annotations

from ..engine.engine import Engine
from ..errors import ConfigError
from ..system import machine
from ..system.words import size

_PER_TOKEN = 9  # bytes: id and target, int32, and whether a document begins


def check_batch(batch: int, seq: int) -> None:
    """Check that the tokens of a step fit into memory.

    Raises:
        ConfigError: they do not; says how much is needed and available.
    """
    _compare(_batch_nbytes(batch, seq), "the tokens of a step")


def check_memory(engine: Engine, batch: int) -> None:
    """Check that there is memory for all that an engine's steps will use.

    Args:
        engine: before its first step.
        batch: sequences per step.

    Raises:
        ConfigError: there is not; says how much is needed and available.
        NativeError: not even addresses are left, as under a limit of them.
    """
    engine.reserve(batch)
    moments = [array for part in (engine.adam_m, engine.adam_v) for array in part.values()]
    gradients = sum(4 * array.size for array in engine.adam_m.values())
    arenas = gradients + sum(array.nbytes for array in moments)
    tokens = _batch_nbytes(batch, engine.seq_len)
    what = f"activations {size(engine.memory)}, gradients and moments {size(arenas)}"
    _compare(engine.memory + arenas + tokens, what)


def _batch_nbytes(batch: int, seq: int) -> int:
    return batch * seq * _PER_TOKEN


def _compare(needed: int, what: str) -> None:
    available = machine.available_memory()
    if available and needed > available:
        raise ConfigError(
            f"this run needs {size(needed)} of memory ({what}), and {size(available)} are "
            "available: use a smaller batch, shorter sequences, recompute, or a smaller model"
        )
