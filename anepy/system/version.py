"""The version of this package, where every room may read it, and the build without importing."""

__version__ = "0.1.0"
