"""Device programs as MIL text, and what the hardware is asked about."""
