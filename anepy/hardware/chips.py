"""What others measured on Apple's chips: the parts of a step, and whole steps of stories110M.

Nothing here was measured by anepy. docs/neural-engine.md#sources-and-marks names the sources.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD_PROGRAMS = 24  # evaluations that `forward_ms` is the time of


@dataclass(frozen=True)
class Chip:
    """A chip, by the parts of a step that were published; times in ms, of stories110M.

    Attributes:
        title: its name.
        dispatch_ms: an evaluation of a program with next to nothing to compute.
        forward_ms: the forward programs of the static program, 24 evaluations.
        products_ms: the logits on the host: 256 columns of 768 by 32000.
        io_ms: moving `io_nbytes` of the forward pass between host and surfaces.
        device_gbs: GB/s at which the engine reads surfaces and weights.
        source: of the above.
    """

    title: str
    dispatch_ms: float
    forward_ms: float
    products_ms: float
    io_ms: float
    device_gbs: float
    source: str


IO_NBYTES = 71e6  # of a forward pass of the research programs: 12 x (0.79 MB in, 5.1 MB out)

# Host products run on the matrix units of the clusters of performance cores, one to a cluster: M4
# and M5 have one, M4 Pro, M4 Max and M3 Max two. Where the logits were not timed on a chip they are
# taken from one with the same cores. M3 Ultra gains nothing by its second half.
CHIPS = {
    "m3pro": Chip("M3 Pro", 0.095, 15.0, 8.4, 3.6, 48, "inferred from M3 Ultra, one cluster"),
    "m3max": Chip("M3 Max", 0.095, 15.0, 4.2, 3.8, 48, "maderix PR 21, 28; half an M3 Ultra"),
    "m3ultra": Chip("M3 Ultra", 0.095, 15.0, 4.2, 3.6, 48, "maderix PR 28"),
    "m4": Chip("M4", 0.095, 9.8, 9.6, 4.45, 57, "maderix #3, README"),
    "m4pro": Chip("M4 Pro", 0.095, 8.9, 4.8, 4.45, 57, "maderix #3; products: twice an M4"),
    "m4max": Chip("M4 Max", 0.095, 10.2, 4.8, 4.45, 57, "maderix #3; products: twice an M4"),
    "m5": Chip("M5", 0.11, 9.45, 10.7, 4.75, 57, "maderix #3, PR 48; ANEForge"),
}


@dataclass(frozen=True)
class Published:
    """A step of stories110M, 256 tokens, as somebody measured it; compilation excluded.

    Attributes:
        chip: a key of `CHIPS`.
        variant: which of ours distributes the work like the program that was measured.
        ms: per step; the middle of a range.
        source: whose it is.
        fitted: the constants of the prediction are fitted to it; others only check them.
        vocab_size: rows of its classifier; the research programs' dynamic one has only those tokens
            that occur.
        dispatches: its evaluations, where it has another number than ours.
        keeps_dw: its weight gradients stay on the device until the update.
    """

    chip: str
    variant: str
    ms: float
    source: str
    fitted: bool = False
    vocab_size: int = 32000
    dispatches: int | None = None
    keeps_dw: bool = False


PUBLISHED = (
    Published("m4", "baseline", 109.5, "maderix #3, README: 107 to 112", True),
    Published("m4", "ane", 91.8, "maderix README", True),
    Published("m4max", "baseline", 69.5, "maderix #3, dev-erik: 64 to 75", True),
    Published("m3max", "baseline", 107.2, "maderix PR 21, macOS 15.3", True),
    Published("m3max", "baseline", 82.9, "maderix PR 21, macOS 15.4", True),
    Published("m3ultra", "baseline", 86.0, "maderix PR 28: 81 to 91", True),
    Published("m3max", "opt", 92.1, "maderix PR 21, macOS 15.3"),
    Published("m3max", "opt", 74.0, "maderix PR 21, macOS 15.4"),
    Published("m3max", "opt", 72.6, "the best published of an M3 Max"),
    Published("m4max", "ane", 57.0, "dev-erik, best of 57 to 63"),
    Published("m3ultra", "ane", 71.4, "maderix PR 28"),
    Published("m3ultra", "dynamic", 115.4, "maderix PR 28", False, 9205, 120),
    Published("m4", "dynamic", 101.0, "maderix README: 91 to 111", False, 9205, 120),
    Published("m4", "dynamic", 93.1, "slavko", False, 9205, 120),
    Published("m3pro", "dynamic", 93.0, "slavko", False, 9205, 120),
    Published("m3pro", "ane", 79.0, "slavko: 77 to 81", False, 32000, 86),
    Published("m4", "dynamic+offload_classifier", 96.0, "fspecii, stage M7"),
    Published(
        "m4",
        "dynamic+offload_classifier+offload_softmax+offload_dw",
        52.0,
        "fspecii",
        dispatches=87,
        keeps_dw=True,
    ),
    Published("m4pro", "baseline", 71.0, "maderix #3: 69 to 73"),
    Published("m5", "baseline", 114.5, "maderix #3, PR 48: 101 to 128"),
)
