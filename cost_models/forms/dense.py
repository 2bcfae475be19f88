"""Dense linear layers by torch: eager, packed by oneDNN, packed by MKL. Libraries: what they do inside is known by what they take only.

Both multiply whole registers of outputs; a layer of few rows still goes through all of W, which eager copies into blocks first (`packing`).
"""

from __future__ import annotations

from sympy import Expr, ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.symbols import K, M, N, dot, fma, near, threads, tile, value_bytes, x_bytes

product, packing, taken, put = costs("product", "packing", "taken", "put")
_BESIDE = (packing * N * K / LANES * fma + near * x_bytes * (taken * M * K + put * M * N)) / threads
WEIGHT = value_bytes * N * K
EAGER = "dense eager"
LABELS = {EAGER: "eager", "dense packed": "packed", "dense packed by MKL": "mkl"}
HALVES = {"amx-bf16": "bfloat16 tiles", "avx512bf16": "bfloat16 dots"}     # by feature, with what bfloat16 is multiplied: the fastest first


def multiplied(rows: Expr, weights: Expr, units: str) -> Expr:
    """Seconds of a core to multiply so many weights with so many rows, by the units of units_of."""
    if units.endswith("tiles"):
        return ceiling(rows / 16) * weights / (16 * 32) * tile
    return rows * weights / (2 * LANES) * dot if units.endswith("dots") else rows * weights / LANES * fma


LINEAR = {units: Formula(WEIGHT, product * multiplied(M, N * K, units) / threads + _BESIDE) for units in ("float32", *HALVES.values())}


def units_of(dtype: str, machine: Hardware) -> str:
    """With what torch multiplies on a machine: "float32" (bfloat16 is widened where nothing multiplies it), "bfloat16 dots", "bfloat16 tiles"."""
    if dtype != "bfloat16":
        return dtype
    if machine.arch == "cuda":
        return HALVES["amx-bf16"]
    return next((units for feature, units in HALVES.items() if feature in machine.features), "float32")


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """Every form of torch that there is for this dtype on this machine."""
    if op not in ("linear", "select_linear") and not op.startswith("linear_"):
        return []
    names = [EAGER]
    if machine.arch == "x86_64":
        names += ["dense packed"] + (["dense packed by MKL"] if dtype == "float32" and op != "select_linear" else [])
    units = units_of(dtype, machine)
    if machine.arch == "cuda":
        return [Form(name, LINEAR[units], "gpu") for name in names]
    return [Form(name, LINEAR[units], f"{LABELS[name]} {units} {'row' if values['M'] <= 1 else 'rows'}") for name in names]
