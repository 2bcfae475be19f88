"""top_pages: what is kept of pages (M rows of K numbers, over batch and groups) is multiplied with each of `group` heads, and blocks are listed."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, group, listed, read, x_bytes

FLOPS = 2 * M * K * group
BYTES = 4 * M * K + x_bytes * read + 4 * listed  # sums are float32; read: elements of queries, and of keys of pages of which nothing is kept
