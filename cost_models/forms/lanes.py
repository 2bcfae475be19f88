"""The kernels whose vectors run along outputs of a group (kernels/rows.py) or along rows of x (kernels/panel.py).

rows   a column of a group is one FMA of `group` lanes; of groups of one output, four columns are one FMA of four lanes
panel  a column of a group is group * vectors FMAs, vectors loads of packed x and group broadcasts of a weight; bfloat16 groups of four and more
       multiply two columns with one instruction
"""

from __future__ import annotations

from sympy import Expr, Piecewise, Rational, ceiling

from sparsify_compiler.cost_models.forms import strips
from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.symbols import K, M, N, density, dot, fma, group, threads, value_bytes, vectors

FEW_ROWS = {1: 1, 2: 2, 4: 4, 8: 6, 16: 8}      # rows up to which `rows` runs, by group
SCHEDULES = {16: (1,), 8: (2, 1), 4: (4, 2), 2: (2, 4), 1: (2, 4)}
ALONE = 12_000
DOT_FROM = 4
DOTTED = {"avx512bf16", "bf16"}      # features of which one multiplies pairs

index: Expr = Piecewise((2, K < 32767), (4, True))
COLUMNS: Expr = density * N * K / group
WEIGHT = COLUMNS * (group * value_bytes + index)
GROUPS = ceiling(N / LANES) * LANES / group

step, begun, copied = costs("step", "begun", "copied")
_steps = M * COLUMNS * Piecewise((Rational(1, 4), group < 2), (1, True))
ROWS = Formula(WEIGHT, (step * _steps + begun * M * GROUPS) * fma / threads + copied * M * K / LANES * fma, (M * COLUMNS, ALONE))

product, loaded, column, opened, packed, stored = costs("product", "loaded", "column", "opened", "packed", "stored")
PANELS = ceiling(M / (LANES * vectors))
FMAS = COLUMNS * group * vectors * PANELS
LOADS = COLUMNS * vectors * PANELS


def _panel(products: Expr, wide: bool) -> Formula:
    inner = loaded * LOADS + column * COLUMNS * PANELS + opened * GROUPS * PANELS
    beside = packed * PANELS * vectors * K + stored * PANELS * vectors * N
    return Formula(WEIGHT, (product * products + (inner + beside) * fma) / threads, None if wide else (ceiling(M / LANES) * group * COLUMNS, ALONE))


PANEL, DOTS = ({wide: _panel(products, wide) for wide in (False, True)} for products in (FMAS * fma, FMAS / 2 * dot))


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """What lanes.offer offers: nothing where strips are always at least as fast."""
    if op not in strips.OPS or (dtype == "float32" and values["M"] > strips.MANY and strips.offer(op, values, dtype, machine)):
        return []
    size = group_of(values, (1, 2, 4, 8, 16))
    schedules = SCHEDULES[size] if values["M"] > LANES else SCHEDULES[size][:1]
    return [_form(f"{op.removeprefix('linear_')}_r{size}v{count}", size, count, values["M"], dtype, machine) for count in schedules]


def group_of(values: Values, sizes: tuple[int, ...]) -> int:
    """The largest of these that divides the outputs of a block."""
    return max(size for size in sizes if values.get("r", 1) % size == 0)


def _form(name: str, size: int, count: int, rows: float, dtype: str, machine: Hardware) -> Form:
    if rows <= FEW_ROWS[size]:
        return Form(name, ROWS, f"rows {dtype} {'one' if size == 1 else 'group'}", {"group": size})
    tiles = -(-int(rows) // LANES)
    wide = count if count > 1 and (tiles % count == 0 or tiles >= 4 * count) else 1
    dot = dtype == "bfloat16" and size >= DOT_FROM and not DOTTED.isdisjoint(machine.features)
    several = "bfloat16 dot" if dot else "float32 group"    # which bfloat16 is widened to
    key = f"panel {f'{dtype} one' if size == 1 else several}"
    return Form(name, (DOTS if dot else PANEL)[wide > 1], key, {"group": size, "vectors": wide})
