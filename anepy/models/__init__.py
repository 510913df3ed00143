"""Models: dimensions, named weights, and the files they come from."""
