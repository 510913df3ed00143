"""Checks of the kernels in C, and what compiles them for `test_kernels.py`."""
