"""Strips of slices (kernels/strip_panel.py): a tile of up to 64 rows of x, four outputs at a time, block of columns by block of columns.

Where columns are pairs of inputs (2:4 in bfloat16 without tiles), there are half as many, of a word each, and six of them for every four inputs.

A step of a slice is 4 FMAs for each register of 16 rows of the tile, and a load of packed x for each group of outputs in it. A visit, one slice in
one block, moves the sums of its four outputs between registers and memory. x is packed once for each pair of strips of a worker.
"""

from __future__ import annotations

from sympy import Expr, Max, Piecewise, ceiling, floor

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.dense import units_of
from sparsify_compiler.cost_models.symbols import K, M, N, density, dot, fma, group, near, span, threads, value_bytes, x_bytes

OPS = ("linear_csr", "linear_bitmap", "linear_condensed", "linear_nm", "linear_bsr")
MANY, ALONE, PAIRS_FROM, SLICE, TILE, HELD = 8, 12_000, 4, 4, 4, 1024
BLOCK = {1: 128, 2: 256, 4: 1024}
SMALL, NARROW = 3 << 19, 512    # bytes of a second cache below which blocks of four outputs are narrower, and how wide they are then
SPAN_OF_PAIRS = 64      # inputs of a block

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
PAIRS = density * N * K / 2
PAIRS_WEIGHT = PAIRS * (4 + 1)


def _panel(weight: Expr, multiplied: Expr, loads: Expr, packs: Expr, products: Expr) -> Formula:
    beside = loaded * loads + visited * SUMS + begun * VISITS + packed * packs / LANES + stored * REGISTERS * N
    return Formula(weight, (multiplied + beside * fma + put * M * N * x_bytes * near) / threads, (products, ALONE))


PANEL = _panel(WEIGHT, product * FMAS * fma, LOADS, PACKED, FMAS)
PAIRED = _panel(PAIRS_WEIGHT, product * PAIRS * REGISTERS * dot, PAIRS * REGISTERS, PACKED * 6 / 4, PAIRS * REGISTERS)


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The kernel, for more than a few rows; in bfloat16 for what shares no columns with its neighbours."""
    if op not in OPS or "avx512f" not in machine.features or values["M"] <= MANY:
        return []
    if dtype == "bfloat16" and values.get("r", 1) % PAIRS_FROM == 0 and "avx512bf16" in machine.features:
        return []
    if op == "linear_nm" and (values["n"], values["m"]) == (2, 4) and units_of(dtype, machine) == "bfloat16 dots":
        return [Form(f"nm_pairs{TILE}x{SLICE}", PAIRED, "strips bfloat16 pairs", {"group": 1, "span": SPAN_OF_PAIRS})]
    size = max(one for one in BLOCK if values.get("r", 1) % one == 0)
    span = NARROW if size == SLICE and machine.second_cache < SMALL else BLOCK[size]
    return [Form(f"{op.removeprefix('linear_')}_strips{TILE}x{SLICE}", PANEL, f"strips {dtype}", {"group": size, "span": span})]
