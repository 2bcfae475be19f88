"""held_ffn, gated, on M rows of a text that goes on: K inputs, `hidden` neurons of which `density` is held, N outputs."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, density, hidden, value_bytes, x_bytes

FLOPS = 2 * M * hidden * density * (2 * K + N) + 2 * M * hidden * density
BYTES = value_bytes * hidden * density * (2 * K + N) + x_bytes * M * (K + N)
