"""torch's own operators that are no linear layers: passes over tensors, convolutions, attention. Libraries, as in dense.py.

elementwise  each element read and written moves between a core and its second cache; `taps` operations for each that is written
conv2d       multiply-adds of whole registers, and passes over input and output
attend       multiply-adds of both products, an exponential for each pair of a query and a key, and passes over all four tensors
"""

from __future__ import annotations

from sympy import Expr, Integer, ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.symbols import E, K, M, N, block_k, block_q, fma, near, pairs, read, taps, threads, value_bytes, written, x_bytes

GRAIN = 1 << 15         # elements up to which torch leaves a pass to one thread
NORM, FUNCTION = 2, 16  # operations for each element from which a pass is taken for a norm, and for a function such as GELU

operation, product, exponential, moved = costs("operation", "product", "exponential", "moved")
PASSES: Expr = moved * x_bytes * (read + written) * near / threads
ELEMENTWISE = Formula(Integer(0), operation * taps * written / LANES * fma / threads + PASSES, (written, GRAIN))

FMAS = M * N * K * taps / LANES
CONV = Formula(value_bytes * N * K * taps, product * FMAS * fma / threads + PASSES)

PRODUCTS = pairs * block_q * block_k * (ceiling(K / LANES) + ceiling(E / LANES))
ATTENTION = Formula(Integer(0), (product * PRODUCTS + exponential * pairs * block_q * block_k / LANES) * fma / threads + PASSES)

FORMULAS = {"elementwise": ELEMENTWISE, "conv2d": CONV, "attend": ATTENTION}


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """torch's form of such an op."""
    if op not in FORMULAS:
        return []
    return [Form("dense eager", FORMULAS[op], "gpu" if machine.arch == "cuda" else f"eager {_kind(op, values)} {dtype}")]


def _kind(op: str, values: Values) -> str:
    """What costs are fitted for: ops that do the same work in one way."""
    if op == "elementwise":
        return "function" if values["taps"] >= FUNCTION else "norm" if values["taps"] >= NORM else "move"
    return "conv2d 1x1" if op == "conv2d" and values["taps"] <= 1 else op
