"""linear: dense."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, activations, value_bytes

FLOPS = 2 * M * N * K
BYTES = value_bytes * N * K + activations
