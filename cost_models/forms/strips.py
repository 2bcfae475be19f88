"""Strips of slices (kernels/strip_panel.py): a tile of up to 64 rows of x, four outputs at a time, block of columns by block of columns.

A step of a slice is 4 FMAs for each register of 16 rows of the tile, and a load of packed x for each group of outputs in it. A visit, one slice in
one block, moves the sums of its four outputs between registers and memory. x is packed once for each pair of strips of a worker.
"""

from __future__ import annotations

from sympy import Expr, Max, Piecewise, ceiling, floor

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.symbols import K, M, N, density, fma, group, near, span, threads, value_bytes, x_bytes

OPS = ("linear_csr", "linear_bitmap", "linear_condensed", "linear_nm", "linear_bsr")
MANY, ALONE, PAIRS_FROM, SLICE, TILE, HELD = 8, 12_000, 4, 4, 4, 1024
BLOCK = {1: 128, 2: 256, 4: 1024}

product, loaded, visited, begun, packed, stored, put = costs("product", "loaded", "visited", "begun", "packed", "stored", "put")
COLUMNS: Expr = density * N * K / group
STEPS = COLUMNS * group / SLICE
REGISTERS = ceiling(M / LANES)
TILES = ceiling(REGISTERS / TILE)
BLOCKS = Max(1, ceiling(K / span))
FMAS = STEPS * SLICE * REGISTERS
LOADS = COLUMNS * REGISTERS
VISITS = BLOCKS * N / SLICE * TILES
SUMS = BLOCKS * N * REGISTERS                   # registers of sums that go to memory and back
_UNITS = ceiling(N / LANES)
STRIPS = ceiling(Max(1, ceiling(_UNITS * LANES / HELD)) / threads) * threads
_OWN = floor(TILES / threads) * threads         # tiles that a worker has to itself; those left over are shared, strip by strip
PACKED = (_OWN * ceiling(STRIPS / 2) + (TILES - _OWN) * threads * ceiling(STRIPS / threads / 2)) * REGISTERS / TILES * K
WEIGHT = STEPS * SLICE * value_bytes + COLUMNS * Piecewise((1, span < 256), (2, True))

_inner = product * FMAS + loaded * LOADS + visited * SUMS + begun * VISITS
PANEL = Formula(WEIGHT, (_inner + packed * PACKED / LANES + stored * REGISTERS * N) * fma / threads + put * M * N * x_bytes * near / threads,
                (STEPS * SLICE * REGISTERS, ALONE))


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The kernel, for more than a few rows; in bfloat16 for what shares no columns with its neighbours."""
    if op not in OPS or "avx512f" not in machine.features or values["M"] <= MANY:
        return []
    if dtype == "bfloat16" and values.get("r", 1) % PAIRS_FROM == 0 and "avx512bf16" in machine.features:
        return []
    size = max(one for one in BLOCK if values.get("r", 1) % one == 0)
    return [Form(f"{op.removeprefix('linear_')}_strips{TILE}x{SLICE}", PANEL, f"strips {dtype}", {"group": size, "span": BLOCK[size]})]
