"""The step engine from Python: forward, backward and update."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..models.model import Model
from ..models.views import Array, Tensors
from ..native import abi
from .adapt import adapted
from .device import AUTO, open_device
from .gradients import Gradients
from .handle import Owner, address, check_counts, encoded, float_pointer, id_pointer
from .ids import as_ids, pair
from .stats import StepStats, UpdateStats
from .variants import named_switches

_DEFER = 1


class Engine(Owner):
    """Trains a model: one sequence or several per step, gradients accumulate until `update`.

    Use one engine from one thread at a time. The model's weights are updated in place. `gradients`
    (sums since the last update, times the loss scale), `adam_m` and `adam_v` are float32 views by
    the names of `Model.weights`; assigning to a name copies into the view.
    `device` and `device_note` say where it runs and, if that was left to anepy, why there;
    `precision` and `precision_note` in what.

    Args:
        model: the model to train.
        variant: a named set of switches, with any of +switch and -switch behind it.
        device: "auto", "cpu", "ane", or "sim", the simulated Neural Engine; "sim:m1" to "sim:m5"
            choose its chip, and "sim:m1,budget=20" lets a process compile 20 programs.
        precision: "auto", or what the device computes in: "fp32" or "bf16" on cpu, "fp16" on
            sim and ane.
            "bf16" rounds the factors of matrix products; sums, and everything else, stay float32.
            It needs a processor with bf16 dot products, where "auto" takes it.
        seq_len: longest sequence; default the model's.
        threads: default from CPU affinity, cgroup quota and physical cores.
        loss_scale: what dynamic loss scaling starts with (fp16 only); default 4096.
        defer: compile programs when they are first needed, not at once. For callers that will call
            `restore`: programs for weights about to be replaced would be wasted.

    Raises:
        ConfigError: a name is unknown, a value out of range, or a device not usable here.
        CompileBudgetError: this process may compile no more programs.
        NativeError: the system gives no memory.

    Example:
        >>> with Engine(Model.init(PRESETS["stories260K"])) as engine:
        ...     loss = engine.step([1, 2, 3], [2, 3, 4]).loss
        ...     engine.update(lr=1e-3)
    """

    def __init__(
        self,
        model: Model,
        variant: str = "max",
        device: str = AUTO,
        precision: str = "auto",
        seq_len: int | None = None,
        threads: int | None = None,
        loss_scale: float | None = None,
        defer: bool = False,
    ) -> None:
        check_counts(seq_len=seq_len, threads=threads)
        self.model = model
        self.variant = variant
        self._lib = model.table.lib
        self._grads, self._m, self._v = (model.table.arena() for _ in range(3))
        self.adam_m: Tensors = model.table.views(self._m)
        self.adam_v: Tensors = model.table.views(self._v)
        options = abi.EngineOptions(
            flags=_DEFER if defer else 0,
            params=address(model.arena),
            grads=address(self._grads),
            adam_m=address(self._m),
            adam_v=address(self._v),
            variant=encoded(variant),
            precision=encoded(precision),
            seq_len=seq_len or 0,
            threads=threads or 0,
            loss_scale=loss_scale or 0.0,
        )

        def create(name: str) -> ctypes.c_void_p:
            handle = ctypes.c_void_p()
            options.device = encoded(adapted(name))
            self._lib.anepy_engine_create(
                ctypes.byref(handle), model.table.handle, ctypes.byref(options)
            )
            return handle

        handle, self.device_note = open_device(device, create)
        self._own(handle, self._lib.anepy_engine_free)
        self._gradients = Gradients(model.table, self._grads, self._guard)
        self.gradients: Gradients = self._gradients
        info = self._info()
        self.device: str = info.device.decode()
        self.precision: str = info.precision.decode()
        self.isa: str = info.isa.decode()
        self.precision_note = self._why_precision() if precision == AUTO else ""
        self.threads: int = info.threads
        self.seq_len: int = info.seq_len
        self.switches = named_switches(self._lib, info.switches)

    @property
    def accumulated(self) -> int:
        """Steps since the last update."""
        return int(self._info().accumulated)

    @property
    def updates(self) -> int:
        """Updates so far: Adam's t."""
        return int(self._info().updates)

    def step(self, tokens: npt.ArrayLike, targets: npt.ArrayLike) -> StepStats:
        """Run forward and backward on one sequence, or several; gradients accumulate.

        Several sequences of one length are one step: the loss is the mean over all their tokens,
        and what accumulates is its gradient. On the CPU they run side by side, in groups of up to
        512 columns (a sequence takes a multiple of 64), and `memory` grows with the largest.

        Args:
            tokens: integer ids (n,) or (sequences, n), 1 <= n <= seq_len.
            targets: the ids that follow each of them, of the same shape.

        Raises:
            ConfigError: a wrong shape or an id beyond the vocabulary.
            NativeError: no memory for as many at once; nothing has changed then.
        """
        tokens, targets = pair(tokens, targets, rows=True)
        count, n = np.atleast_2d(tokens).shape
        stats = abi.StepStats()
        with self._call() as handle:
            self._lib.anepy_engine_step_batch(
                handle, ctypes.byref(stats), id_pointer(tokens), id_pointer(targets), count, n
            )
            self._gradients.stale &= bool(stats.skipped)
            self._gradients.exposed = self._gradients.seen
        return StepStats.read(stats)

    def update(
        self,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float | None = None,
    ) -> UpdateStats:
        """Apply AdamW to the mean of the accumulated gradients, then clear them.

        The arithmetic is that of PyTorch's AdamW (Loshchilov & Hutter 2019); decay is applied to
        matrices only. With `grad_clip` the global norm of the mean gradient is limited to it. If
        a gradient is not finite the weights are left alone and `skipped` is set.

        Where weights are baked into programs, those for the new weights are compiled. If that
        fails, or the process may compile no more, the update is complete all the same, `stale`
        is set, and the next call that needs the programs tries again and says why.

        Raises:
            ConfigError: a value is out of range.
            NativeError: no step was made since the last update.
        """
        options = abi.UpdateOptions(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_clip=0.0 if grad_clip is None else grad_clip,
        )
        stats = abi.UpdateStats()
        with self._call() as handle:
            leave = not self._gradients.seen
            options.flags = abi.LEAVE_GRADIENTS if leave else 0
            if not self._gradients.exposed:
                options.flags |= abi.GRADIENTS_AS_LEFT
            try:
                self._lib.anepy_engine_update(handle, ctypes.byref(stats), ctypes.byref(options))
            finally:
                self._gradients.stale |= leave and self.accumulated == 0
        return UpdateStats.read(stats)

    def logits(self, tokens: npt.ArrayLike) -> Array:
        """Return the logits of every position, float32 (n, vocab_size), without gradients."""
        ids = as_ids(tokens, "tokens")
        out = np.empty((len(ids), self.model.config.vocab_size), dtype=np.float32)
        with self._call() as handle:
            self._lib.anepy_engine_logits(handle, float_pointer(out), id_pointer(ids), len(ids))
        return out

    def evaluate(self, tokens: npt.ArrayLike, targets: npt.ArrayLike) -> float:
        """Return the mean cross-entropy in nats, without gradients."""
        tokens, targets = pair(tokens, targets)
        loss = ctypes.c_double(math.nan)
        with self._call() as handle:
            self._lib.anepy_engine_evaluate(
                handle, ctypes.byref(loss), id_pointer(tokens), id_pointer(targets), len(tokens)
            )
        return loss.value

    @property
    def compiles(self) -> int:
        """Compilations so far; 0 on devices that read the weights in place."""
        return int(self._info().compiles)

    @property
    def compile_budget(self) -> int:
        """Compilations this process may do, all engines together; 0 where there is no limit."""
        return int(self._info().compile_budget)

    @property
    def stale(self) -> bool:
        """Whether there are no programs for the weights as they are.

        After `update` this says that they could not be compiled. Weights and moments are
        complete, but `step`, `evaluate` and `logits` raise the reason: `CompileBudgetError` where
        a new process helps.
        """
        return bool(self._info().stale)

    @property
    def memory(self) -> int:
        """Bytes of activations, surfaces and buffers, for as many sequences as ran at once so far.

        Weights, gradients and moments are not in it.
        """
        return int(self._info().memory)

    @property
    def loss_scale(self) -> float:
        """The factor that gradients carry now; 1 unless losses are scaled (fp16)."""
        return float(self._info().loss_scale)

    @property
    def clean_steps(self) -> int:
        """Steps since the loss scale last changed."""
        return int(self._info().clean_steps)

    def restore(
        self,
        accumulated: int,
        updates: int,
        loss_scale: float | None = None,
        clean_steps: int = 0,
    ) -> None:
        """Tell the engine what has been loaded into weights, `gradients`, `adam_m` and `adam_v`.

        Args:
            accumulated: steps the gradients are the sum of.
            updates: Adam's t.
            loss_scale: the factor the gradients carry; ignored where losses are not scaled.
            clean_steps: steps since the scale last changed.
        """
        for name, value in (("accumulated", accumulated), ("updates", updates)):
            if not 0 <= value < 2**63:
                raise ConfigError(f"{name} is {value}, expected a number >= 0")
        info = self._info()
        info.accumulated, info.updates, info.clean_steps = accumulated, updates, clean_steps
        if loss_scale is not None:
            info.loss_scale = loss_scale
        if accumulated:
            self._gradients.show()
        with self._call() as handle:
            self._lib.anepy_engine_restore(handle, ctypes.byref(info))

    def _why_precision(self) -> str:
        """Say in a few words why "auto" took the precision (`choose_precision` in create.c)."""
        if self.precision == "fp16":
            return f"device {self.device} computes in fp16"
        if self.precision == "bf16" or "bf16" not in self.isa:
            has = "has" if self.precision == "bf16" else "has no"
            return f"{self.isa} {has} bf16 dot products"
        return "the system's library multiplies matrices in fp32"

    def _info(self) -> abi.EngineInfo:
        info = abi.EngineInfo()
        self._lib.anepy_engine_get_info(self._open_handle(), ctypes.byref(info))
        return info
