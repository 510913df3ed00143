"""The figures of a step and of an update, and the one table of the phases of a step.

Reports, the run's log, comparisons and the console read the table: docs/architecture.md#a-figure
says what a new figure touches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from ..native import abi

# How a phase relates to the time of its step.
HALF = "half"  # forward and backward: the step cut in two
PART = "part"  # the step cut by kind of work; the rest is what lies between
BESIDE = "beside"  # busy time of threads that work beside the step


class Phase(NamedTuple):
    """A phase of a step, under the name each place has for it.

    Attributes:
        field: of `StepStats`, in milliseconds.
        key: in `StepReport.phases` and `Summary.phases`, and on the console.
        log: in the step records of a run's log.
        title: in the tables and charts of a comparison.
        kind: HALF, PART or BESIDE.
    """

    field: str
    key: str
    log: str
    title: str
    kind: str


PHASES = (
    Phase("forward_ms", "forward", "t_fwd", "forward", HALF),
    Phase("backward_ms", "backward", "t_bwd", "backward", HALF),
    Phase("device_ms", "device", "t_ane", "device", PART),
    Phase("io_ms", "io", "t_io", "io", PART),
    Phase("classifier_ms", "classifier", "t_cls", "classifier", PART),
    Phase("softmax_ms", "softmax", "t_softmax", "softmax + loss", PART),
    Phase("norm_ms", "norm", "t_rms", "norms", PART),
    Phase("elementwise_ms", "elementwise", "t_elem", "elementwise", PART),
    Phase("dw_wait_ms", "dw_wait", "t_cblas_wait", "dW, waited for", PART),
    Phase("dw_ms", "dw", "t_dw", "dW, busy threads", BESIDE),
)
_LOG_KEYS = {phase.field: phase.log for phase in PHASES}


@dataclass(frozen=True)
class StepStats:
    """What one step did; times are milliseconds of the calling thread unless said otherwise.

    Attributes:
        loss: mean cross-entropy of the counted targets in nats.
        tokens: targets that are counted.
        step_ms: the whole step.
        tflops: 10^12 floating-point operations per second, counted as in
            docs/neural-engine.md#flops.
        allocations: heap operations during the step.
        loss_scale: factor on the gradients (`Engine.step`); 1 unless losses are scaled (fp16).
        skipped: a gradient was not finite and nothing was accumulated (fp16). `loss` is then that
            of the sequences computed so far and may not be finite; `flops` counts all of them.
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
        dispatches: programs evaluated on the device.
        device_nbytes: bytes of their inputs, outputs and weights, each once.
        io_nbytes: bytes moved between host and surfaces, or from one surface to another.
        host_nbytes: bytes that work on elements on the host reads and writes: embedding, norms,
            residuals, soft-max.
        host_exps: exponentials on the host, of the soft-max.
        device_flops: floating-point operations of the products in the programs.
        host_flops: of the classifier's products on the host.
        dw_flops: of the weight gradients on the host, but the classifier's.
        dw_nbytes: bytes read and written to add weight gradients that the device has computed.
    """

    loss: float
    tokens: int
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
    dispatches: int = 0
    device_nbytes: int = 0
    io_nbytes: int = 0
    host_nbytes: int = 0
    host_exps: int = 0
    device_flops: float = 0.0
    host_flops: float = 0.0
    dw_flops: float = 0.0
    dw_nbytes: int = 0

    @classmethod
    def read(cls, native: abi.StepStats) -> StepStats:
        """Copy what the library wrote."""
        tflops = native.flops / native.step_ms / 1e9
        return cls(**_values(native, skipped=bool(native.skipped), tflops=tflops))

    @property
    def phases(self) -> dict[str, float]:
        """Milliseconds by phase, under the keys of `PHASES`."""
        return {phase.key: getattr(self, phase.field) for phase in PHASES}

    def logged(self) -> dict[str, Any]:
        """Return every figure under its key in the log of a run: `Phase.log`, else its name."""
        return {_LOG_KEYS.get(name, name): value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class UpdateStats:
    """What one update did.

    Attributes:
        grad_norm: global norm of the mean gradient before clipping; NaN where nothing asks
            for it: neither clipping, nor fp16, nor a reduction.
        update_ms: time of the update in milliseconds.
        compile_ms: time to compile the programs for the new weights, where they are baked.
        skipped: a gradient was not finite; the weights are untouched, the gradients dropped.
    """

    grad_norm: float
    update_ms: float
    compile_ms: float
    skipped: bool

    @classmethod
    def read(cls, native: abi.UpdateStats) -> UpdateStats:
        """Copy what the library wrote."""
        return cls(**_values(native, skipped=bool(native.skipped)))


def _values(native: abi.StepStats | abi.UpdateStats, **others: Any) -> dict[str, Any]:
    """Return the fields of a struct but its size; `others` replaces some and adds some."""
    names = [name for name, *_ in native._fields_ if name != "struct_size"]
    return {name: getattr(native, name) for name in names} | others
