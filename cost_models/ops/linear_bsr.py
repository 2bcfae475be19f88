"""linear_bsr: blocks of r outputs × c inputs; the last block row is padded to r."""

from __future__ import annotations

from sympy import ceiling

from sparsify_compiler.cost_models.symbols import K, M, N, activations, c, density, index_bytes, pointer_bytes, r, value_bytes

BLOCK_ROWS = ceiling(N / r)
BLOCKS = density * BLOCK_ROWS * K / c
FLOPS = 2 * M * BLOCKS * r * c
BYTES = (value_bytes * r * c + index_bytes) * BLOCKS + pointer_bytes * (BLOCK_ROWS + 1) + activations
