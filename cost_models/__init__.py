"""Costs as formulas: FLOPS and BYTES of every op in the symbols of `symbols`, and the seconds of every kernel. Knows sympy and targets only."""
