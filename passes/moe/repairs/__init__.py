"""What makes up for the experts that a row skips: one file a repair."""
