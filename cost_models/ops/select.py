"""select: M rows of K inputs; a difference, a magnitude, a product and a comparison for each, and a limit, a scale and a centre to read."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, value_bytes, x_bytes

FLOPS = 4 * M * K
BYTES = 2 * x_bytes * M * K + 2 * value_bytes * K + value_bytes
