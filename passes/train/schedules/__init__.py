"""Numbers that move while a model is trained: one file a schedule."""
