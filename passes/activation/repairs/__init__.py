"""What stands in for the inputs that a layer skips: one file a repair."""
