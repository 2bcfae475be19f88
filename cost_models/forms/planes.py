"""Sparse convolutions: over planes, where pixels are the lanes (kernels/planes.py); 1×1 ones in bfloat16 as linear layers over pixels (pixels.py).

A column of a group of outputs is an index, its weights, and a load of each of a tile's registers of pixels, each multiplied with every weight. A
visit is a group on one tile, in one chunk of the columns; sums go to memory between chunks. A register that does not begin at a line of the cache
lies in two. But for 1×1 kernels x is copied first, padded, so that rows of pixels are longer than those of y, which are written piece by piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sympy import Expr, Max, Piecewise, ceiling, floor, sqrt

from sparsify_compiler.cost_models.forms import eager, lanes, strips, tiles
from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.dense import units_of
from sparsify_compiler.cost_models.symbols import (
    K,
    M,
    N,
    density,
    fma,
    group,
    near,
    read,
    span,
    taps,
    threads,
    value_bytes,
    vectors,
    written,
    x_bytes,
)

DENSE, SPARSE = "conv2d", "conv2d_"
TILES_OF: Mapping[int, tuple[int, ...]] = {1: (8, 4), 2: (6,), 4: (4,), 8: (3,)}     # of outputs that share columns: registers of pixels in a tile
CHUNKED, CHUNKED_FROM, ALONE = (512, 1024), 384, 12_000
HELD = 640          # registers of x in the first cache
PIXELS = (tiles, strips, lanes)

product, loaded, crossed, column, opened, visited, fetched, taken, copied, placed, put = costs(
    "product", "loaded", "crossed", "column", "opened", "visited", "fetched", "taken", "copied", "placed", "put")
INPUTS = K * taps
COLUMNS: Expr = density * N * INPUTS / group
SIDE = sqrt(M)                                          # of a square image
COMPUTED = M + (SIDE - 1) * (sqrt(taps) - 1)              # those between the rows of y are computed in vain
REGISTERS = ceiling(COMPUTED / LANES)
TILES = ceiling(REGISTERS / vectors)
FMAS = COLUMNS * group * REGISTERS
LOADS = COLUMNS * REGISTERS
CHUNKS = Max(1, ceiling(INPUTS / span))
GROUPS = ceiling(N / group)
VISITS = CHUNKS * GROUPS * TILES
SUMS = (CHUNKS - 1) * GROUPS * group * REGISTERS        # registers of sums that go to memory and back
WEIGHT = COLUMNS * (group * 4 + 4)                      # float32, whatever is stored
ASTRIDE = LOADS * Max(ceiling(M / LANES) - floor(M / LANES), Piecewise((0, taps <= 1), (1, True)))     # loads of two lines
FETCHED = Piecewise((4 * LANES * (LOADS + ASTRIDE), span * vectors > HELD), (0, True))    # bytes from the second cache, if not the first
PIECES = N * (SIDE * ceiling(SIDE / LANES) + TILES)
_STEPS = product * FMAS + loaded * LOADS + crossed * ASTRIDE + column * COLUMNS * TILES + opened * VISITS + visited * SUMS
_MOVED = x_bytes * (put * written + taken * read) + fetched * FETCHED
PLAIN = Formula(WEIGHT, (_STEPS * fma + _MOVED * near) / threads, (FMAS, ALONE))
COPIED = replace(PLAIN, compute=((_STEPS + placed * PIECES) * fma + (_MOVED + copied * x_bytes * read) * near) / threads)
PACKED = Formula(value_bytes * N * INPUTS, eager.CONV.compute)


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The dense form that is packed ahead, where there is one; of a sparse convolution torch's other one too, and the kernels."""
    if op != DENSE and not op.startswith(SPARSE):
        return []
    pointwise, dense = values["taps"] <= 1, [] if op == DENSE else eager.offer(DENSE, values, dtype, machine)
    if machine.arch == "x86_64":
        dense.append(Form("dense packed", PACKED, f"packed conv2d{' 1x1' if pointwise else ''} {units_of(dtype, machine)}"))
    if op == DENSE or machine.arch == "cuda":
        return dense
    if dtype == "bfloat16":
        return dense + (_pixels(op, values, machine) if pointwise else [])
    return dense + _planes(op.removeprefix(SPARSE), values, PLAIN if pointwise else COPIED)


def _pixels(op: str, values: Values, machine: Hardware) -> list[Form]:
    linear = f"linear_{op.removeprefix(SPARSE)}"
    found = [form for family in PIXELS for form in family.offer(linear, values, "bfloat16", machine) if not form.name.startswith("dense")]
    return [replace(form, name=f"pixels {form.name}", borrowed=True) for form in found]


def _planes(name: str, values: Values, formula: Formula) -> list[Form]:
    inputs, size = int(values["K"] * values["taps"]), max(size for size in TILES_OF if values.get("r", 1) % size == 0)
    cut = [(count, inputs) for count in TILES_OF[size]]
    if size == 1 and inputs >= CHUNKED_FROM:
        cut += [(count, chunk // count) for chunk in CHUNKED for count in TILES_OF[size]]
    key = f"planes {'one' if size == 1 else 'group'}"
    return [Form(f"planes {name}_r{size}v{count}{f'c{chunk}' if chunk < inputs else ''}", formula, key,
                 {"group": size, "vectors": count, "span": chunk}) for count, chunk in cut]
