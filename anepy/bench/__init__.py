"""How fast the parts of a step are, and what the machine could do."""
