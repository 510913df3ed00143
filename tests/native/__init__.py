"""The native checks, and what compiles them for `test_kernels.py`."""
