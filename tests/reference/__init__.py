"""Independent references in plain numpy, slow and readable, that the library is tested against."""
