"""put_part: M rows of N outputs read and written, those of the part read once more; which they are, read."""

from __future__ import annotations

from sympy import Integer

from sparsify_compiler.cost_models.symbols import M, N, density, x_bytes

FLOPS = Integer(0)
BYTES = x_bytes * (2 + density) * M * N + 8 * density * M
