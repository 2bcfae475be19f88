"""select_ffn for one row: K inputs, `hidden` neurons of which `density` is selected, N outputs; the gate is always computed, all of it."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, density, hidden, value_bytes, x_bytes

UNION = 1 - (1 - density) ** M  # of independent rows
FLOPS = 2 * M * hidden * (K + density * (K + N)) + 3 * M * hidden + M * hidden * density
BYTES = value_bytes * hidden * (K + UNION * (K + N)) + x_bytes * M * (K + N) + value_bytes * (hidden + 1)
