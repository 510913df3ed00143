"""The training loop and what it writes: checkpoints, reports, logs."""
