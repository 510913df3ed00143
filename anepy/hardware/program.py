"""Compile and run any MIL text from numpy, on the simulator of the Neural Engine."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..engine.handle import Owner, encoded
from ..errors import ConfigError, MilError, NativeError, UnsupportedError
from ..native import abi, find
from .packing import pack

Array = npt.NDArray[Any]
Weights = Mapping[str, bytes | bytearray | memoryview | Array]
Action = Literal["off", "report", "error"]

CHIPS = ("m1", "m2", "m3", "m4", "m5", "m6")
FOLDER = "@model_path/weights/"
_ACTIONS: tuple[Action, ...] = ("off", "report", "error")
_DTYPES = {"fp16": "float16", "fp32": "float32"}
_RECORD_TYPES = {"float16": 1, "float32": 2, "uint8": 3, "int8": 4}
_SURFACE = 65536  # every surface is a multiple of it: docs/neural-engine.md#surfaces
_E_PROGRAM = -13
_ONE_FILE = "one weight file only"  # device/ane/framework.m
_REPORT, _ERROR, _DEFAULT = 1, 2, 255


@dataclass(frozen=True)
class TensorInfo:
    """Shape and numpy dtype of an input or output."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Rule:
    """A limit of the hardware: what is done about it by default, and what it says."""

    action: Action
    meaning: str


@dataclass(frozen=True)
class RuleReport:
    """How often a program broke a rule so far, and the first message."""

    count: int
    message: str


@dataclass(frozen=True)
class _Port:
    name: str
    info: TensorInfo
    slot: int
    nbytes: int


class _Function:
    """The tensors of one function and the surfaces that are bound to them."""

    def __init__(self, index: int, inputs: list[_Port], outputs: list[_Port]) -> None:
        self.index = index
        self.inputs = inputs
        self.outputs = outputs
        self._surfaces: list[list[Array]] | None = None

    def surfaces(self) -> list[list[Array]]:
        """Return input and output surfaces by slot, all of one size on each side, as on a device.

        Equal sizes, rounded up to 64 KiB, are what every chip accepts
        (docs/neural-engine.md#surfaces).
        """
        if self._surfaces is None:
            self._surfaces = []
            for ports in (self.inputs, self.outputs):
                nbytes = max((port.nbytes for port in ports), default=1)
                nbytes = -(-nbytes // _SURFACE) * _SURFACE
                self._surfaces.append([np.zeros(nbytes, np.uint8) for _ in ports])
        return self._surfaces


class Program(Owner):
    """A parsed program of MIL text, run in fp16 with the limits of the Neural Engine.

    Args:
        mil_text: the text, `program(1.0)` or later, with one or several functions.
        weights: weight files by their path in the text, or by what follows
            `@model_path/weights/`. Bytes are a whole file; an array (float16, float32, int8 or
            uint8) becomes a file with this one record, at offset 64.
        device: "sim", with details as "sim:m1,budget=20"; or "ane", which has the say then: rules
            are only reported.
        chip: whose limits on the simulator: "m1" to "m6"; default m4.
        strict: True makes every broken rule an error, False only reports them; None does with each
            rule what is its default. `compile_budget`, which is about the process, is left out.
        rules: actions of single rules, which override `strict`: "off", "report" or "error".
        threads: default from CPU affinity, cgroup quota and physical cores.

    Raises:
        MilError: the text, a weight file or a rule is broken; with line and column.
        ConfigError: an unknown device, chip or rule.

    Example:
        >>> text = '''program(1.3) {
        ...     func main<ios18>(tensor<fp16, [1, 16]> x) {
        ...         tensor<fp16, [1, 16]> y = relu(x=x)[name=string("y")];
        ...     } -> (y);
        ... }'''
        >>> Program(text)(x=np.linspace(-1, 1, 16)[None]).min()
        np.float16(0.0)
    """

    def __init__(
        self,
        mil_text: str | bytes,
        weights: Weights | None = None,
        device: str = "sim",
        chip: str | None = None,
        strict: bool | None = None,
        rules: Mapping[str, Action] | None = None,
        threads: int | None = None,
    ) -> None:
        if chip is not None and chip not in CHIPS:
            raise ConfigError(f"unknown chip {chip!r}: use one of {', '.join(CHIPS)}")
        if threads is not None and not 1 <= threads < 2**31:
            raise ConfigError(f"threads is {threads}, expected a number >= 1")
        self.device = device
        self._lib = find.library()
        text = mil_text.encode() if isinstance(mil_text, str) else bytes(mil_text)
        files = _files(weights or {})
        actions = _actions(strict, rules or {})
        options = abi.SimOptions(
            actions=actions,
            action_n=len(actions),
            chip=0 if chip is None else CHIPS.index(chip) + 1,
            threads=threads or 0,
            device=encoded(device),
        )
        self._text: bytes | None = None  # of which one weight file is made at last
        try:
            handle = self._created(options, text, files)
        except UnsupportedError as error:
            if _ONE_FILE not in str(error) or len(files) < 2:
                raise
            self._text = text
            handle = self._created(options, *pack(text, files))
        self._own(handle, self._lib.anepy_sim_free)
        self._functions: dict[str, _Function] = {}
        while name := self._lib.anepy_sim_function_name(handle, len(self._functions)):
            index = len(self._functions)
            self._functions[name.decode()] = _Function(
                index, self._ports(index, 0), self._ports(index, 1)
            )

    def _created(
        self, options: abi.SimOptions, text: bytes, files: Mapping[str, Array]
    ) -> ctypes.c_void_p:
        options.text, options.text_n = text, len(text)
        for name, value in _file_options(files).items():
            setattr(options, name, value)
        handle = ctypes.c_void_p()
        self._checked(self._lib.anepy_sim_create, ctypes.byref(handle), ctypes.byref(options))
        return handle

    @property
    def functions(self) -> tuple[str, ...]:
        """Names of the functions in the order of the text."""
        return tuple(self._functions)

    @property
    def inputs(self) -> dict[str, TensorInfo]:
        """Inputs of the first function, as declared."""
        return self.signature(self.functions[0])[0]

    @property
    def outputs(self) -> dict[str, TensorInfo]:
        """Outputs of the first function, as declared."""
        return self.signature(self.functions[0])[1]

    @property
    def reports(self) -> dict[str, RuleReport]:
        """Rules broken so far, while parsing and running, by name."""
        found = {}
        for index, name in enumerate(rules()):
            report = abi.SimReport()
            self._lib.anepy_sim_get_report(self._open_handle(), ctypes.byref(report), index)
            if report.count:
                found[name] = RuleReport(int(report.count), report.first.decode(errors="replace"))
        return found

    @property
    def compiled(self) -> bool:
        """Whether this program was compiled, not loaded as an earlier run had compiled it."""
        return bool(self._lib.anepy_sim_compiled(self._open_handle()))

    def reload(self, weights: Weights) -> None:
        """Put other weight files in place and load the program again without compiling it.

        Whether it computes with them then is the device's affair; on the simulator it does not.
        """
        files = _files(weights)
        if self._text is not None:
            files = pack(self._text, files)[1]
        options = abi.SimOptions(**_file_options(files))
        self._lib.anepy_sim_reload(self._open_handle(), ctypes.byref(options))

    def signature(self, function: str) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
        """Return inputs and outputs of a function, as declared."""
        found = self._find(function)
        return (
            {port.name: port.info for port in found.inputs},
            {port.name: port.info for port in found.outputs},
        )

    def __call__(self, **inputs: npt.ArrayLike) -> Any:
        """Run the first function.

        Args:
            inputs: arrays by name, of the declared shapes; converted to the declared types.

        Returns:
            The output, or if there are several a dict of them by name.

        Raises:
            MilError: a rule that is an error was broken by the numbers.
            ConfigError: an input is missing, unknown, or has another shape.
        """
        outputs = self.run(inputs)
        return outputs if len(outputs) > 1 else next(iter(outputs.values()))

    def run(
        self, inputs: Mapping[str, npt.ArrayLike], function: str | None = None
    ) -> dict[str, Array]:
        """Run a function, by default the first, and return its outputs by name."""
        found = self._find(self.functions[0] if function is None else function)
        unknown = set(inputs) - {port.name for port in found.inputs}
        if unknown:
            raise ConfigError(
                f"unknown input {min(unknown)!r}: this function takes "
                f"{', '.join(port.name for port in found.inputs) or 'none'}"
            )
        ins, outs = found.surfaces()
        for port in found.inputs:
            if port.name not in inputs:
                raise ConfigError(f"input {port.name!r} of shape {port.info.shape} is missing")
            _fill(ins[port.slot], port, inputs[port.name])
        self._run(found.index, ins, outs)
        return {port.name: _view(outs[port.slot], port).copy() for port in found.outputs}

    def run_slots(
        self, inputs: Sequence[Array], outputs: Sequence[Array], function: int = 0
    ) -> None:
        """Run a function on surfaces by slot, of the sizes they have: what the device sees.

        Args:
            inputs: contiguous arrays of any type, one per slot.
            outputs: contiguous arrays of any type, one per slot; overwritten.
            function: position in the text.
        """
        shape = list(self._functions.values())[function]
        if len(inputs) != len(shape.inputs) or len(outputs) != len(shape.outputs):
            raise ConfigError(
                f"{len(inputs)} inputs and {len(outputs)} outputs, function {function} has "
                f"{len(shape.inputs)} and {len(shape.outputs)}"
            )
        if not all(array.flags.c_contiguous for array in (*inputs, *outputs)):
            raise ConfigError("a surface is not contiguous: pass np.ascontiguousarray of it")
        self._run(function, inputs, outputs)

    def _run(self, function: int, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
        self._checked(
            self._lib.anepy_sim_run,
            self._open_handle(),
            function,
            _pointers(inputs),
            _sizes(inputs),
            _pointers(outputs),
            _sizes(outputs),
        )

    def _find(self, function: str) -> _Function:
        found = self._functions.get(function)
        if found is None:
            raise ConfigError(
                f"no function {function!r}: this program has {', '.join(self._functions)}"
            )
        return found

    def _ports(self, function: int, output: int) -> list[_Port]:
        ports: list[_Port] = []
        while True:
            tensor = abi.SimTensor()
            try:
                self._lib.anepy_sim_get_tensor(
                    self._open_handle(), ctypes.byref(tensor), function, output, len(ports)
                )
            except ConfigError:
                return ports
            kind = self._lib.anepy_sim_type_name(tensor.type).decode()
            info = TensorInfo(tuple(tensor.dims[: tensor.rank]), np.dtype(_DTYPES.get(kind, kind)))
            ports.append(_Port(tensor.name.decode(), info, tensor.slot, tensor.nbytes))

    def _checked(self, function: Any, *arguments: Any) -> None:
        where = (ctypes.c_int32 * 2)()
        try:
            function(*arguments, where)
        except NativeError as error:
            if error.code != _E_PROGRAM:
                raise
            raise MilError(error.detail, where[0], where[1]) from None


def rules() -> dict[str, Rule]:
    """Return every rule of the simulator by name."""
    lib = find.library()
    found: dict[str, Rule] = {}
    while name := lib.anepy_sim_rule_name(len(found)):
        index = len(found)
        found[name.decode()] = Rule(
            _ACTIONS[lib.anepy_sim_rule_action(index)],
            lib.anepy_sim_rule_meaning(index).decode(),
        )
    return found


def operations() -> tuple[str, ...]:
    """Return the names of the MIL operations the simulator knows."""
    lib = find.library()
    found: list[str] = []
    while name := lib.anepy_sim_op_name(len(found)):
        found.append(name.decode())
    return tuple(found)


def _actions(strict: bool | None, chosen: Mapping[str, Action]) -> bytes:
    table = rules()
    for name, action in chosen.items():
        if name not in table:
            raise ConfigError(f"unknown rule {name!r}: use one of {', '.join(table)}")
        if action not in _ACTIONS:
            raise ConfigError(f"rule {name} is {action!r}, expected one of {', '.join(_ACTIONS)}")
    everything = {None: _DEFAULT, True: _ERROR, False: _REPORT}[strict]
    return bytes(
        _ACTIONS.index(chosen[name])
        if name in chosen
        else (_DEFAULT if name == "compile_budget" else everything)
        for name in table
    )


def _files(weights: Weights) -> dict[str, Array]:
    """Return the bytes of every weight file by its path; nothing is copied but single tensors."""
    found: dict[str, Array] = {}
    for name, data in weights.items():
        path = name if name.startswith("@") else FOLDER + name
        if path in found or "\0" in path:
            raise ConfigError(f"weight file {name!r} is given twice or is no path")
        whole = _record(data, name) if isinstance(data, np.ndarray) else data
        nbytes = memoryview(whole).nbytes
        found[path] = np.frombuffer(whole, np.uint8) if nbytes else np.zeros(0, np.uint8)
    return found


def _file_options(files: Mapping[str, Array]) -> dict[str, Any]:
    n = len(files)
    return {
        "paths": (ctypes.c_char_p * n)(*(path.encode() for path in files)),
        "files": _pointers(files.values()),
        "file_nbytes": _sizes(files.values()),
        "file_n": n,
    }


def _record(array: Array, name: str) -> bytes:
    """Make a weight file of one record (docs/neural-engine.md#weight-file)."""
    kind = _RECORD_TYPES.get(str(array.dtype))
    if kind is None:
        raise ConfigError(
            f"weight {name!r} is {array.dtype}, expected {', '.join(_RECORD_TYPES)} or the bytes "
            "of a weight file"
        )
    data = np.ascontiguousarray(array).tobytes()
    header = struct.pack("<II56x", 1, 2) + struct.pack("<IIQQ40x", 0xDEADBEEF, kind, len(data), 128)
    return header + data + bytes(-len(data) % 64)


def _view(surface: Array, port: _Port) -> Array:
    return surface[: port.nbytes].view(port.info.dtype).reshape(port.info.shape)


def _fill(surface: Array, port: _Port, value: npt.ArrayLike) -> None:
    array = np.asarray(value)
    if array.shape != port.info.shape or array.dtype.kind not in "fiub":
        raise ConfigError(
            f"input {port.name!r} has shape {array.shape} and type {array.dtype}, expected numbers "
            f"of shape {port.info.shape}"
        )
    with np.errstate(over="ignore"):  # beyond fp16 is infinite, as on the device
        _view(surface, port)[...] = array


def _pointers(arrays: Collection[Array]) -> Any:
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def _sizes(arrays: Collection[Array]) -> Any:
    return (ctypes.c_uint64 * len(arrays))(*(array.nbytes for array in arrays))
