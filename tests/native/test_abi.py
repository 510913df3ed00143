"""`abi.py` against `anepy.h` and the real library: layouts, prototypes, status codes, refusals."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import needs
import pytest

from anepy.errors import AbiMismatchError, AnepyError, ConfigError, NativeError
from anepy.native import abi, find

HEADER = needs.CHECKOUT / "libsrc" / "anepy.h"  # with its part anepy_programs.h
REMEDY = "run `anepy lib build`, or unset ANEPY_LIB"


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    return find.library()


@pytest.fixture
def fresh(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Open the library again, since `bind` changes the function objects it is given."""
    return ctypes.CDLL(lib._name)


def whole() -> str:
    return "".join(path.read_text("utf-8") for path in sorted(HEADER.parent.glob("anepy*.h")))


@pytest.fixture(scope="module")
def header() -> str:
    """Return the header without comments and preprocessor lines."""
    text = re.sub(r"/\*.*?\*/", "", whole(), flags=re.S)
    return re.sub(r"(?m)^#.*$", "", text)


def struct_fields(header: str) -> dict[str, list[str]]:
    """Read struct name -> field names, in order."""
    found = {}
    for body, name in re.findall(r"typedef struct \w+ \{(.*?)\} (\w+);", header, re.S):
        names = []
        for declaration in filter(str.strip, body.split(";")):
            first, *more = declaration.split(",")
            names += [re.findall(r"\w+", re.sub(r"\[.*", "", part))[-1] for part in (first, *more)]
        found[name] = names
    return found


def prototypes(header: str) -> dict[str, tuple[str, list[str]]]:
    """Read function name -> (result type, argument types), spaces and const left out."""
    found = {}
    for result, name, arguments in re.findall(r"ANEPY_API ([^;(]+?)(\w+)\(([^)]*)\);", header):
        types = []
        for argument in arguments.split(","):
            kind = re.sub(r"\bconst\b", "", argument)
            # Drops the argument's name; `(void)` has none.
            kind = re.sub(r"\w+\s*$", "", kind) if kind.strip() != "void" else ""
            types.append("".join(kind.split()))
        found[name] = ("".join(result.replace("const", "").split()), [t for t in types if t])
    return found


def c_name(struct: type[ctypes.Structure]) -> str:
    return "anepy" + re.sub(r"[A-Z]", lambda m: "_" + m[0].lower(), struct.__name__)


# --------------------------------------------------------------------------------------- layout


def test_structs_in_the_order_of_the_header_have_its_fields(header: str) -> None:
    fields = struct_fields(header)
    assert {c_name(s) for s in abi.STRUCTS} == set(fields)
    for struct in abi.STRUCTS:
        assert [name for name, *_ in struct._fields_] == fields[c_name(struct)], struct.__name__


def test_struct_sizes_are_those_of_the_library(lib: ctypes.CDLL) -> None:
    sizes = [lib.anepy_struct_size(i) for i in range(len(abi.STRUCTS))]
    assert sizes == [ctypes.sizeof(struct) for struct in abi.STRUCTS]
    assert lib.anepy_struct_size(len(abi.STRUCTS)) == lib.anepy_struct_size(-1) == -1


def test_field_offsets_are_those_of_the_compiler(tmp_path: Path) -> None:
    compiler = needs.compiler()
    lines, expected = [], []
    for struct in abi.STRUCTS:
        name = c_name(struct)
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            size = f"sizeof((({name} *)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), {size});')
            expected.append(f"{name}.{field} {place.offset} {place.size}")
    source = tmp_path / "offsets.c"
    source.write_text(
        '#include "anepy.h"\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n'
        + "\n".join(lines)
        + "\nreturn 0;\n}\n"
    )
    program = tmp_path / "offsets"
    subprocess.run([compiler, f"-I{HEADER.parent}", source, "-o", program], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    assert printed.splitlines() == expected


def test_structs_fill_in_their_size() -> None:
    for struct in abi.STRUCTS:
        assert struct().struct_size == ctypes.sizeof(struct)


# ----------------------------------------------------------------------------------- prototypes


def test_every_function_of_the_header_is_declared_and_the_reverse(header: str) -> None:
    assert set(prototypes(header)) == set(abi.CHECKED) | set(abi.PLAIN)
    assert not set(abi.CHECKED) & set(abi.PLAIN)


def ctypes_of(kind: str) -> tuple[Any, ...]:
    """List what a C type may be declared as."""
    scalars: dict[str, Any] = {
        "uint8_t": ctypes.c_uint8,
        "int32_t": ctypes.c_int32,
        "int64_t": ctypes.c_int64,
        "uint32_t": ctypes.c_uint32,
        "uint64_t": ctypes.c_uint64,
        "double": ctypes.c_double,
        "float": ctypes.c_float,
    }
    structs = {c_name(struct): struct for struct in abi.STRUCTS}
    if kind in scalars:
        return (scalars[kind],)
    base, stars = kind.rstrip("*"), kind.count("*")
    if stars == 2:
        return (ctypes.POINTER(ctypes.c_void_p),)
    if base == "char":
        return (ctypes.c_char_p, ctypes.c_void_p)
    if base in structs:
        return (ctypes.POINTER(structs[base]),)
    if base in scalars:
        return (ctypes.POINTER(scalars[base]), ctypes.c_void_p)
    return (ctypes.c_void_p,)  # an opaque handle


def test_prototypes_are_those_of_the_header(header: str) -> None:
    for name, (result, arguments) in prototypes(header).items():
        if name in abi.CHECKED:
            declared: tuple[Any, ...] = abi.CHECKED[name]
            assert result == "int32_t", name
        else:
            returns, declared = abi.PLAIN[name]
            assert returns is (None if result == "void" else ctypes_of(result)[0]), name
        assert len(declared) == len(arguments), name
        for position, (kind, given) in enumerate(zip(arguments, declared, strict=True)):
            assert given in ctypes_of(kind), f"{name}, argument {position}: {kind}"


def test_functions_that_return_a_status_are_checked(header: str) -> None:
    """Of those with an int32_t result, the rest answer with a number instead."""
    numbers = {
        "anepy_abi_version",
        "anepy_last_error",
        "anepy_struct_size",
        "anepy_engine_ready",
        "anepy_model_tensor_n",
        "anepy_sim_rule_action",
        "anepy_sim_compiled",
    }
    returning = {name for name, (result, _) in prototypes(header).items() if result == "int32_t"}
    assert set(abi.CHECKED) <= returning and returning - set(abi.CHECKED) <= numbers


def test_version_is_that_of_header_and_library(lib: ctypes.CDLL) -> None:
    defined = re.search(r"#define ANEPY_ABI_VERSION (\d+)", HEADER.read_text("utf-8"))
    assert defined is not None
    assert abi.ABI_VERSION == int(defined[1]) == lib.anepy_abi_version()


def test_header_is_complete_alone_in_c_and_cpp(tmp_path: Path) -> None:
    for language, compiler in (("c", needs.compiler()), ("c++", needs.program("c++", "g++"))):
        command = [compiler, "-x", language, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        subprocess.run([*command, HEADER], check=True, stderr=subprocess.PIPE)


# ------------------------------------------------------------------------------ refused libraries


class Altered:
    """A library with some functions replaced, or missing where the replacement is None."""

    def __init__(self, lib: ctypes.CDLL, **functions: Any) -> None:
        self._original = lib
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        if name not in self._functions:
            return getattr(self._original, name)
        if self._functions[name] is None:
            raise AttributeError(f"undefined symbol: {name}")
        return self._functions[name]


class Function:
    """What ctypes makes of a C function, as far as `bind` uses it."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def __call__(self, *arguments: Any) -> Any:
        return self._body(*arguments)


def refusal(lib: Any) -> str:
    with pytest.raises(AbiMismatchError) as caught:
        abi.bind(lib, "/some/where/libanepy.so")
    text = str(caught.value)
    assert "\n" not in text
    assert "/some/where/libanepy.so" in text
    assert text.endswith(REMEDY)
    return text


def test_bind_unaltered_library_is_accepted(fresh: ctypes.CDLL) -> None:
    abi.bind(Altered(fresh), "libanepy.so")  # type: ignore[arg-type]


@pytest.mark.parametrize("version", [0, abi.ABI_VERSION - 1, abi.ABI_VERSION + 1])
def test_bind_other_abi_number_names_both(fresh: ctypes.CDLL, version: int) -> None:
    text = refusal(Altered(fresh, anepy_abi_version=Function(lambda: version)))
    assert f"has ABI {version}" in text and f"needs {abi.ABI_VERSION}" in text


@pytest.mark.parametrize("index", range(len(abi.STRUCTS)))
def test_bind_other_struct_size_names_struct_and_both_sizes(fresh: ctypes.CDLL, index: int) -> None:
    struct = abi.STRUCTS[index]
    size = ctypes.sizeof(struct)

    def sizes(i: int) -> int:
        return size + 8 if i == index else ctypes.sizeof(abi.STRUCTS[i])

    text = refusal(Altered(fresh, anepy_struct_size=Function(sizes)))
    assert f"{struct.__name__} in {size + 8} bytes, this anepy in {size}" in text


@pytest.mark.parametrize("name", sorted([*abi.CHECKED, *abi.PLAIN]))
def test_bind_missing_function_is_named(fresh: ctypes.CDLL, name: str) -> None:
    assert name in refusal(Altered(fresh, **{name: None}))


def test_bind_foreign_library_is_refused() -> None:
    assert "anepy_abi_version" in refusal(ctypes.CDLL(None))


# ---------------------------------------------------------------------------------------- status


def test_status_names_are_those_of_the_header(lib: ctypes.CDLL) -> None:
    text = whole()
    codes = re.findall(r"#define ANEPY_E_(\w+) \((-\d+)\)", text)
    assert len(codes) >= 10
    for name, code in codes:
        assert lib.anepy_status_name(int(code)).decode() == name.lower()
    assert lib.anepy_status_name(0) == b"ok"
    assert lib.anepy_status_name(-9999) == b"unknown"


def test_status_users_mistakes_are_config_errors_others_native_errors() -> None:
    said = {"anepy_last_error": b"the sentence", "anepy_status_name": b"the name"}

    class Lib:
        @staticmethod
        def anepy_last_error(buffer: Any, cap: int) -> int:
            buffer.value = said["anepy_last_error"]
            return len(said["anepy_last_error"])

        @staticmethod
        def anepy_status_name(_: int) -> bytes:
            return said["anepy_status_name"]

    check = abi._checker(Lib)  # type: ignore[arg-type]
    for status in (0, 1, 7):
        assert check(status, None, ()) == status
    for code in (-10, -11, -12, -41, -50):
        with pytest.raises(ConfigError, match=r"^the sentence$"):
            check(code, None, ())
    for code in (-20, -30, -31, -40, -60, -1, -9999):
        with pytest.raises(NativeError, match=r"^the sentence$") as caught:
            check(code, None, ())
        assert (caught.value.code, caught.value.name) == (code, "the name")
        assert caught.value.detail == "the sentence"
    said["anepy_last_error"] = b""
    with pytest.raises(NativeError, match=r"^the name$"):
        check(-40, None, ())


def test_error_of_a_real_call_carries_the_detail(lib: ctypes.CDLL) -> None:
    config = abi.Config(
        dim=0,
        hidden_dim=1,
        n_layers=1,
        n_heads=1,
        n_kv_heads=1,
        vocab_size=1,
        seq_len=1,
        tied=1,
    )
    with pytest.raises(ConfigError, match=r"^dim is 0, expected 1 to 32768$"):
        lib.anepy_model_create(ctypes.byref(ctypes.c_void_p()), ctypes.byref(config))


def test_error_memory_is_native(lib: ctypes.CDLL) -> None:
    address = ctypes.c_void_p()
    for nbytes in (2**63, 2**64 - 1, 2**47):
        with pytest.raises(NativeError, match=f"{nbytes} bytes") as caught:
            lib.anepy_memory_alloc(ctypes.byref(address), nbytes)
        assert (caught.value.code, caught.value.name) == (-20, "memory")
        assert not address.value


def test_last_error_short_buffer_is_filled_and_ended(lib: ctypes.CDLL) -> None:
    with pytest.raises(AnepyError):
        lib.anepy_device_get_info(-1, ctypes.byref(abi.DeviceInfo()))
    whole = ctypes.create_string_buffer(512)
    length = lib.anepy_last_error(whole, 512)
    assert length == len(whole.value) > 8
    short = ctypes.create_string_buffer(b"x" * 20, 20)
    assert lib.anepy_last_error(short, 8) == length
    assert short.raw[:8] == whole.value[:7] + b"\0" and short.raw[8:] == b"x" * 12
    assert lib.anepy_last_error(None, 0) == lib.anepy_last_error(None, 100) == length


def test_last_error_belongs_to_its_thread(lib: ctypes.CDLL) -> None:
    with pytest.raises(AnepyError):
        lib.anepy_device_get_info(-1, ctypes.byref(abi.DeviceInfo()))
    lengths = []
    thread = threading.Thread(target=lambda: lengths.append(lib.anepy_last_error(None, 0)))
    thread.start()
    thread.join()
    assert lengths == [0] and lib.anepy_last_error(None, 0) > 0


@pytest.mark.parametrize("size", [0, 8, ctypes.sizeof(abi.Config) - 4])
def test_options_of_an_older_caller_are_refused(lib: ctypes.CDLL, size: int) -> None:
    """A shorter struct would be read beyond its end."""
    config = abi.Config()
    config.struct_size = size
    with pytest.raises(ConfigError, match=f"config has {size} bytes"):
        lib.anepy_model_create(ctypes.byref(ctypes.c_void_p()), ctypes.byref(config))


def test_free_accepts_null(lib: ctypes.CDLL) -> None:
    lib.anepy_model_free(None)
    lib.anepy_engine_free(None)
    lib.anepy_decoder_free(None)
    lib.anepy_memory_free(None, 4096)


def test_memory_is_aligned_and_zero(lib: ctypes.CDLL) -> None:
    for nbytes in (1, 4096, 3 << 20):
        address = ctypes.c_void_p()
        lib.anepy_memory_alloc(ctypes.byref(address), nbytes)
        assert address.value is not None and address.value % 64 == 0
        assert not any(ctypes.string_at(address.value, nbytes))
        lib.anepy_memory_free(address, nbytes)


def test_lists_of_names_end(lib: ctypes.CDLL) -> None:
    for names in (lib.anepy_switch_name, lib.anepy_variant_name):
        found = []
        while (name := names(len(found))) is not None:
            found.append(name)
        assert len(found) == len(set(found)) > 3
        assert names(-1) is None and names(1 << 30) is None
