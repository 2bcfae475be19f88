"""AMX tiles (kernels/tiles.py): chunks of 32 kept inputs of a group of outputs, times panels of 16 or 32 rows of x.

A chunk is one or two tiles of W; unless its inputs are neighbours, 32 packed rows of x are gathered and interleaved for it. A dense weight is groups
of 32 outputs whose chunks are all neighbours.
"""

from __future__ import annotations

from sympy import Expr, Integer, Min, Piecewise, ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.strips import OPS
from sparsify_compiler.cost_models.symbols import K, M, N, c, density, fma, group, threads, tile, vectors

FEATURES = ("amx-tile", "amx-bf16", "avx512bf16")
SIZES = (32, 16, 8, 4)
DEPTH, ALONE = 32, 300

product, gathered, packed, stored, begun = costs("product", "gathered", "packed", "stored", "begun")
GROUPS = ceiling(N / group)
TILES = ceiling(group / 16)                      # of one chunk
PANELS = ceiling(M / (LANES * vectors))


def _formula(chunks: Expr, gathers: Expr, index: int) -> Formula:
    each = product * TILES * vectors + gathered * gathers * vectors
    beside = packed * PANELS * vectors * K + stored * PANELS * vectors * GROUPS * group + begun * GROUPS * PANELS
    return Formula(chunks * (2 * DEPTH * group + index), (each * chunks * PANELS * tile + beside * fma) / threads,
                   (chunks * TILES * ceiling(M / LANES), ALONE))


# A row keeps a number of blocks that varies: on the average its last chunk is filled by half, or whole where a block is.
SPARSE_CHUNKS = GROUPS * (K * density + Piecewise((0, c >= DEPTH), (0.5 * (DEPTH - c), True)) * Min(1, K * density)) / DEPTH
DENSE_CHUNKS = GROUPS * K / DEPTH
SPARSE = _formula(SPARSE_CHUNKS, Piecewise((0, c >= DEPTH), (1, True)), 2 * DEPTH)
DENSE = _formula(DENSE_CHUNKS, Integer(0), 2)


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The dense form, and the sparse one of blocks of at least four outputs."""
    if dtype != "bfloat16" or not set(FEATURES) <= set(machine.features):
        return []
    across = {"vectors": 1 if values["M"] <= LANES else 2}
    found = []
    if (op in OPS or op in ("linear", "select_linear")) and values["K"] % DEPTH == 0:
        found.append(Form("dense amx", DENSE, "tiles dense", {"group": max(SIZES), **across}))
    size = next((one for one in SIZES if op == "linear_bsr" and values["r"] % one == 0), None)
    if size is not None:
        found.append(Form(f"bsr_amx_r{size}", SPARSE, "tiles sparse", {"group": size, **across}))
    return found
