"""The gradients an engine accumulates, and work an update saves while nobody holds a view."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from ..models.model import TensorTable
from ..models.views import Array, assign, frozen_text

_EMBEDDING = "tok_embeddings.weight"


class Gradients(Mapping[str, Array]):
    """The accumulated gradients of the trainable tensors by name, zero after an update.

    The first step after an update replaces the old gradients. So an update writes zeros only while
    somebody holds a view of them; they would be an eighth of its memory traffic. And its norm is
    that of what the steps noted, without reading the gradients, unless somebody held a view since
    the last step and may have written to it.
    """

    def __init__(self, table: TensorTable, arena: Array, guard: threading.RLock) -> None:
        self._places, self._frozen = table.trainable, table.frozen
        self._arena, self._guard = arena, guard
        self._root: Callable[[], Array | None] = lambda: None
        self.stale = False  # an update has left out the zeros
        self.exposed = False  # somebody held a view since the last step

    @property
    def seen(self) -> bool:
        """Whether a view is alive."""
        return self._root() is not None

    def __getitem__(self, name: str) -> Array:
        if name in self._frozen:
            raise KeyError(frozen_text(name))
        offset, shape = self._places[name]
        with self._guard:
            self.show()
            return self._lend()[offset : offset + math.prod(shape)].reshape(shape)

    def __setitem__(self, name: str, values: npt.ArrayLike) -> None:
        """Copy values into a gradient, as `assign` does."""
        assign(self, name, values, self._frozen)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def buckets(self) -> list[Array]:
        """Return views of neighbours in the order in which a step finishes them.

        Final norm and classifier, the layers from the last to the first, the embedding.
        """
        with self._guard:
            return [self._lend()[begin:end] for begin, end in self.bucket_places()]

    def bucket_places(self) -> list[tuple[int, int]]:
        """Return where each bucket begins and ends, in the same order."""
        found: dict[str, tuple[int, int]] = {}
        for name in reversed(self._places):
            offset, shape = self._places[name]
            end = found.get(_bucket(name), (0, offset + math.prod(shape)))[1]
            found[_bucket(name)] = offset, end
        return list(found.values())

    def _lend(self) -> Array:
        self.exposed = True
        root = self._root()
        if root is None:
            # Each view, and each view of a view, keeps this array alive.
            root = np.frombuffer(self._arena.data, dtype=np.float32)
            self._root = weakref.ref(root)
        return root

    def show(self) -> None:
        """Write the zeros that an update has left out."""
        if self.stale:
            self._arena.fill(0.0)
            self.stale = False


def _bucket(name: str) -> str:
    """Return what a tensor becomes final with: its layer, the embedding, or what follows both."""
    if name.startswith("layers."):
        return name.split(".")[1]
    return _EMBEDDING if name == _EMBEDDING else ""
