"""linear_bitmap: one bit a place, and the kept values."""

from __future__ import annotations

from sympy import ceiling

from sparsify_compiler.cost_models.symbols import K, M, N, activations, density, value_bytes

KEPT = density * N * K
FLOPS = 2 * M * KEPT
BYTES = value_bytes * KEPT + N * ceiling(K / 8) + activations
