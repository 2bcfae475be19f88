"""Static patterns of attention. One file a pattern."""
