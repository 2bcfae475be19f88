"""Costs as formulas: FLOPS and BYTES of every op in the symbols of `symbols`, and seconds by a roofline. Knows sympy and targets only."""
