"""select_inputs_ffn for M rows: K inputs, `hidden` neurons with a gate, N outputs; `density` of the inputs of each linear is selected."""

from __future__ import annotations

from sparsify_compiler.cost_models.symbols import K, M, N, density, hidden, value_bytes, x_bytes

UNION = 1 - (1 - density) ** M  # of independent rows
INPUTS = 2 * K + hidden         # of the three linears
FLOPS = 2 * M * hidden * density * (2 * K + N) + 4 * M * INPUTS + 2 * M * hidden
BYTES = value_bytes * hidden * UNION * (2 * K + N) + x_bytes * M * (K + N) + value_bytes * (2 * INPUTS + 3)
