"""Mixtures of experts (kernels/expert_rows.py, expert_panels.py) and torch's grouped product of them.

Rows choose independently, so that how many experts are read, and in how many units of 16 rows, are expectations. Where an expert has a handful of
rows they are multiplied one after the other, as the only row of a call is.
"""

from __future__ import annotations

from sympy import Expr, Max, Rational, ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.dense import multiplied, units_of
from sparsify_compiler.cost_models.ops.experts_ffn import READ
from sparsify_compiler.cost_models.symbols import K, M, N, call, chosen, compiled, fma, hidden, near, threads, value_bytes, x_bytes

OP, OURS, GROUPED = "experts_ffn", "chosen experts", "torch grouped_mm"
FEW = 4             # rows of an expert, on the average, that are multiplied one after the other
ACROSS = 3          # units for which a weight is loaded once
STEP = 16           # widths that the kernel takes are multiples

product, loaded, activated, ordered, packed, put, taken, each = costs("product", "loaded", "activated", "ordered", "packed", "put", "taken", "each")
PLACES = M * chosen
WEIGHTS = hidden * (2 * K + N)                      # of an expert
EACH = PLACES / READ                                # rows of an expert that has some
UNITS = READ * Max(1, EACH / LANES + Rational(LANES - 1, 2 * LANES))
WEIGHT = value_bytes * READ * WEIGHTS
_BESIDE: Expr = activated * PLACES * hidden / LANES * fma / threads + ordered * PLACES / LANES * fma
ROW_FMAS = PLACES * WEIGHTS / LANES
UNIT_FMAS = UNITS * WEIGHTS
LOADS = READ * ceiling(UNITS / READ / ACROSS) * WEIGHTS
ROWS = Formula(WEIGHT, product * ROW_FMAS * fma / threads + _BESIDE)
PANELS = Formula(WEIGHT, (product * UNIT_FMAS + loaded * LOADS + packed * UNITS * K + put * PLACES * N / LANES) * fma / threads + _BESIDE)


def _grouped(units: str) -> Formula:
    """torch's: rows in the order of their experts, products, and the sums put back."""
    moved = taken * x_bytes * near * PLACES * (K + 2 * hidden + N)
    return Formula(WEIGHT, (product * multiplied(PLACES, WEIGHTS, units) + moved) / threads + _BESIDE + each * READ * call)


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """Ours in float32 (in bfloat16 none was timed), and torch's."""
    if op != OP or machine.arch == "cuda":
        return []
    units = units_of(dtype, machine)
    found = [Form(GROUPED, _grouped(units), f"grouped_mm {units} {'row' if values['M'] <= 1 else 'rows'}")]
    if dtype != "float32" or values["K"] % STEP or values["hidden"] % STEP:
        return found
    if values["M"] <= 1:
        return [*found, Form(OURS, ROWS, "experts float32 row")]
    few = compiled(EACH)(values) <= FEW
    return [*found, Form(OURS, ROWS if few else PANELS, f"experts float32 {'few' if few else 'panels'}")]
