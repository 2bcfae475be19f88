"""What importances share.

An importance is a function `name(evidence, *, options...) -> float32 [H]` in a file of its own, larger for neurons that matter more; STATISTICS says
what it needs of calibration, as in partitions.
"""
