"""torch's own operators that are no linear layers: passes over tensors, convolutions, attention. Libraries, as in dense.py.

elementwise  each element read and written moves between a core and its second cache; all but the first input, which was written last, arrives from
             where others left it; `taps` operations for each that is written
conv2d       multiply-adds of whole registers, the weight put in blocks, and passes over input and output; of a small image, what its windows hold is
             written out before
attend       multiply-adds of both products, an exponential for each pair of a query and a key, and passes over all four tensors
"""

from __future__ import annotations

from dataclasses import replace

from sympy import Expr, Integer, Max, Piecewise, ceiling

from sparsify_compiler.cost_models.forms._base import LANES, Form, Formula, Hardware, Values, costs
from sparsify_compiler.cost_models.forms.dense import units_of
from sparsify_compiler.cost_models.symbols import E, K, M, N, block_k, block_q, fma, near, pairs, read, taps, threads, value_bytes, written, x_bytes

SMALL, WINDOW = 20480, 9  # elements of one image, and taps, up to which torch does not ask oneDNN
GRAIN = 1 << 15         # elements up to which torch leaves a pass to one thread; norms are shared by rows, functions are oneDNN's
SHARED = ("norm", "function")   # passes that all threads take part in, however few elements there are
NORM, FUNCTION = 2, 16  # operations for each element from which a pass is taken for a norm, and for a function such as GELU

operation, product, exponential, moved, reordered, unfolded = costs("operation", "product", "exponential", "moved", "reordered", "unfolded")
PASSES: Expr = moved * x_bytes * (read + written) * near / threads
FUNCTIONS = Formula(x_bytes * Max(read, written), operation * taps * written / LANES * fma / threads + PASSES)
ELEMENTWISE = replace(FUNCTIONS, work=(written, GRAIN + 1))

FMAS = M * N * K * taps / LANES
WEIGHT: Expr = value_bytes * N * K * taps
CONV = Formula(WEIGHT, (product * FMAS * fma + reordered * WEIGHT * near) / threads + PASSES)
WINDOWS = Piecewise((0, taps <= 1), (x_bytes * M * K * taps, True))     # bytes that are written out
SMALL_CONV = Formula(WEIGHT, (product * ceiling(M / LANES) * N * K * taps * fma + unfolded * WINDOWS * near) / threads + PASSES)

PRODUCTS = pairs * block_q * block_k * (ceiling(K / LANES) + ceiling(E / LANES))
ATTENTION = Formula(Integer(0), (product * PRODUCTS + exponential * pairs * block_q * block_k / LANES) * fma / threads + PASSES)

FORMULAS = {"elementwise": ELEMENTWISE, "conv2d": CONV, "small conv2d": SMALL_CONV, "attend": ATTENTION}


def offer(op: str, values: Values, dtype: str, machine: Hardware) -> list[Form]:
    """torch's form of such an op."""
    if op not in FORMULAS:
        return []
    if machine.arch == "cuda":
        return [Form("dense eager", replace(FORMULAS[op], weight=Integer(0)) if op == "elementwise" else FORMULAS[op], "gpu")]  # passes are all
    if op == "conv2d" and values["read"] <= SMALL and values["taps"] <= WINDOW:
        op = "small conv2d"
    kind, formula = _kind(op, values), FORMULAS[op]
    multiplied = dtype if op == "elementwise" else units_of(dtype, machine)
    return [Form("dense eager", FUNCTIONS if kind in SHARED else formula, f"eager {kind} {multiplied}")]


def _kind(op: str, values: Values) -> str:
    """What costs are fitted for: ops that do the same work in one way."""
    if op == "elementwise":
        return "function" if values["taps"] >= FUNCTION else "norm" if values["taps"] >= NORM else "move"
    return "conv2d 1x1" if op == "conv2d" and values["taps"] <= 1 else op
