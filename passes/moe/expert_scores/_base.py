"""What scores of experts share.

A score is a function `name(evidence, *, options...) -> float32 [E]` in a file of its own, larger for experts that matter more. evidence is a
mixture on the rows of calibration (passes/moe/_observed.py).
"""
