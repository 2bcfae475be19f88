"""changes: M rows of K inputs, read and written; a quotient, a rounding, a product and a difference for each."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, x_bytes

FLOPS = 4 * M * K
BYTES = 2 * x_bytes * M * K
