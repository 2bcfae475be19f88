"""take_rows: of M rows of K inputs, those that are open, read and written; which are, read."""

from __future__ import annotations

from sympy import Integer

from sparsify_compiler.cost_models.symbols import K, M, density, x_bytes

FLOPS = Integer(0)
BYTES = x_bytes * (2 * density * M * K + M)
