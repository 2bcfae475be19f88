"""Dense linear layers by torch: eager, packed by oneDNN, packed by MKL. Libraries: what they do inside is known by what they take only.

Both multiply whole registers of outputs; a layer of few rows still goes through all of W, which eager copies into blocks first (`packing`).
"""

from __future__ import annotations

from sympy import ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.symbols import K, M, N, fma, near, threads, tile, value_bytes, x_bytes

product, packing, taken, put = costs("product", "packing", "taken", "put")
_BESIDE = (packing * N * K / LANES * fma + near * x_bytes * (taken * M * K + put * M * N)) / threads
WEIGHT = value_bytes * N * K
VECTORS = Formula(WEIGHT, product * M * N * K / LANES * fma / threads + _BESIDE)
TILES = Formula(WEIGHT, product * ceiling(M / 16) * N * K / (16 * 32) * tile / threads + _BESIDE)
HALF = {"bfloat16": "amx-bf16"}     # the feature with which matrix units multiply it
LABELS = {"dense eager": "eager", "dense packed": "packed", "dense packed by MKL": "mkl"}


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """Every form of torch that there is for this dtype on this machine."""
    if op not in ("linear", "select_linear") and not op.startswith("linear_"):
        return []
    names = ["dense eager"]
    if machine.arch == "x86_64":
        names += ["dense packed"] + (["dense packed by MKL"] if dtype == "float32" and op != "select_linear" else [])
    return [form_of(name, values["M"], dtype, machine) for name in names]


def form_of(name: str, rows: float, dtype: str, machine: Hardware) -> Form:
    """One of torch's forms for so many rows."""
    if machine.arch == "cuda":
        return Form(name, TILES if dtype == "bfloat16" else VECTORS, "gpu")
    formula = TILES if HALF.get(dtype) in machine.features else VECTORS
    return Form(name, formula, f"{LABELS[name]} {dtype} {'row' if rows <= 1 else 'rows'}")
