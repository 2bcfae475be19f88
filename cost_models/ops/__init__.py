"""One file an op: FLOPS and BYTES of one call, as sympy expressions in the symbols of `symbols`."""
