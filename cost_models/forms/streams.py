"""dense by output (kernels/stream_rows.py): 16 outputs at a time, each row of x with their weights while they are in the cache."""

from __future__ import annotations

from sympy import ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.symbols import K, M, N, fma, threads, value_bytes

product, copied, turned = costs("product", "copied", "turned")
OUTPUTS = LANES * ceiling(N / LANES)            # the last weights are read again for what hangs over
FMAS = M * OUTPUTS * K / LANES
ROWS = Formula(value_bytes * N * K, (product * FMAS + turned * M * OUTPUTS / LANES) * fma / threads + copied * M * K / LANES * fma)
FEW_ROWS = 2


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The kernel, for few rows of whole vectors."""
    dense = op in ("linear", "select_linear") or op.startswith("linear_")
    step = LANES * (2 if dtype == "bfloat16" else 1)
    if not dense or "avx512f" not in machine.features or values["M"] > FEW_ROWS or values["K"] % step or not values["K"]:
        return []
    return [Form("dense by output", ROWS, f"streams {dtype}")]
