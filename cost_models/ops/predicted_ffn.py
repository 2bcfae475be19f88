"""predicted_ffn for M rows: K inputs, `hidden` neurons with a gate of which `density` is chosen by scores that are given, N outputs."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, density, hidden, value_bytes, x_bytes

UNION = 1 - (1 - density) ** M  # of independent rows
FLOPS = 2 * M * hidden * density * (2 * K + N) + 2 * M * hidden * density
BYTES = value_bytes * hidden * UNION * (2 * K + N) + x_bytes * M * (K + N) + 4 * (M * hidden + 1)  # scores and limit are float32
