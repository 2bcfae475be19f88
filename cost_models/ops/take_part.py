"""take_part: of M rows of K inputs, those of the part, read and written; which they are, read."""

from __future__ import annotations

from sympy import Integer

from sparsify_compiler.cost_models.symbols import K, M, density, x_bytes

FLOPS = Integer(0)
BYTES = density * M * (2 * x_bytes * K + 8)
