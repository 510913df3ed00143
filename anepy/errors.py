"""Every exception anepy raises on purpose.

Messages are one line in the order: what failed, which file or value, what to do next.
The command line prints the message alone and exits with code 1.
"""

from __future__ import annotations


class AnepyError(Exception):
    """Base of all errors anepy raises on purpose."""


class ConfigError(AnepyError):
    """A setting is out of range or contradicts another one."""


class UnsupportedError(ConfigError):
    """A setting that is right elsewhere means nothing on this device."""


class ModelError(AnepyError):
    """A model file is missing, malformed or cannot be written."""


class TokenizerError(AnepyError):
    """A tokenizer file is missing, malformed or does not fit the model."""


class DataError(AnepyError):
    """A token file is missing, malformed, too short or does not fit the model."""


class CheckpointError(AnepyError):
    """A checkpoint cannot be read, does not fit the run, or cannot be written."""


class DivergedError(AnepyError):
    """The loss or a gradient stopped being finite; the weights were left untouched."""


class BusyError(AnepyError):
    """Another process works on the same file or folder."""


class ClosedError(AnepyError):
    """An object was used after `close()`."""


class NativeError(AnepyError):
    """The native library refused a call.

    Attributes:
        code: the negative status of `anepy.h`.
        name: its symbolic name.
        detail: what the library said about this call.
    """

    def __init__(self, code: int, name: str, detail: str) -> None:
        super().__init__(detail or name)
        self.code = code
        self.name = name
        self.detail = detail


class CompileBudgetError(NativeError):
    """This process may compile no more programs for the device.

    Raised before anything is compiled, by the first call that needs programs for the weights as
    they are now; the update that changed them is complete. Save the model or a checkpoint and go
    on in a new process, as `anepy train` does by itself.
    """


class MilError(AnepyError):
    """MIL text, its weights or its numbers break the language or a rule of the hardware.

    Attributes:
        line: where in the text, from 1; 0 if the text is not at fault.
        column: where in the line, from 1; 0 if the text is not at fault.
    """

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


class LibraryNotFoundError(AnepyError):
    """No usable native library was found, fetched or compiled."""


class LibraryBuildError(AnepyError):
    """Compiling the native library failed."""


class AbiMismatchError(AnepyError):
    """A native library was found, but it belongs to another version of anepy."""


class UnsupportedPlatformError(AnepyError):
    """This operating system or processor is not supported."""


class DownloadError(AnepyError):
    """A download failed."""


class ChecksumError(DownloadError):
    """A file does not have the pinned SHA-256."""


class OfflineError(DownloadError):
    """A download would be needed, but `ANEPY_OFFLINE` forbids it."""
