"""What a terminal shows. No other folder imports rich, but for the bar of a download."""
