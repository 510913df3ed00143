"""Hand-written MIL programs, one or more per operation, with what numpy says they compute.

They are written as people write them for the Neural Engine: constants named first, parameters in
alphabetical order. `test_interpreter.py` runs them, `test_fuzz.py` breaks them.
"""

from __future__ import annotations

import mil_samples_elementwise
import mil_samples_layout
from mil_text import Sample

SAMPLES: list[Sample] = [*mil_samples_elementwise.SAMPLES, *mil_samples_layout.SAMPLES]
