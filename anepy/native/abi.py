"""The C interface of `libsrc/anepy.h`, mirrored one to one: structs, prototypes, status codes.

Nothing here is public. `bind` is called once on every opened library, before any other function.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_uint32
from ctypes import c_uint8 as u8
from ctypes import c_uint64 as u64
from ctypes import c_void_p as handle
from typing import Any

from ..errors import (
    AbiMismatchError,
    CompileBudgetError,
    ConfigError,
    NativeError,
    UnsupportedError,
)

ABI_VERSION = 4
DEFER, RECOMPUTE, BF16_MOMENTS = 1, 2, 4  # flags of EngineOptions
LEAVE_GRADIENTS, GRADIENTS_AS_LEFT, SQUARES_GIVEN = 1, 2, 4  # flags of UpdateOptions
REDUCED = 1  # of anepy_engine_reduce
MATRIX, ADAPTER = 1, 8  # of the flags of Tensor
TARGETS = ("wq", "wk", "wv", "wo", "w1", "w3", "w2")  # by the bits of anepy_model_adapt


class _Sized(ctypes.Structure):
    """A struct that begins with its own size; construct it with keyword arguments."""

    def __init__(self, **values: Any) -> None:
        super().__init__(struct_size=ctypes.sizeof(self), **values)


class Config(_Sized):
    """anepy_config."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("dim", c_int32),
        ("hidden_dim", c_int32),
        ("n_layers", c_int32),
        ("n_heads", c_int32),
        ("n_kv_heads", c_int32),
        ("vocab_size", c_int32),
        ("seq_len", c_int32),
        ("tied", c_int32),
        ("head_dim", c_int32),
        ("qkv_bias", c_int32),
        ("qk_norm", c_int32),
        ("rope_scaling", c_int32),
        ("rope_original_max_position", c_int32),
        ("reserved", c_int32),
        ("norm_eps", c_double),
        ("rope_theta", c_double),
        ("rope_factor", c_double),
        ("rope_low_freq_factor", c_double),
        ("rope_high_freq_factor", c_double),
    )


class Tensor(_Sized):
    """anepy_tensor."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("name", c_char * 64),
        ("offset", c_int64),
        ("gradient", c_int64),
        ("rows", c_int64),
        ("cols", c_int64),
        ("layer", c_int32),
        ("role", c_int32),
        ("byte", c_int64),
        ("storage", c_int32),
        ("reserved", c_int32),
    )


class EngineOptions(_Sized):
    """anepy_engine_options."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("params", handle),
        ("grads", handle),
        ("adam_m", handle),
        ("adam_v", handle),
        ("variant", c_char_p),
        ("device", c_char_p),
        ("precision", c_char_p),
        ("seq_len", c_int32),
        ("threads", c_int32),
        ("loss_scale", c_double),
        ("adapter", handle),
        ("optimizer", c_char_p),
    )


class EngineInfo(_Sized):
    """anepy_engine_info."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("switches", c_uint32),
        ("device", c_char * 16),
        ("precision", c_char * 16),
        ("isa", c_char * 32),
        ("threads", c_int32),
        ("seq_len", c_int32),
        ("accumulated", c_int64),
        ("updates", c_int64),
        ("loss_scale", c_double),
        ("clean_steps", c_int64),
        ("compiles", c_int64),
        ("compile_budget", c_int64),
        ("stale", c_int32),
        ("reserved", c_int32),
        ("memory", u64),
        ("counted", c_int64),
        ("unit", c_double),
    )


class StepStats(_Sized):
    """anepy_step_stats."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("skipped", c_uint32),
        ("loss", c_double),
        ("loss_scale", c_double),
        ("flops", c_double),
        ("step_ms", c_double),
        ("device_ms", c_double),
        ("io_ms", c_double),
        ("classifier_ms", c_double),
        ("softmax_ms", c_double),
        ("norm_ms", c_double),
        ("elementwise_ms", c_double),
        ("dw_ms", c_double),
        ("dw_wait_ms", c_double),
        ("allocations", c_int64),
        ("forward_ms", c_double),
        ("backward_ms", c_double),
        ("tokens", c_int64),
        ("dispatches", c_int64),
        ("device_nbytes", c_int64),
        ("io_nbytes", c_int64),
        ("host_nbytes", c_int64),
        ("host_exps", c_int64),
        ("device_flops", c_double),
        ("host_flops", c_double),
        ("dw_flops", c_double),
        ("dw_nbytes", c_int64),
    )


class UpdateOptions(_Sized):
    """anepy_update_options."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("lr", c_double),
        ("beta1", c_double),
        ("beta2", c_double),
        ("eps", c_double),
        ("weight_decay", c_double),
        ("grad_clip", c_double),
        ("momentum", c_double),
        ("matrix_lr", c_double),
        ("squares", c_double),
        ("part_first", c_int64),
        ("part_n", c_int64),
        ("part_stride", c_int64),
    )


class UpdateStats(_Sized):
    """anepy_update_stats."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("skipped", c_uint32),
        ("grad_norm", c_double),
        ("update_ms", c_double),
        ("compile_ms", c_double),
    )


class LibraryInfo(_Sized):
    """anepy_library_info."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("isa", c_char * 32),
        ("isa_all", c_char * 128),
        ("compiler", c_char * 128),
        ("gemm", c_char * 64),
        ("threads", c_int32),
        ("cores", c_int32),
    )


class DeviceInfo(_Sized):
    """anepy_device_info."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("usable", c_int32),
        ("name", c_char * 16),
        ("reason", c_char * 240),
    )


class ProgramOptions(_Sized):
    """anepy_program_options."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("name", c_char_p),
        ("width", c_int32),
        ("layer", c_int32),
        ("part", c_int32),
        ("reserved", c_int32),
    )


class ProgramInfo(_Sized):
    """anepy_program_info."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("width", c_int32),
        ("input_channels", c_int32),
        ("output_channels", c_int32),
        ("input_n", c_int32),
        ("output_n", c_int32),
        ("weight_n", c_int32),
        ("parts", c_int32),
        ("first_row", c_int32),
    )


class ProgramPort(_Sized):
    """anepy_program_port."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("kind", c_int32),
        ("name", c_char * 24),
        ("surface", c_char * 24),
        ("channel", c_int32),
        ("channels", c_int32),
        ("columns", c_int32),
        ("rows", c_int32),
        ("cols", c_int64),
        ("offset", c_int64),
    )


class SimOptions(_Sized):
    """anepy_sim_options."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("text", c_char_p),
        ("text_n", u64),
        ("paths", POINTER(c_char_p)),
        ("files", POINTER(handle)),
        ("file_nbytes", POINTER(u64)),
        ("actions", c_char_p),
        ("file_n", c_int32),
        ("action_n", c_int32),
        ("memory_nbytes", u64),
        ("work", u64),
        ("chip", c_int32),
        ("threads", c_int32),
        ("device", c_char_p),
    )


class SimTensor(_Sized):
    """anepy_sim_tensor."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("type", c_int32),
        ("name", c_char_p),
        ("rank", c_int32),
        ("slot", c_int32),
        ("dims", c_int64 * 5),
        ("nbytes", u64),
    )


class SimReport(_Sized):
    """anepy_sim_report."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("count", u64),
        ("first", c_char * 480),
    )


class Peaks(_Sized):
    """anepy_peaks."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("threads", c_int32),
        ("isa", c_char * 32),
        ("fp32_gflops", c_double),
        ("bf16_gflops", c_double),
        ("read_gbs", c_double),
        ("copy_gbs", c_double),
        ("triad_gbs", c_double),
    )


class BenchOptions(_Sized):
    """anepy_bench_options."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("seq_len", c_int32),
        ("name", c_char_p),
        ("isa", c_char_p),
        ("precision", c_char_p),
        ("threads", c_int32),
        ("rounds", c_int32),
        ("round_ms", c_double),
        ("limit_ms", c_double),
    )


class BenchResult(_Sized):
    """anepy_bench_result."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("threads", c_int32),
        ("rounds", c_int32),
        ("repetitions", c_int32),
        ("fp32", c_int32),
        ("bf16", c_int32),
        ("isa", c_char * 32),
        ("precision", c_char * 16),
        ("shape", c_char * 64),
        ("limit", c_char * 32),
        ("operations", c_double),
        ("bytes", c_double),
        ("calls", c_double),
        ("error", c_double),
    )


class Flops(_Sized):
    """anepy_flops."""

    _fields_ = (
        ("struct_size", c_uint32),
        ("flags", c_uint32),
        ("forward", c_double),
        ("backward_dx", c_double),
        ("backward_dw", c_double),
        ("attention", c_double),
        ("classifier", c_double),
        ("total", c_double),
    )


# In the order of anepy_struct_size.
STRUCTS: tuple[type[_Sized], ...] = (
    Config,
    Tensor,
    EngineOptions,
    EngineInfo,
    StepStats,
    UpdateOptions,
    UpdateStats,
    LibraryInfo,
    DeviceInfo,
    ProgramOptions,
    ProgramInfo,
    ProgramPort,
    SimOptions,
    SimTensor,
    SimReport,
    Peaks,
    BenchOptions,
    BenchResult,
    Flops,
)

_ids = POINTER(c_int32)
_floats = POINTER(c_float)
_starts = POINTER(u8)

# Functions that return a status; a negative one becomes an exception.
CHECKED: dict[str, tuple[Any, ...]] = {
    "anepy_model_create": (POINTER(handle), POINTER(Config)),
    "anepy_model_tensor": (handle, c_int32, POINTER(Tensor)),
    "anepy_model_freeze": (handle, c_int32),
    "anepy_model_store": (handle, c_int32, c_int32),
    "anepy_pack": (handle, _floats, c_int32, c_int64),
    "anepy_unpack": (_floats, handle, c_int32, c_int64),
    "anepy_model_adapt": (handle, c_int32, c_double, c_uint32),
    "anepy_step_flops": (handle, POINTER(Flops), c_int32, c_int32),
    "anepy_optimizer_moments": (c_char_p, POINTER(Tensor)),
    "anepy_memory_alloc": (POINTER(handle), u64),
    "anepy_engine_create": (POINTER(handle), handle, POINTER(EngineOptions)),
    "anepy_engine_get_info": (handle, POINTER(EngineInfo)),
    "anepy_engine_step": (handle, POINTER(StepStats), _ids, _ids, c_int32),
    "anepy_engine_step_batch": (
        handle,
        POINTER(StepStats),
        _ids,
        _ids,
        _starts,
        c_int32,
        c_int32,
    ),
    "anepy_engine_reserve": (handle, c_int32, c_int32),
    "anepy_engine_update": (handle, POINTER(UpdateStats), POINTER(UpdateOptions)),
    "anepy_engine_evaluate": (handle, POINTER(c_double), _ids, _ids, c_int32),
    "anepy_engine_evaluate_batch": (
        handle,
        POINTER(c_double),
        POINTER(c_double),
        _ids,
        _ids,
        _starts,
        c_int32,
        c_int32,
    ),
    "anepy_engine_logits": (handle, _floats, _ids, c_int32),
    "anepy_engine_logits_batch": (handle, _floats, _ids, _starts, c_int32, c_int32),
    "anepy_engine_reduce": (handle, c_int64, c_double, c_uint32),
    "anepy_engine_hold_embedding": (handle, c_int32),
    "anepy_engine_holds": (handle, c_int32, c_int32),
    "anepy_engine_held_embedding": (handle, POINTER(c_float)),
    "anepy_engine_discard": (handle,),
    "anepy_engine_restore": (handle, POINTER(EngineInfo)),
    "anepy_decoder_create": (POINTER(handle), handle, handle, c_int32, c_int32),
    "anepy_decoder_forward": (handle, _floats, c_int32, c_int32),
    "anepy_decoder_prefill": (handle, _floats, _ids, c_int32, c_int32),
    "anepy_program_get_info": (handle, POINTER(ProgramInfo), POINTER(ProgramOptions)),
    "anepy_program_get_port": (handle, POINTER(ProgramPort), POINTER(ProgramOptions), c_int32),
    "anepy_mil_write": (
        handle,
        handle,
        POINTER(ProgramOptions),
        c_int32,
        c_char_p,
        handle,
        POINTER(u64),
        handle,
        POINTER(u64),
    ),
    "anepy_program_run_native": (
        handle,
        handle,
        POINTER(ProgramOptions),
        c_int32,
        c_int32,
        _floats,
        _floats,
    ),
    "anepy_sim_create": (POINTER(handle), POINTER(SimOptions), _ids),
    "anepy_sim_reload": (handle, POINTER(SimOptions)),
    "anepy_sim_get_tensor": (handle, POINTER(SimTensor), c_int32, c_int32, c_int32),
    "anepy_sim_run": (
        handle,
        c_int32,
        POINTER(handle),
        POINTER(u64),
        POINTER(handle),
        POINTER(u64),
        _ids,
    ),
    "anepy_sim_get_report": (handle, POINTER(SimReport), c_int32),
    "anepy_library_get_info": (POINTER(LibraryInfo),),
    "anepy_device_get_info": (c_int32, POINTER(DeviceInfo)),
    "anepy_variant_parse": (c_char_p, c_char_p, handle, POINTER(c_uint32)),
    "anepy_peaks_measure": (POINTER(Peaks), c_char_p, c_int32, c_int32),
    "anepy_bench_run": (handle, POINTER(BenchResult), POINTER(c_double), POINTER(BenchOptions)),
}

# All others: result type, then arguments.
PLAIN: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "anepy_abi_version": (c_int32, ()),
    "anepy_build_id": (c_char_p, ()),
    "anepy_status_name": (c_char_p, (c_int32,)),
    "anepy_last_error": (c_int32, (c_char_p, u64)),
    "anepy_struct_size": (c_int32, (c_int32,)),
    "anepy_model_free": (None, (handle,)),
    "anepy_model_tensor_n": (c_int32, (handle,)),
    "anepy_model_arena_n": (c_int64, (handle,)),
    "anepy_model_params_nbytes": (c_int64, (handle,)),
    "anepy_model_gradient_n": (c_int64, (handle,)),
    "anepy_model_adapter_n": (c_int64, (handle,)),
    "anepy_rope_frequency": (c_double, (handle, c_int32)),
    "anepy_memory_free": (None, (handle, u64)),
    "anepy_engine_free": (None, (handle,)),
    "anepy_engine_ready": (c_int32, (handle, POINTER(c_int64))),
    "anepy_decoder_free": (None, (handle,)),
    "anepy_program_at": (c_char_p, (c_int32,)),
    "anepy_sim_free": (None, (handle,)),
    "anepy_sim_compiled": (c_int32, (handle,)),
    "anepy_sim_function_name": (c_char_p, (handle, c_int32)),
    "anepy_sim_rule_name": (c_char_p, (c_int32,)),
    "anepy_sim_rule_meaning": (c_char_p, (c_int32,)),
    "anepy_sim_rule_action": (c_int32, (c_int32,)),
    "anepy_sim_watch": (None, (c_int32,)),
    "anepy_sim_headroom": (c_char_p, (c_int32, POINTER(c_double))),
    "anepy_sim_op_name": (c_char_p, (c_int32,)),
    "anepy_sim_type_name": (c_char_p, (c_int32,)),
    "anepy_optimizer_name": (c_char_p, (c_int32,)),
    "anepy_switch_name": (c_char_p, (c_int32,)),
    "anepy_variant_name": (c_char_p, (c_int32,)),
    "anepy_bench_at": (c_char_p, (c_int32,)),
}

_BUDGET = -42
_UNSUPPORTED = -50
# What the caller can mend: argument, name, token, unavailable.
_USER_ERRORS = frozenset((-10, -11, -12, -41))


def bind(lib: ctypes.CDLL, path: str) -> None:
    """Declare every function of the library and check that it is the one this package expects.

    Raises:
        AbiMismatchError: another ABI version, another struct layout, or a missing function.
    """
    remedy = "run `anepy lib build`, or unset ANEPY_LIB"
    try:
        lib.anepy_abi_version.restype = c_int32
        lib.anepy_abi_version.argtypes = ()
        version = lib.anepy_abi_version()
        if version != ABI_VERSION:
            raise AbiMismatchError(
                f"native library {path} has ABI {version}, this anepy needs {ABI_VERSION}: {remedy}"
            )
        for name, arguments in CHECKED.items():
            function = getattr(lib, name)
            function.restype = c_int32
            function.argtypes = arguments
            function.errcheck = _checker(lib)
        for name, (result, arguments) in PLAIN.items():
            function = getattr(lib, name)
            function.restype = result
            function.argtypes = arguments
    except AttributeError as error:
        raise AbiMismatchError(f"native library {path} is incomplete ({error}): {remedy}") from None
    for index, struct in enumerate(STRUCTS):
        size = lib.anepy_struct_size(index)
        if size != ctypes.sizeof(struct):
            raise AbiMismatchError(
                f"native library {path} lays out {struct.__name__} in {size} bytes, this anepy in "
                f"{ctypes.sizeof(struct)}: {remedy}"
            )


def _checker(lib: ctypes.CDLL) -> Any:
    def check(status: int, function: Any, arguments: Any) -> int:
        if status >= 0:
            return status
        detail = ctypes.create_string_buffer(512)
        lib.anepy_last_error(detail, 512)
        text = detail.value.decode(errors="replace")
        if status == _UNSUPPORTED:
            raise UnsupportedError(text)
        if status in _USER_ERRORS:
            raise ConfigError(text)
        if status == _BUDGET:
            raise CompileBudgetError(status, lib.anepy_status_name(status).decode(), text)
        raise NativeError(status, lib.anepy_status_name(status).decode(), text)

    return check
