"""Slices of 16 outputs that each keep inputs of their own (kernels/gemv.py, kernels/slice_panel.py).

gaps    a step gathers the 16 inputs of 16 weights; a slice has as many steps as its longest output, and outputs are sorted where that spares some
columns the same where gathers are slow (Zen 4): single loads in the place of the gather, and a byte more for each weight
places  n of every m inputs: a step is a permutation within one register
"""

from __future__ import annotations

import math

from sympy import Expr, ceiling, sqrt

from sparsify_compiler.cost_models import slices
from sparsify_compiler.cost_models.forms import strips
from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.symbols import K, M, N, density, fma, gather, spread, steps, threads, vectors
from sparsify_compiler.target import gathers_slowly

MOST, WIDEST, FURTHEST = 32, 16, (1 << 15) - 1
FEW = {"gaps": 3, "columns": 3, "places": 14}
ALONE = {"gaps": 1500, "columns": 1500, "places": 10_000}
SORTED = 0.25           # of the standard deviation: by how much the longest of 16 outputs exceeds the mean, sorted in windows of 256

GAPS_STEPS: Expr = slices.SLICES * ceiling((K * density + SORTED * spread * sqrt(K * density * (1 - density))) / 2) * 2
product, copied, stored = costs("product", "copied", "stored")
_beside = (copied * M * K / LANES + stored * M * slices.SLICES) * fma


def _formulas(count: Expr, weight: Expr, what: Expr, alone: float) -> dict[str, Formula]:
    weight = weight.subs(steps, count)
    panels = ceiling(M / (LANES * vectors))
    broadcast, decoded, packed, turned = costs("broadcast", "decoded", "packed", "turned")
    inner = (broadcast + product * vectors) * panels * count * LANES + decoded * panels * count + packed * panels * vectors * K
    return {"row": Formula(weight, product * M * count * what / threads + _beside, (M * count, alone)),
            "panel": Formula(weight, (inner + turned * panels * vectors * N) * fma / threads)}


GAPS = _formulas(GAPS_STEPS, slices.GAPS_BYTES, gather, ALONE["gaps"])
COLUMNS = _formulas(GAPS_STEPS, slices.COLUMNS_BYTES, gather, ALONE["columns"])
PLACES = _formulas(slices.PLACES_STEPS, slices.PLACES_BYTES, fma, ALONE["places"])


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """The kernel for a weight without blocks, where few rows are to be expected."""
    if op not in strips.OPS or values.get("r", 1) > 1 or not 0 < values["M"] <= MOST or "avx512f" not in machine.features:
        return []
    fits = op == "linear_nm" and 1 <= values["n"] <= values["m"] <= WIDEST and values["n"] <= 8
    any_mask = "columns" if gathers_slowly(machine.features) and values["K"] <= FURTHEST else "gaps"
    coding, given = ("places", {"block": _block(values)}) if fits else (any_mask, {"spread": float(op not in ("linear_condensed", "linear_nm"))})
    few = values["M"] <= FEW[coding]
    formula = {"gaps": GAPS, "columns": COLUMNS, "places": PLACES}[coding]["row" if few else "panel"]
    vectors_ = {} if few else {"vectors": 1 if values["M"] <= LANES else 2}
    return [Form(f"{op.removeprefix('linear_')}_{coding}", formula, f"{coding} {dtype} {'row' if few else 'panel'}", {**given, **vectors_})]


def _block(values: Values) -> int:
    """Steps of which each slice has a multiple: whole words of places, and whole groups of inputs."""
    return math.lcm(32 // (2 if values["m"] <= 4 else 4), int(values["n"]))
