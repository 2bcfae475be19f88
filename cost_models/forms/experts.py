"""Mixtures of experts (kernels/expert_rows.py, expert_panels.py) and torch's grouped product of them.

Rows choose independently, so that how many experts have few rows, and in how many units of 16 rows the others' are, are expectations. The rows of an
expert that has few are multiplied one after the other, as the only row of a call is; how few, and with what, is the core's affair (CORES).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from sympy import Expr, Integer, Max, Rational

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.dense import multiplied, units_of
from sparsify_compiler.cost_models.forms.lanes import DOTTED
from sparsify_compiler.cost_models.forms.tiles import FEATURES
from sparsify_compiler.cost_models.ops.experts_ffn import READ
from sparsify_compiler.cost_models.symbols import K, M, N, call, chosen, dot, experts, fma, hidden, near, threads, tile, value_bytes, x_bytes

OP, OURS, GROUPED = "experts_ffn", "chosen experts", "torch grouped_mm"
STEP = {"float32": 16, "bfloat16": 32}      # widths that the kernel takes are multiples

product, alone, loaded, activated, ordered, packed, put, taken, packing, each, asked = costs(
    "product", "alone", "loaded", "activated", "ordered", "packed", "put", "taken", "packing", "each", "asked")
PLACES = M * chosen
WEIGHTS = hidden * (2 * K + N)                      # of an expert
WEIGHT = value_bytes * READ * WEIGHTS


@dataclass(frozen=True)
class Core:
    """How a kernel multiplies.

    each    weights of a word that is multiplied with a unit's 16 rows
    unit    seconds of that
    few     rows up to which an expert's go one by one
    across  units for which a weight is loaded once
    """

    each: int
    unit: Expr
    few: int
    across: int


CORES = {"fma": Core(1, fma, 4, 3), "dots": Core(2, dot, 8, 3), "tiles": Core(2, tile / 256, 0, 2)}


def few_of(most: int) -> tuple[Expr, Expr]:
    """Experts that one to `most` rows choose, and the places of those rows."""
    share, ways, number, places = chosen / experts, Integer(1), Integer(0), Integer(0)
    for rows in range(1, most + 1):
        ways = ways * Max(M - rows + 1, 0) / rows
        found = experts * ways * share**rows * (1 - share) ** Max(M - rows, 0)
        number, places = number + found, places + rows * found
    return number, places


def units_of_many(most: int) -> tuple[Expr, Expr]:
    """Experts that more rows choose, and the units of 16 of their rows, the last of which is half full on the average."""
    number, places = few_of(most)
    many = Max(0, READ - number)
    return many, Max(many, (PLACES - places) / LANES + Rational(LANES - 1, 2 * LANES) * many)


ROW_FMAS = PLACES * WEIGHTS / LANES
_BESIDE: Expr = activated * PLACES * hidden / LANES * fma / threads + ordered * PLACES / LANES * fma


def _row(core: Core) -> Formula:
    return Formula(WEIGHT, product * ROW_FMAS / core.each * core.unit / threads + _BESIDE)


def _rows(core: Core) -> Formula:
    (many, units), (_, places) = units_of_many(core.few), few_of(core.few)
    weights = (alone * places / LANES + product * units) * WEIGHTS / core.each * core.unit
    loads = loaded * Max(many, (units + many) / core.across) * WEIGHTS / core.each
    return Formula(WEIGHT, (weights + (loads + packed * units * K + put * PLACES * N / LANES) * fma) / threads + _BESIDE)


@cache
def _ours(row: str, core: str) -> Formula:
    """Of the kernel for one row or for several. Made when it is asked for: of many rows it takes sympy a second, and most models have no experts."""
    return (_row if row == "row" else _rows)(CORES[core])


def _grouped(units: str) -> Formula:
    """torch's: rows in the order of their experts, a product for each expert, be it of no rows, and the sums put back."""
    moved = taken * x_bytes * near * PLACES * (K + 2 * hidden + N) + packing * READ * WEIGHTS / LANES * fma
    return Formula(WEIGHT, (product * multiplied(PLACES, WEIGHTS, units) + moved) / threads + _BESIDE + (each * READ + asked * experts) * call)


def core_of(dtype: str, machine: Hardware) -> str:
    """What multiplies in the kernel for several rows: of CORES."""
    if dtype == "float32":
        return "fma"
    if set(FEATURES) <= set(machine.features):
        return "tiles"
    return "fma" if DOTTED.isdisjoint(machine.features) else "dots"


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """Ours, for widths of whole vectors, and torch's. With tiles one row of bfloat16 is widened."""
    if op != OP or machine.arch == "cuda":
        return []
    units, row = units_of(dtype, machine), "row" if values["M"] <= 1 else "rows"
    found = [Form(GROUPED, _grouped(units), f"grouped_mm {units}")]
    step, core = STEP[dtype], core_of(dtype, machine)
    if values["K"] % step or values["hidden"] % step or (dtype == "bfloat16" and values["N"] % step):
        return found
    if row == "row" and core == "tiles":
        core = "fma"
    return [*found, Form(OURS, _ours(row, core), f"experts {dtype} {core} {row}")]
