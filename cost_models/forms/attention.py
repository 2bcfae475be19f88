"""Attention by blocks (kernels/attend_panel.py, attend_few.py), in float32.

For many query rows these are the lanes: each number of a key or value that is listed is multiplied with as many registers of rows as a block fills.
For a few, what is listed is read from memory once for the heads that share it.
"""

from __future__ import annotations

from sympy import Expr, Integer, ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.symbols import E, K, M, block_k, block_q, fma, group, listed, near, pairs, threads, vectors, x_bytes

OP = "attend_blocks"
FEW, MANY = 8, 32       # query rows of a block: up to which keys are read once for all; above which four registers of them run at a time

product, exponential, packed, streamed, indexed, merged = costs("product", "exponential", "packed", "streamed", "indexed", "merged")
REGISTERS: Expr = ceiling(block_q / (LANES * vectors)) * vectors        # of query rows, full or not
KEYS = pairs * block_k
FMAS = KEYS * REGISTERS * (K + E)
POWERS = KEYS * REGISTERS
READ = x_bytes * KEYS * ceiling(block_q / (LANES * vectors)) * (K + E)  # bytes of keys and values, from a near cache
PANEL = Formula(Integer(0), ((product * FMAS + exponential * POWERS + packed * M * (K + E) / LANES + indexed * listed) * fma
                                  + streamed * READ * near) / threads)
CACHED = x_bytes * KEYS / group * (K + E)
ROWS = Formula(CACHED, (product * KEYS * block_q * (K + E) / LANES + exponential * KEYS * block_q / LANES + indexed * listed) * fma / threads
               + merged * M * E / LANES * fma)


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The kernel. `group`: heads that share keys and their list, 1 unless given."""
    if op != OP or dtype != "float32" or machine.arch == "cuda":
        return []
    if values["block_q"] <= FEW:
        return [Form("blocks", ROWS, "attend_few float32", {"group": values.get("group", 1)})]
    count = 4 if values["block_q"] > MANY else 2
    return [Form("blocks", PANEL, f"attend_panel float32 v{count}", {"vectors": count})]
