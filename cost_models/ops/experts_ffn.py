"""experts_ffn, gated, for M rows that choose `chosen` of `experts` each, independently: K inputs, `hidden` neurons of an expert, N outputs."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, chosen, experts, hidden, value_bytes, x_bytes

READ = experts * (1 - (1 - chosen / experts) ** M)  # experts that some row chose
FLOPS = 2 * M * chosen * hidden * (2 * K + N) + 2 * M * chosen * hidden + 2 * M * chosen * N
BYTES = value_bytes * READ * hidden * (2 * K + N) + x_bytes * M * (K + N) + M * chosen * (8 + x_bytes)
