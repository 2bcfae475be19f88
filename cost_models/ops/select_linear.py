"""select_linear for one row: `density` of the K inputs is selected, and only their N weights are read; more rows read the union of theirs."""

from __future__ import annotations

from sparsify_compiler.cost_models.ops import select
from sparsify_compiler.cost_models.symbols import K, M, N, activations, density, value_bytes

UNION = 1 - (1 - density) ** M  # of independent rows
FLOPS = 2 * M * N * K * density + select.FLOPS
BYTES = value_bytes * N * K * UNION + activations + 2 * value_bytes * K + value_bytes
