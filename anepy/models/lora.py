"""Low-rank adapters: what is added to the projections of a model that itself stays as it is."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np

from ..errors import ConfigError
from . import tensors
from .model import Model, ModelConfig, TensorTable
from .targets import TARGETS, chosen_targets
from .views import Array, Tensors

Fill = Callable[[ModelConfig, Mapping[str, Array]], None]
T = TypeVar("T")


class Lora:
    """A low-rank adapter (LoRA; Hu et al. 2021, arXiv 2106.09685).

    Each adapted projection y = W x becomes y = W x + scale B (A x), with A (rank, in), B (out,
    rank) and scale = alpha / rank. W is not trained. A begins as in PEFT, uniform within
    1 / sqrt(in), B with zeros, so that the model first computes what it did.

    It is made without a model and gets its tensors from the first `Engine` or `attach`; they are
    trained in place, and further engines of models with the same dimensions go on with them.

    Args:
        rank: rows of A, at least 1.
        alpha: what the adapter is multiplied with, times rank.
        targets: which projections, any of wq, wk, wv, wo, w1, w2, w3: a sequence, or one text with
            commas.
        seed: of A.

    Attributes:
        rank, alpha, targets, seed: as given; the targets in the order of the model.
        scale: alpha / rank.

    Raises:
        ConfigError: one of them is out of range.

    Example:
        >>> lora = Lora(rank=8, alpha=16, targets=("wq", "wv"))
        >>> with Engine(Model.load("model"), lora=lora) as engine:
        ...     loss = engine.step([1, 2, 3], [2, 3, 4]).loss
        ...     engine.update(lr=1e-3)
        >>> lora.save("adapter")
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        targets: Sequence[str] | str = TARGETS,
        seed: int = 0,
    ) -> None:
        if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
            raise ConfigError(f"rank is {rank!r}, it must be a whole number of at least 1")
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, (int, float))
            or not (math.isfinite(alpha) and alpha > 0)
        ):
            raise ConfigError(f"alpha is {alpha!r}, it must be finite and above 0")
        if seed < 0:
            raise ConfigError(f"seed is {seed}, expected a number >= 0")
        self.rank = int(rank)
        self.alpha = float(alpha)
        self.targets = chosen_targets(targets)
        self.seed = seed
        self._fill: Fill | None = None
        self._config: ModelConfig | None = None
        self._arena: Array | None = None
        self._weights: Tensors | None = None

    def __repr__(self) -> str:
        return f"Lora(rank={self.rank}, alpha={self.alpha:g}, targets={self.targets})"

    @property
    def scale(self) -> float:
        """What B (A x) is multiplied with: alpha / rank."""
        return self.alpha / self.rank

    @property
    def config(self) -> ModelConfig:
        """The dimensions of the models it adapts.

        Raises:
            ConfigError: it has none yet.
        """
        return _attached(self._config)

    @property
    def arena(self) -> Array:
        """All its parameters, float32 (n,), in the order of `weights`.

        Raises:
            ConfigError: it has none yet.
        """
        return _attached(self._arena)

    @property
    def weights(self) -> Tensors:
        """Its tensors as writable float32 views, by names like `layers.0.attention.wq.lora_a`.

        `…lora_a` is (rank, in) and `…lora_b` (out, rank), the rows of wq and wk in anepy's order.

        Raises:
            ConfigError: it has none yet.
        """
        return _attached(self._weights)

    def attach(self, config: ModelConfig) -> None:
        """Make its tensors for models of these dimensions, if it has none yet.

        Raises:
            ConfigError: it belongs to models of other dimensions.
            ModelError: it was loaded from a file that does not fit them.
        """
        table = TensorTable(config, lora=self)
        if self._config is not None:
            if table.adapter != TensorTable(self._config, lora=self).adapter:
                raise ConfigError(
                    f"the adapter belongs to models like {self._config}, not {config}: "
                    "make another one"
                )
            return
        arena = table.arena(trainable=True)  # which the adapter alone is
        views = {
            name: arena[at : at + math.prod(shape)].reshape(shape)
            for name, (at, shape) in table.adapter.items()
        }
        random = np.random.default_rng(self.seed)
        for name, view in views.items():
            if name.endswith("lora_a"):
                bound = 1 / math.sqrt(view.shape[1])
                view[...] = random.uniform(-bound, bound, view.shape)
        if self._fill is not None:
            self._fill(config, views)
        self._fill = None
        self._config, self._arena, self._weights = config, arena, Tensors(views)

    def fuse(self, model: Model) -> Model:
        """Add the adapter to the weights of a model: W becomes W + scale B A.

        Args:
            model: is changed in place.

        Returns:
            The same model.

        Raises:
            ConfigError: it belongs to models of other dimensions.
        """
        self.attach(model.config)
        for name, a in self.weights.items():
            if name.endswith("lora_a"):
                stem = name.removesuffix("lora_a")
                product = (self.weights[f"{stem}lora_b"] * np.float32(self.scale)) @ a
                model.weights[f"{stem}weight"] = model.weights[f"{stem}weight"] + product
        return model

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lora:
        """Read an adapter in the format of PEFT.

        Args:
            path: a folder with `adapter_config.json` and `adapter_model.safetensors`.

        Raises:
            ModelError: there is none, it is damaged, or it holds what anepy cannot compute.
        """
        from . import peft

        return peft.load(path)

    def save(self, path: str | os.PathLike[str], base: str | None = None) -> int:
        """Write the adapter in the format of PEFT, complete or not at all.

        Args:
            path: a folder, which is made; one that is there keeps its other files.
            base: what PEFT shall load as its base model: a path or a name.

        Returns:
            The bytes written.

        Raises:
            ConfigError: it has no tensors yet.
            ModelError: it cannot be written; what was there is unchanged.
        """
        from . import peft

        return peft.save(self, path, base)

    def check_writable(self, path: str | os.PathLike[str]) -> None:
        """Check that the adapter can be saved later, before anything expensive starts.

        Raises:
            ConfigError: nothing can be written there.
            ModelError: the package for it is missing, or the path is a file.
        """
        from . import peft

        peft.check_writable(self, path)


def _attached(value: T | None) -> T:
    if value is None:
        raise ConfigError(
            "the adapter has no tensors yet: give it to an Engine, or attach(model.config)"
        )
    return value


def projections(config: ModelConfig, targets: Sequence[str]) -> Iterator[tensors.Tensor]:
    """Yield the weights of the projections that are adapted."""
    for tensor in tensors.tensors(config):
        if tensor.name.split(".")[-2] in targets and tensor.name.endswith(".weight"):
            yield tensor
