"""What all commands share: how they fail, how they print JSON, what they need from typer.

Imports nothing heavy: `anepy --help` must not wait for numpy.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from ..errors import AnepyError, LibraryBuildError
from ..system import beginning

if TYPE_CHECKING:
    from ..models.model import Model

EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130

# For every path: a file that may not be read is an error in one line and exit code 1 like any
# other, told by what reads it; typer's own check would make it a usage error.
path_option = functools.partial(typer.Option, readable=False)
path_argument = functools.partial(typer.Argument, readable=False)

ModelArgument = Annotated[
    Path | None,
    path_argument(
        metavar="MODEL",
        help=".bin, .gguf or Hugging Face folder.",
        show_default=False,
    ),
]
ModelOption = Annotated[
    Path | None,
    path_option("--model", metavar="FILE", help="The same as the argument."),
]
TokenizerOption = Annotated[
    Path | None,
    path_option(
        "--tokenizer",
        "-z",
        metavar="FILE",
        help="Tokenizer, or a model that has one. Default: that of MODEL.",
    ),
]
AdapterOption = Annotated[
    Path | None,
    path_option(
        "--adapter",
        metavar="FOLDER",
        help="LoRA adapter in PEFT's format, added to the weights of MODEL.",
        show_default=False,
    ),
]
DtypeOption = Annotated[
    str, typer.Option(help="Type of the ids in data of other programs, like uint32.")
]
DeviceOption = Annotated[str, typer.Option(help="Device: auto, cpu, sim or ane.")]
PrecisionOption = Annotated[str, typer.Option(help="Precision: auto, fp32, bf16 or fp16.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: as many as the process may use.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]

P = ParamSpec("P")
R = TypeVar("R")


def guarded(function: Callable[P, R]) -> Callable[P, R]:
    """Turn what a command raises into one line on standard error and an exit code."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            beginning.release()
            result = function(*args, **kwargs)
            # At interpreter exit a failure could no longer be told in one line.
            sys.stdout.flush()
            return result
        except LibraryBuildError as error:
            # The one error that is more than a line: what the compiler said belongs to it.
            message, _, output = str(error).partition("\n")
            fail(message, output)
        except AnepyError as error:
            fail(str(error))
        except KeyboardInterrupt:
            _say("anepy: interrupted")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of the output has gone, as in `anepy info | head -1`.
            _silence()
            raise typer.Exit(EXIT_FAILURE) from None
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            fail(f"{name}{error.strerror or error}")
        except MemoryError:
            fail("not enough memory; use a smaller model, a shorter --seq or a smaller --batch")
        raise AssertionError("unreachable")

    return wrapper


def fail(message: str, output: str = "") -> None:
    """Print an error as one line, another program's output below, and leave with exit code 1."""
    _say("\n".join(filter(None, (f"anepy: error: {_line(message)}", output))))
    raise typer.Exit(EXIT_FAILURE) from None


def note(text: str) -> None:
    """Say something worth knowing on standard error, in one line; nothing if there is nothing."""
    if text:
        _say(f"anepy: note: {_line(text)}")


def print_json(record: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    from ..system.files import dumps

    print(dumps(record, indent=2))


def examples(*commands: str) -> str:
    r"""Return the end of a help text; `\b` keeps the lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


def one_of(argument: Any, option: Any, name: str) -> Any:
    """Return a value that may be given as argument or as `--name`, but not as both."""
    if argument is not None and option is not None:
        raise typer.BadParameter(f"give the {name} once, as argument or as --{name}")
    return argument if argument is not None else option


def model_path(argument: Path | None, option: Path | None) -> Path:
    """Return the model of a command that needs one."""
    path: Path | None = one_of(argument, option, "model")
    if path is None:
        raise typer.BadParameter("name a model, like stories110M.bin")
    return path


def adapted_model(path: Path, adapter: Path | None, storage: str = "f32") -> Model:
    """Load a model stored so, or in float32 with the adapter of a folder fused into it."""
    from ..models.lora import Lora
    from ..models.model import Model

    if adapter is None:
        return Model.load(path, storage)
    return Lora.load(adapter).fuse(Model.load(path))


def distinct(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Check that no output replaces an input or another output.

    Args:
        outputs: label -> path of a file that will be written, or None.
        inputs: label -> path of a file that is read, or None.

    Raises:
        ConfigError: two of them are the same file.
    """
    from ..errors import ConfigError

    seen: dict[object, str] = {_identity(p): label for label, p in inputs.items() if p}
    for label, path in outputs.items():
        if not path:
            continue
        other = seen.setdefault(_identity(path), label)
        if other != label:
            raise ConfigError(f"{label} and {other} are the same file {path}: name another one")


def _identity(path: Any) -> object:
    """Return what is the same for two names of one file, through symbolic and hard links."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return found.st_dev, found.st_ino


def unescaped(text: str) -> str:
    r"""Return a text with `\n`, `\t`, `\r`, `\0` and `\\` understood."""
    import re

    meant = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}
    return re.sub(r"\\([ntr0\\])", lambda found: meant[found[1]], text)


def table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print labelled lines in the way that suits standard output."""
    from ..console.train import print_table

    print_table(title, rows)


def _line(text: str) -> str:
    """Put a text on one line; what a name from a file would make a terminal do is escaped."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def _silence() -> None:
    # Python flushes standard output once more at exit; give it something that accepts it.
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return
