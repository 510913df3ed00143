"""The version of this package, alone in a module so that any other may import it."""

__version__ = "0.1.0"
