"""linear_condensed: constant fan-in."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, activations, density, index_bytes, value_bytes

KEPT = density * N * K
FLOPS = 2 * M * KEPT
BYTES = (value_bytes + index_bytes) * KEPT + activations
