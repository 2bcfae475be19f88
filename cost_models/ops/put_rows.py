"""put_rows: M rows of N outputs written, of which those that are open are read; which are, read."""

from __future__ import annotations

from sympy import Integer

from sparsify_compiler.cost_models.symbols import M, N, density, x_bytes

FLOPS = Integer(0)
BYTES = x_bytes * (M * N + density * M * N + M)
