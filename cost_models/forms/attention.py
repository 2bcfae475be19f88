"""Attention by blocks (kernels/attend_panel.py, attend_few.py), in float32, and in bfloat16 where no tiles multiply it.

For many query rows these are the lanes: each number of a key or value that is listed is multiplied with as many registers of rows as a block fills.
bfloat16 is widened for it, some heads at a time. For a few, what is listed is read from memory once for the heads that share it, as it lies.
"""

from __future__ import annotations

from dataclasses import replace

from sympy import Expr, Integer, Max, ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.dense import units_of
from sparsify_compiler.cost_models.symbols import (
    E,
    K,
    M,
    block_k,
    block_q,
    call,
    dot,
    fma,
    group,
    listed,
    near,
    pairs,
    read,
    threads,
    vectors,
    written,
    x_bytes,
)

OP = "attend_blocks"
FEW, MANY = 8, 32       # query rows of a block: up to which keys are read once for all; above which four registers of them run at a time
WIDE = 1 << 21          # numbers that are widened at a time
HALVES = {"avx512f", "avx512dq", "avx512bf16"}      # features with which few rows are multiplied in bfloat16

product, exponential, packed, streamed, indexed, merged, widened, begun = costs(
    "product", "exponential", "packed", "streamed", "indexed", "merged", "widened", "begun")
REGISTERS: Expr = ceiling(block_q / (LANES * vectors)) * vectors        # of query rows, full or not
KEYS = pairs * block_k
FMAS = KEYS * REGISTERS * (K + E)
POWERS = KEYS * REGISTERS
READ = 4 * KEYS * ceiling(block_q / (LANES * vectors)) * (K + E)        # bytes of keys and values, float32, from a near cache
PANEL = Formula(Integer(0), ((product * FMAS + exponential * POWERS + packed * M * (K + E) / LANES + indexed * listed) * fma
                                  + streamed * READ * near) / threads)
COPIED = (4 + x_bytes) * (read + written)       # bytes that are read and written where numbers are widened
WIDENED = replace(PANEL, compute=PANEL.compute + widened * COPIED * near / threads + begun * Max(1, ceiling((read + written) / WIDE)) * call)
CACHED = x_bytes * KEYS / group * (K + E)
PRODUCTS = KEYS * block_q / LANES


def _rows(keys: Expr) -> Formula:
    beside = (exponential * PRODUCTS + indexed * listed) * fma
    return Formula(CACHED, (product * PRODUCTS * (keys + E * fma) + beside) / threads + merged * M * E / LANES * fma)


ROWS, DOTS = _rows(K * fma), _rows(K / 2 * dot)         # values are widened


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The kernel. `group`: heads that share keys and their list, 1 unless given."""
    if op != OP or machine.arch == "cuda":
        return []
    if values["block_q"] <= FEW:
        if dtype == "bfloat16" and not set(machine.features) >= HALVES:
            return []
        formula = DOTS if dtype == "bfloat16" else ROWS
        return [Form("blocks", formula, f"attend_few {dtype}", {"group": values.get("group", 1)})]
    if units_of(dtype, machine).endswith("tiles"):
        return []
    count = 4 if values["block_q"] > MANY else 2
    return [Form("blocks", PANEL if dtype == "float32" else WIDENED, f"attend_panel {dtype} v{count}", {"vectors": count})]
