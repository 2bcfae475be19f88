"""attend_blocks: a product with the keys and one with the values for each pair of blocks that is listed, batch and heads counted."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import E, K, M, block_k, block_q, listed, pairs, read, written, x_bytes

FLOPS = 2 * pairs * block_q * block_k * (K + E)
BYTES = x_bytes * (read + written) + 4 * (listed + M)  # indices and counts; the log of each row's sum is float32
