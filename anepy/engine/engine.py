"""The step engine from Python: forward, backward and update."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ..models.freezing import Freeze
from ..models.lora import Lora
from ..models.model import Model, TensorTable
from ..models.storages import MOMENTS
from ..models.views import Array, Tensors
from ..native import abi
from ..system.interrupts import Uninterrupted
from .adapt import adapted
from .device import AUTO, open_device, precision_note
from .gradients import Gradients
from .handle import (
    Owner,
    address,
    check_counts,
    encoded,
    float_pointer,
    id_pointer,
    start_pointer,
)
from .ids import Ids, Starts, as_ids, as_starts, pair
from .stats import StepStats, UpdateStats
from .variants import named_switches

Losses = npt.NDArray[np.float64]


class Ready(NamedTuple):
    """How many buckets of gradients are final, of how many steps that have begun."""

    steps: int
    buckets: int


class Engine(Owner):
    """Trains a model: one sequence or several per step, gradients accumulate until `update`.

    Use one engine from one thread at a time. The model's weights are updated in place. A signal
    handler that raises, as that of Ctrl-C, does so after `step` and `update` are complete.
    `gradients` (sums since the last update, times the loss scale), `adam_m` and `adam_v` are
    float32 views by the names of `Model.weights`; assigning to a name copies into the view.
    `frozen` lists the tensors that have none of these. With `lora` only the adapter is trained,
    and they are its.
    `device` and `device_note` say where it runs and, if that was left to anepy, why there;
    `precision` and `precision_note` in what.

    Args:
        model: the model to train.
        variant: a named set of switches, with any of +switch and -switch behind it.
        device: "auto", "cpu", "ane", or "sim", the simulated Neural Engine; "sim:m1" to "sim:m6"
            choose its chip, and "sim:m1,budget=20" lets a process compile 20 programs.
        precision: "auto", or what the device computes in: "fp32" or "bf16" on cpu, "fp16" on
            sim and ane.
            "bf16" rounds the factors of matrix products; sums, and everything else, stay float32.
            It needs a processor with bf16 dot products, where "auto" takes it.
        seq_len: longest sequence; default the model's.
        threads: default from CPU affinity, cgroup quota and physical cores.
        loss_scale: what dynamic loss scaling starts with (fp16 only); default 4096.
        freeze: tensors that stay as they are, by a pattern of names or several, like
            "tok_embeddings*" or ("tok_embeddings*", "layers.0.*"). They have no gradient and no
            moments, which saves that memory and the work; the backward pass ends at the lowest
            layer that is trained. A tied classifier is the embedding.
        recompute: keep only the input of each layer for the backward pass, which computes the rest
            of its activations again, with the same bits. A step takes one more forward pass of the
            layers but the last, and `memory` grows with their number by one input each, float32
            (dim, columns). On sim and ane what weight gradients are made of stays for each layer.
        lora: an adapter, which alone is trained; the model's weights stay as they are. Gradients
            and moments have its names, like "layers.0.attention.wq.lora_a". It gets its tensors
            here if it has none yet. On sim and ane the model's weights are baked as they are now,
            once: no update compiles.
        optimizer: what `update` does, see there: "adamw", "lion", "sgd" or "muon". The first keeps
            two moments of each trained weight, the others one, in `adam_m`, and muon two of what
            is no matrix of a layer. `adam_v` has the tensors with a second one.
        moments: "f32", or "bf16": half the memory, and views of uint16, the upper half of each
            float32. They are rounded up or down at random, in the mean to the right number, as
            rounding to nearest would undo small changes; equal runs still have equal bits.
        defer: compile programs when they are first needed, not at once. For callers that will call
            `restore`: programs for weights about to be replaced would be wasted.

    Raises:
        ConfigError: a name is unknown, a value out of range, a device not usable here, a pattern of
            `freeze` matches nothing, or all of them everything; `freeze` beside `lora`; or the
            adapter belongs to models of other dimensions.
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
        freeze: Freeze = (),
        lora: Lora | None = None,
        recompute: bool = False,
        optimizer: str = "adamw",
        moments: str = "f32",
        defer: bool = False,
    ) -> None:
        check_counts(seq_len=seq_len, threads=threads)
        self.model = model
        self.variant = variant
        self.recompute = recompute
        if lora is not None:
            lora.attach(model.config)
        self.lora = lora
        table = self._table = TensorTable(model.config, freeze, lora, model.storage)
        self.frozen = table.frozen
        self._lib = table.lib
        second = table.second_moments(optimizer)
        self.optimizer = optimizer
        if moments not in MOMENTS:
            raise ConfigError(f"moments are {moments!r}, they are kept as {' or '.join(MOMENTS)}")
        self.moments = moments
        kept = np.uint16 if moments == "bf16" else np.float32
        self._grads, self._m = table.arena(trainable=True), self._moments(table, kept)
        self._v = self._moments(table, kept) if second else np.empty(0, np.float32)
        self.adam_m: Tensors = table.views(self._m, trainable=True)
        self.adam_v: Tensors = table.views(self._v, True, second)
        options = abi.EngineOptions(
            flags=abi.DEFER * defer
            | abi.RECOMPUTE * recompute
            | abi.BF16_MOMENTS * (moments == "bf16"),
            params=address(model.arena),
            grads=address(self._grads),
            adam_m=address(self._m),
            adam_v=address(self._v) if second else None,
            variant=encoded(variant),
            precision=encoded(precision),
            seq_len=seq_len or 0,
            threads=threads or 0,
            loss_scale=loss_scale or 0.0,
            adapter=address(lora.arena) if lora is not None else None,
            optimizer=encoded(optimizer),
        )

        def create(name: str) -> ctypes.c_void_p:
            handle = ctypes.c_void_p()
            options.device = encoded(adapted(name))
            self._lib.anepy_engine_create(ctypes.byref(handle), table.handle, ctypes.byref(options))
            return handle

        handle, self.device_note = open_device(device, create)
        self._own(handle, self._lib.anepy_engine_free)
        self._gradients = Gradients(table, self._grads, self._guard)
        self.gradients: Gradients = self._gradients
        info = self._info()
        self.device: str = info.device.decode()
        self.precision: str = info.precision.decode()
        self.isa: str = info.isa.decode()
        self.precision_note = precision_note(self.precision, self.device, self.isa, precision)
        self.threads: int = info.threads
        self.seq_len: int = info.seq_len
        self.switches = named_switches(self._lib, info.switches)

    def _moments(self, table: TensorTable, dtype: type[Any]) -> Array:
        """Return zeroed memory for one moment; `SharedEngine` saves some of it."""
        return table.arena(True, dtype)

    def _complete(self, options: abi.UpdateOptions) -> None:
        """Fill in what an update needs to know beyond its arguments; `SharedEngine` does."""

    @property
    def trained(self) -> Tensors:
        """The weights that are trained, frozen ones among them: the adapter's, or the model's."""
        if self.lora is not None:
            return self.lora.weights
        assert isinstance(self.model.weights, Tensors)  # others are not trained
        return self.model.weights

    @property
    def accumulated(self) -> int:
        """Steps since the last update."""
        return int(self._info().accumulated)

    @property
    def counted(self) -> int:
        """Targets counted since the last update: what `gradients` are the sum over."""
        return int(self._info().counted)

    @property
    def unit(self) -> float:
        """Targets counted in the first step since the last update, or before it in the last first.

        The gradient of every counted target is in `gradients` times loss_scale / unit. 0 if no
        step was made yet, or since a `restore` that did not know it.
        """
        return float(self._info().unit)

    @property
    def gradient_scale(self) -> float:
        """The factor that each counted target's gradient carries: loss_scale / unit; 0 without one.

        Where several engines train as one it differs between them; `reduce` takes the smallest.
        """
        info = self._info()
        return float(info.loss_scale / info.unit) if info.unit else 0.0

    @property
    def ready(self) -> Ready:
        """How far the gradients of a running step are final; another thread may ask.

        The buckets are those of `reduce`, in its order. All are final when no step runs.
        """
        steps = ctypes.c_int64()
        with self._peek() as handle:
            buckets = self._lib.anepy_engine_ready(handle, ctypes.byref(steps))
        return Ready(steps.value, buckets)

    @property
    def updates(self) -> int:
        """Updates so far: Adam's t."""
        return int(self._info().updates)

    def step(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, starts: npt.ArrayLike | None = None
    ) -> StepStats:
        """Run forward and backward on one sequence, or several; gradients accumulate.

        Several sequences of one length are one step. On the CPU they run side by side, in groups
        of up to 512 columns (a sequence takes a multiple of 64), and `memory` grows with the
        largest.

        A target below 0, -100 by custom, is not counted: it has no loss and no gradient. The loss
        is the mean over the counted targets. After the first step since an update, `gradients` are
        `loss_scale` times the gradient of its loss. Each further step adds that of its own loss,
        weighted by its counted targets against those of the first, so that `update` can take the
        mean over all of them, however they are spread over steps and sequences.

        With `starts` several documents are packed into a sequence, and each is computed as if it
        were a sequence of its own: no token looks into another document, and positions begin at 0
        in each. Blocks of 64 tokens that none looks at are left out, so that packed attention
        costs less. What the last token of a document is to predict is the caller's matter: set its
        target below 0 if it would be the first token of the next document.

        Args:
            tokens: integer ids (n,) or (sequences, n), 1 <= n <= seq_len.
            targets: the ids that follow each of them, of the same shape; below 0: not counted. A
                sequence may have none that is counted, a step may not.
            starts: truth values of the shape of `tokens`: where a document begins. A sequence
                begins one in any case. Default: each sequence is one document. Device cpu only.

        Raises:
            ConfigError: a wrong shape, an id beyond the vocabulary, no target is counted, or
                `starts` on another device than cpu; nothing has changed then.
            NativeError: no memory for as many at once; nothing has changed then.
        """
        ids, wanted = pair(tokens, targets)
        begun = as_starts(starts, ids)
        count, n = np.atleast_2d(ids).shape
        if self._table.untrainable:
            raise ConfigError(
                f"{self._table.untrainable[0]} is stored as {self.model.storage}, and only float32 "
                "is trained: load the model with storage='f32', freeze its matrices, or train an "
                "adapter (lora)"
            )
        stats = abi.StepStats()
        with Uninterrupted(), self._call() as handle:
            self._lib.anepy_engine_step_batch(
                handle,
                ctypes.byref(stats),
                id_pointer(ids),
                id_pointer(wanted),
                start_pointer(begun),
                count,
                n,
            )
            self._gradients.stale &= bool(stats.skipped)
            self._gradients.exposed = self._gradients.seen
        return StepStats.read(stats)

    def reserve(self, sequences: int, tokens: int | None = None) -> None:
        """Make the room that a step of so many sequences needs, before it or without one.

        `evaluate`, `losses` and `logits` compute in the room there is, as many sequences side by
        side as fit into it, and no more than a step would.

        Args:
            sequences: in one call; on devices that run one after the other nothing is needed.
            tokens: of each; default `seq_len`.

        Raises:
            ConfigError: a number is out of range.
            NativeError: no memory for as many at once; nothing has changed then.
        """
        check_counts(sequences=sequences, tokens=tokens)
        with self._call() as handle:
            self._lib.anepy_engine_reserve(handle, sequences, tokens or self.seq_len)

    def reduce(
        self,
        function: Callable[[Array], object],
        counted: int | None = None,
        scale: float | None = None,
    ) -> None:
        """Lend the gradients to a function that changes them in place, before an update.

        It is called once for each bucket, in the order in which a step finishes them: the final
        norm with the classifier, each layer from the last to the first, the embedding. The next
        update takes the norm of what is there then, and is skipped if something is not finite.

        To train with several engines as one, say one for each rank of MPI, the function replaces
        each bucket by its sum over all of them, and all are given the same two numbers, so that
        the update of each is that of one engine which made all the steps. If the gradients of one
        are not finite, or all its steps were skipped, its buckets are NaN: all skip the update. One
        that made no step takes part with zeros; it has to be told both numbers.

        Args:
            function: takes a bucket, float32 (n,), contiguous and writable, and changes its
                values. What it returns is ignored. If it raises, the gradients are dropped as by
                `discard`, and the exception is raised again.
            counted: the sum of `counted` of all engines; default that of this one. 0: the next
                update is skipped.
            scale: what the gradient of each target is to carry, the smallest `gradient_scale` of
                all engines; the gradients are multiplied first. Default that of this one.

        Raises:
            NativeError: no step was made since the last update, and `counted` or `scale` is left
                out.
            ConfigError: `counted` is less than this engine's, or `scale` out of range.

        Example:
            >>> comm = MPI.COMM_WORLD
            >>> engine.reduce(
            ...     lambda bucket: comm.Allreduce(MPI.IN_PLACE, bucket),
            ...     counted=comm.allreduce(engine.counted),
            ...     scale=comm.allreduce(engine.gradient_scale, MPI.MIN),
            ... )
        """
        if counted is not None and not 0 <= counted < 2**63:
            raise ConfigError(f"counted is {counted}, expected a number >= 0")
        if scale is not None and not scale > 0.0:
            raise ConfigError(f"scale is {scale}, expected a number above 0")
        with self._call() as handle:
            self._lib.anepy_engine_reduce(
                handle, -1 if counted is None else int(counted), float(scale or 0.0), 0
            )
            self._gradients.stale = False
            try:
                for bucket in self._gradients.buckets():
                    function(bucket)
            except BaseException:
                if not self.closed:
                    self.discard()
                raise

    def discard(self) -> None:
        """Forget the steps since the last update; gradients are zero."""
        with self._call() as handle:
            self._lib.anepy_engine_discard(handle)
            self._gradients.stale = False

    def update(
        self,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float | None = None,
        momentum: float = 0.95,
        matrix_lr: float | None = None,
    ) -> UpdateStats:
        """Apply the optimizer to the mean gradient g of the targets counted since the last update.

        The gradients are cleared then.

        * adamw: as in PyTorch (Loshchilov & Hutter 2019).
        * lion (Chen et al. 2023, arXiv 2302.06675): p *= 1 - lr weight_decay; p -= lr sign(beta1 m
          + (1 - beta1) g); m = beta2 m + (1 - beta2) g. Its authors take a `beta2` of 0.99, and an
          `lr` three to ten times below AdamW's.
        * sgd: as in PyTorch, without dampening: g += weight_decay p; m = momentum m + g; p -= lr m.
        * muon (Jordan et al. 2024), for matrices of the layers, as in PyTorch: m = momentum m + g;
          p *= 1 - matrix_lr weight_decay; p -= matrix_lr sqrt(max(1, rows / cols)) O, where O is
          g + momentum m with all singular values near 1, by five steps of Newton and Schulz in
          float32. Its author takes a `matrix_lr` of 0.02. All other tensors: adamw with `lr`.

        Decay is applied to matrices only. With `grad_clip` the global norm of the mean gradient is
        limited to it. If a gradient is not finite the weights are left alone and `skipped` is set.

        Where weights are baked into programs, those for the new weights are compiled. If that
        fails, or the process may compile no more, the update is complete all the same, `stale`
        is set, and the next call that needs the programs tries again and says why.

        `matrix_lr` is `lr` if it is left out.

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
            momentum=momentum,
            matrix_lr=lr if matrix_lr is None else matrix_lr,
        )
        stats = abi.UpdateStats()
        with Uninterrupted(), self._call() as handle:
            leave = not self._gradients.seen
            options.flags = abi.LEAVE_GRADIENTS if leave else 0
            if not self._gradients.exposed:
                options.flags |= abi.GRADIENTS_AS_LEFT
            self._complete(options)
            try:
                self._lib.anepy_engine_update(handle, ctypes.byref(stats), ctypes.byref(options))
            finally:
                self._gradients.stale |= leave and self.accumulated == 0
        return UpdateStats.read(stats)

    def logits(self, tokens: npt.ArrayLike, starts: npt.ArrayLike | None = None) -> Array:
        """Return the logits of every position, without gradients.

        Args:
            tokens: integer ids (n,) or (sequences, n), 1 <= n <= seq_len; several
                sequences run side by side on the CPU, in the room that steps or `reserve` made.
            starts: where documents begin, as for `step`.

        Returns:
            float32 (n, vocab_size) or (sequences, n, vocab_size): what follows each token.

        Raises:
            ConfigError: a wrong shape, an id beyond the vocabulary, or `starts` on another device
                than cpu.
        """
        ids = as_ids(tokens, "tokens")
        begun = as_starts(starts, ids)
        count, n = np.atleast_2d(ids).shape
        out = np.empty((*ids.shape, self.model.config.vocab_size), dtype=np.float32)
        with self._call() as handle:
            self._lib.anepy_engine_logits_batch(
                handle, float_pointer(out), id_pointer(ids), start_pointer(begun), count, n
            )
        return out

    def evaluate(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, starts: npt.ArrayLike | None = None
    ) -> float:
        """Return the mean cross-entropy of the counted targets in nats, without gradients.

        Args:
            tokens: integer ids (n,) or (sequences, n), 1 <= n <= seq_len; several
                sequences run side by side on the CPU, in the room that steps or `reserve` made.
            targets: the ids that follow each of them, of the same shape; below 0: not counted.
            starts: where documents begin, as for `step`.

        Raises:
            ConfigError: a wrong shape, an id beyond the vocabulary, no target is counted, or
                `starts` on another device than cpu.
        """
        ids, wanted = pair(tokens, targets)
        return self._evaluate(ids, wanted, as_starts(starts, ids), None)

    def losses(
        self, tokens: npt.ArrayLike, targets: npt.ArrayLike, starts: npt.ArrayLike | None = None
    ) -> Losses:
        """Return the cross-entropy of each target in nats, without gradients.

        Args:
            tokens: integer ids (n,) or (sequences, n), 1 <= n <= seq_len.
            targets: the ids that follow each of them, of the same shape; below 0: not counted.
            starts: where documents begin, as for `step`.

        Returns:
            float64 of the shape of `targets`; 0 where a target is not counted.

        Raises:
            ConfigError: a wrong shape, an id beyond the vocabulary, no target is counted, or
                `starts` on another device than cpu.
        """
        ids, wanted = pair(tokens, targets)
        losses = np.empty(ids.shape, dtype=np.float64)
        self._evaluate(ids, wanted, as_starts(starts, ids), losses)
        return losses

    def _evaluate(
        self, tokens: Ids, targets: Ids, starts: Starts | None, losses: Losses | None
    ) -> float:
        count, n = np.atleast_2d(tokens).shape
        loss = ctypes.c_double(math.nan)
        doubles = ctypes.POINTER(ctypes.c_double)
        each = losses.ctypes.data_as(doubles) if losses is not None else None
        with self._call() as handle:
            self._lib.anepy_engine_evaluate_batch(
                handle,
                ctypes.byref(loss),
                each,
                id_pointer(tokens),
                id_pointer(targets),
                start_pointer(starts),
                count,
                n,
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
        """Bytes of activations, surfaces and buffers, for as many sequences as a step ran at once.

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
        counted: int = 0,
        unit: float = 0.0,
    ) -> None:
        """Tell the engine what has been loaded into weights, `gradients`, `adam_m` and `adam_v`.

        Args:
            accumulated: steps the gradients are the sum of.
            updates: Adam's t.
            loss_scale: the factor the gradients carry; ignored where losses are not scaled.
            clean_steps: steps since the scale was last lowered or raised.
            counted: targets the gradients are the sum over. 0: as many in each of those steps as
                in the next one, or, if none follows, equally many.
            unit: as the property `unit` said.

        Raises:
            ConfigError: no engine can be in this state.
        """
        counts = {"accumulated": accumulated, "updates": updates, "counted": counted}
        for name, value in counts.items():
            if not 0 <= value < 2**63:
                raise ConfigError(f"{name} is {value}, expected a number >= 0")
        info = self._info()
        info.accumulated, info.updates, info.clean_steps = accumulated, updates, clean_steps
        info.counted, info.unit = counted, unit
        if loss_scale is not None:
            info.loss_scale = loss_scale
        if accumulated or counted:
            self._gradients.show()
        with self._call() as handle:
            self._lib.anepy_engine_restore(handle, ctypes.byref(info))

    def _info(self) -> abi.EngineInfo:
        info = abi.EngineInfo()
        self._lib.anepy_engine_get_info(self._open_handle(), ctypes.byref(info))
        return info
