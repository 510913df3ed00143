"""The step engine from Python: forward, backward and update; and the decoder for generation."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import ClosedError, ConfigError, NativeError
from ..models.model import Array, Model, TensorTable
from ..native import abi, find
from .adapt import adapted
from .device import AUTO, open_device
from .ids import Ids, as_ids, pair

_DEFER = 1
_E = TypeVar("_E", bound="Engine")
_D = TypeVar("_D", bound="Decoder")


@dataclass(frozen=True)
class StepStats:
    """What one step did; times are milliseconds of the calling thread unless said otherwise.

    Attributes:
        loss: mean cross-entropy in nats.
        step_ms: the whole step.
        tflops: 10^12 floating-point operations per second, counted as in ane-facts 7.1.
        allocations: heap operations during the step.
        loss_scale: factor the gradients carry; 1 unless losses are scaled (fp16).
        skipped: a gradient was not finite and nothing was accumulated (fp16).
        device_ms: programs on the device, forward and backward.
        io_ms: to and from surfaces.
        classifier_ms: logits and their gradients.
        softmax_ms: soft-max and loss.
        norm_ms: RMSNorm outside the programs.
        elementwise_ms: embedding and residuals.
        dw_ms: weight gradients, busy time summed over threads.
        dw_wait_ms: the step waited for weight gradients.
        flops: floating-point operations.
        forward_ms: from the embedding to the loss.
        backward_ms: the rest of the step.
    """

    loss: float
    step_ms: float
    tflops: float
    allocations: int
    loss_scale: float
    skipped: bool
    device_ms: float
    io_ms: float
    classifier_ms: float
    softmax_ms: float
    norm_ms: float
    elementwise_ms: float
    dw_ms: float
    dw_wait_ms: float
    flops: float
    forward_ms: float
    backward_ms: float


@dataclass(frozen=True)
class UpdateStats:
    """What one update did.

    Attributes:
        grad_norm: global norm of the mean gradient before clipping; NaN when clipping is off.
        update_ms: time of the update in milliseconds.
        compile_ms: time to compile the programs for the new weights, where they are baked.
        skipped: a gradient was not finite; the weights are untouched, the gradients dropped.
    """

    grad_norm: float
    update_ms: float
    compile_ms: float
    skipped: bool


class _Owner:
    """A native handle that is closed once, by `close`, `with`, or when it is forgotten."""

    _finalizer: weakref.finalize[[Any], Any] | None = None
    _handle: ctypes.c_void_p | None = None

    def _own(self, handle: ctypes.c_void_p, free: Any) -> None:
        self._handle = handle
        self._guard = threading.RLock()
        self._finalizer = weakref.finalize(self, free, handle)
        self._finalizer.atexit = False  # threads and memory end with the process

    def close(self) -> None:
        """Free the native object; a second call does nothing.

        A call that another thread is in is waited for.
        """
        self._handle = None
        with self._guard:
            if self._finalizer is not None:
                self._finalizer()

    def __reduce__(self) -> NoReturn:
        # A copy would share the handle and outlive it.
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled: make a new one")

    @contextlib.contextmanager
    def _call(self) -> Iterator[ctypes.c_void_p]:
        """Lend the handle to one thread at a time; `close` waits for it."""
        if not self._guard.acquire(blocking=False):
            self._open_handle()
            raise NativeError(
                -30, "busy", f"this {type(self).__name__} is running in another thread"
            )
        try:
            yield self._open_handle()
        finally:
            self._guard.release()

    def _open_handle(self) -> ctypes.c_void_p:
        if self._handle is None:
            raise ClosedError(f"this {type(self).__name__} was closed: make a new one")
        return self._handle


class _Gradients(Mapping[str, Array]):
    """The accumulated gradients by name, zero after an update.

    The first step after an update replaces what it finds. So while nobody holds a view, the
    update need not write the zeros: an eighth of its memory traffic. And while nobody could have
    written to what the last step left, it need not read them for their norm.
    """

    def __init__(self, table: TensorTable, arena: Array, guard: threading.RLock) -> None:
        self._places, self._arena, self._guard = table.places, arena, guard
        self._root: Callable[[], Array | None] = lambda: None
        self.stale = False  # the arena holds what an update left
        self.exposed = False  # a view was there at some time since the last step

    @property
    def seen(self) -> bool:
        """Whether a view is alive."""
        return self._root() is not None

    def __getitem__(self, name: str) -> Array:
        offset, shape = self._places[name]
        with self._guard:
            self.show()
            self.exposed = True
            root = self._root()
            if root is None:
                # Views of views refer to the array over the buffer, so it lives as long as they.
                root = np.frombuffer(self._arena.data, dtype=np.float32)
                self._root = weakref.ref(root)
        return root[offset : offset + math.prod(shape)].reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def show(self) -> None:
        """Write the zeros that an update has left out."""
        if self.stale:
            self._arena.fill(0.0)
            self.stale = False


class Engine(_Owner):
    """Trains a model: one sequence or several per step, gradients accumulate until `update`.

    Use one engine from one thread at a time. The model's weights are updated in place.
    `device` and `device_note` say where it runs and, if that was left to anepy, why there.

    Args:
        model: the model to train.
        variant: a named set of switches, with any of +switch and -switch behind it.
        device: "auto", "cpu", "ane", or "sim", the simulated Neural Engine; "sim:m1" to "sim:m5"
            choose its chip, and "sim:m1,budget=20" lets a process compile 20 programs.
        precision: "auto", or what the device computes in: "fp32" or "bf16" on cpu, "fp16" on sim.
            "bf16" rounds the factors of matrix products; sums, and everything else, stay float32.
            It needs a processor with bf16 dot products, where "auto" takes it.
        seq_len: longest sequence; default the model's.
        threads: default from CPU affinity, cgroup quota and physical cores.
        loss_scale: what dynamic loss scaling starts with (fp16 only); default 4096.
        defer: compile programs when they are first needed, not at once; for who goes on with
            `restore`, so that weights that are replaced at once cost no compilation.

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
        _check_counts(seq_len=seq_len, threads=threads)
        self.model = model
        self.variant = variant
        self._lib = model.table.lib
        self._grads, self._m, self._v = (model.table.arena() for _ in range(3))
        self.adam_m: Mapping[str, Array] = model.table.views(self._m)
        self.adam_v: Mapping[str, Array] = model.table.views(self._v)
        options = abi.EngineOptions(
            flags=_DEFER if defer else 0,
            params=_address(model.arena),
            grads=_address(self._grads),
            adam_m=_address(self._m),
            adam_v=_address(self._v),
            variant=_name(variant),
            precision=_name(precision),
            seq_len=seq_len or 0,
            threads=threads or 0,
            loss_scale=loss_scale or 0.0,
        )

        def create(name: str) -> ctypes.c_void_p:
            handle = ctypes.c_void_p()
            options.device = _name(adapted(name))
            self._lib.anepy_engine_create(
                ctypes.byref(handle), model.table.handle, ctypes.byref(options)
            )
            return handle

        handle, self.device_note = open_device(device, create)
        self._own(handle, self._lib.anepy_engine_free)
        self._gradients = _Gradients(model.table, self._grads, self._guard)
        self.gradients: Mapping[str, Array] = self._gradients
        info = self._info()
        self.device: str = info.device.decode()
        self.precision: str = info.precision.decode()
        self.isa: str = info.isa.decode()
        self.threads: int = info.threads
        self.seq_len: int = info.seq_len
        self.switches = _switch_names(self._lib, info.switches)

    def __enter__(self: _E) -> _E:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
                handle, ctypes.byref(stats), _ids(tokens), _ids(targets), count, n
            )
            self._gradients.stale &= bool(stats.skipped)
            self._gradients.exposed = self._gradients.seen
        return StepStats(
            loss=stats.loss,
            step_ms=stats.step_ms,
            tflops=stats.flops / stats.step_ms / 1e9,
            allocations=stats.allocations,
            loss_scale=stats.loss_scale,
            skipped=bool(stats.skipped),
            device_ms=stats.device_ms,
            io_ms=stats.io_ms,
            classifier_ms=stats.classifier_ms,
            softmax_ms=stats.softmax_ms,
            norm_ms=stats.norm_ms,
            elementwise_ms=stats.elementwise_ms,
            dw_ms=stats.dw_ms,
            dw_wait_ms=stats.dw_wait_ms,
            flops=stats.flops,
            forward_ms=stats.forward_ms,
            backward_ms=stats.backward_ms,
        )

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
        return UpdateStats(stats.grad_norm, stats.update_ms, stats.compile_ms, bool(stats.skipped))

    def logits(self, tokens: npt.ArrayLike) -> Array:
        """Return the logits of every position, float32 (n, vocab_size), without gradients."""
        ids = as_ids(tokens, "tokens")
        out = np.empty((len(ids), self.model.config.vocab_size), dtype=np.float32)
        with self._call() as handle:
            self._lib.anepy_engine_logits(handle, _floats(out), _ids(ids), len(ids))
        return out

    def evaluate(self, tokens: npt.ArrayLike, targets: npt.ArrayLike) -> float:
        """Return the mean cross-entropy in nats, without gradients."""
        tokens, targets = pair(tokens, targets)
        loss = ctypes.c_double(math.nan)
        with self._call() as handle:
            self._lib.anepy_engine_evaluate(
                handle, ctypes.byref(loss), _ids(tokens), _ids(targets), len(tokens)
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

    def _info(self) -> abi.EngineInfo:
        info = abi.EngineInfo()
        self._lib.anepy_engine_get_info(self._open_handle(), ctypes.byref(info))
        return info


class Decoder(_Owner):
    """Computes logits one token at a time with a key/value cache, always on the CPU in fp32.

    Args:
        model: the model; its weights may change between tokens, not during one.
        max_len: positions to make room for; default the model's sequence length.
        threads: as for Engine.
    """

    def __init__(
        self, model: Model, max_len: int | None = None, threads: int | None = None
    ) -> None:
        _check_counts(max_len=max_len, threads=threads)
        self.model = model
        self._lib = model.table.lib
        self._logits = np.zeros(model.config.vocab_size, dtype=np.float32)
        handle = ctypes.c_void_p()
        self._lib.anepy_decoder_create(
            ctypes.byref(handle),
            model.table.handle,
            _address(model.arena),
            max_len or 0,
            threads or 0,
        )
        self._own(handle, self._lib.anepy_decoder_free)

    def __enter__(self: _D) -> _D:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def forward(self, token: int, position: int) -> Array:
        """Return the logits after `token`, float32 (vocab_size,), valid until the next call.

        Positions run 0, 1, 2, ...; position 0 starts a new sequence.
        """
        for name, value in (("token", token), ("position", position)):
            if not 0 <= value < 2**31:
                raise ConfigError(f"{name} is {value}, expected a number >= 0")
        with self._call() as handle:
            self._lib.anepy_decoder_forward(handle, _floats(self._logits), int(token), position)
        return self._logits


def variants(device: str = AUTO) -> dict[str, tuple[str, ...]]:
    """Return the switches of every named variant that makes sense on a device."""
    lib = find.library()
    found: dict[str, tuple[str, ...]] = {}
    index = 0
    while (name := lib.anepy_variant_name(index)) is not None:
        index += 1
        switches = ctypes.c_uint32()
        try:
            lib.anepy_variant_parse(name, device.encode(), ctypes.byref(switches))
        except ConfigError:
            continue
        found[name.decode()] = _switch_names(lib, switches.value)
    return found


def variant_switches(text: str, device: str = "auto") -> tuple[str, ...]:
    """Return the switches that a variant stands for on a device.

    Raises:
        UnsupportedError: one of them means nothing on this device.
        ConfigError: an unknown variant, switch or device.
    """
    lib = find.library()
    switches = ctypes.c_uint32()
    lib.anepy_variant_parse(_name(text), _name(device), ctypes.byref(switches))
    return _switch_names(lib, switches.value)


def switch_names() -> tuple[str, ...]:
    """Return every switch there is, on whatever device."""
    lib = find.library()
    names = (lib.anepy_switch_name(index) for index in range(32))
    return tuple(name.decode() for name in names if name is not None)


def library_info() -> dict[str, Any]:
    """Describe the loaded library: instruction sets, matrix kernel, compiler, threads."""
    lib = find.library()
    info = abi.LibraryInfo()
    lib.anepy_library_get_info(ctypes.byref(info))
    return {
        "isa": info.isa.decode(),
        "isa_available": info.isa_all.decode().split(),
        "gemm": info.gemm.decode(),
        "compiler": info.compiler.decode(),
        "build_id": lib.anepy_build_id().decode(),
        "abi": lib.anepy_abi_version(),
        "threads": info.threads,
        "cores": info.cores,
    }


def _switch_names(lib: ctypes.CDLL, bits: int) -> tuple[str, ...]:
    return tuple(lib.anepy_switch_name(i).decode() for i in range(32) if bits >> i & 1)


def _name(text: str) -> bytes:
    """Encode for C so that what is no name stays none and fits a message of one line."""
    return text.encode("unicode_escape")


def _check_counts(**values: int | None) -> None:
    """Refuse what C would read as another number: it has 32 bits, and 0 means default."""
    for name, value in values.items():
        if value is not None and not 1 <= value < 2**31:
            raise ConfigError(f"{name} is {value}, expected a number >= 1")


def _address(array: Array) -> int:
    return int(array.ctypes.data)


def _floats(array: Array) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def _ids(array: Ids) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
