"""linear_nm: n of every m inputs, one byte of place each."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, activations, m, n, value_bytes

KEPT = N * K / m * n
FLOPS = 2 * M * KEPT
BYTES = (value_bytes + 1) * KEPT + activations
