"""The symbols that every formula is written in: one table, with their meaning and unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import sympy
from sympy import Expr, Piecewise, Symbol

TABLE: Mapping[str, str] = {
    "M": "rows of the input: product of all its dimensions but the last; for a convolution, places of its output",
    "N": "outputs of a linear layer or convolution",
    "K": "inputs of a linear layer, or of one group of a convolution",
    "hidden": "neurons of an FFN, or of one expert",
    "experts": "FFNs of which each row chooses some",
    "chosen": "FFNs that a row chooses",
    "density": "kept / total weights; for blocks kept / total blocks",
    "value_bytes": "bytes of one stored weight",
    "x_bytes": "bytes of one input or output element",
    "r": "outputs of a block",
    "c": "inputs of a block",
    "n": "kept inputs of a group",
    "m": "inputs of a group",
    "steps": "vectors of 16 weights, one for each output of a slice, padding included",
    "block": "steps of which each slice has a multiple",
    "group": "outputs that share their columns in a kernel's layout",
    "vectors": "registers of 16 rows of x that a kernel multiplies at a time",
    "spread": "1 where outputs keep as many inputs as chance has it, 0 where all keep the same number",
    "span": "columns of a block of a kernel's layout",
    "taps": "places of a kernel, or operations for each element of the result",
    "pairs": "pairs of a block of query rows and a block of keys that attention computes, over batch and heads",
    "block_q": "query rows of a block",
    "block_k": "keys of a block",
    "E": "columns of a value of attention; K are those of a query and a key, M the query rows over batch and heads",
    "listed": "int32 numbers in the index tensors of a layout",
    "read": "elements of all inputs that are no weights",
    "written": "elements of the result",
    "call": "seconds that Python takes to call a kernel",
    "threads": "cores that take part in a call",
    "wake": "seconds until the other threads have begun, and the last has ended; 0 on one thread",
    "fma": "seconds that a core takes for 16 multiply-adds of float32",
    "dot": "seconds that a core takes for 32 multiply-adds of bfloat16, pairs in vectors",
    "tile": "seconds that a core takes for a product of 16x16x32 in bfloat16",
    "gather": "seconds that a core takes to fetch 16 numbers from anywhere in its first cache",
    "cold": "seconds that a call takes longer when other layers have displaced its code and data",
    "arrive": "seconds for a byte of the weight to arrive from where it lies, all threads together",
    "near": "seconds for a byte to arrive from the second cache of a core",
}

# What is measured in seconds: any cost is proportional to all of these together.
TIMES = ("call", "wake", "fma", "dot", "tile", "gather", "cold", "arrive", "near")

NATURAL = ("threads", "group", "vectors", "span", "M", "N", "K", "r", "c", "n", "m", "hidden", "steps", "block", "taps", "read", "written", "pairs",
           "block_q", "block_k", "E", "listed", "experts", "chosen")
(threads, group, vectors, span, M, N, K, r, c, n, m, hidden, steps, block, taps, read, written, pairs, block_q, block_k, E, listed, experts,
 chosen) = (
    Symbol(name, integer=True, nonnegative=True) for name in NATURAL)
density, spread, value_bytes, x_bytes = (Symbol(name, nonnegative=True) for name in ("density", "spread", "value_bytes", "x_bytes"))
call, wake, fma, dot, tile, gather, cold, arrive, near = (Symbol(name, nonnegative=True) for name in TIMES)

index_bytes: Expr = Piecewise((2, K <= 32767), (4, True))  # column indices are int16 where that is enough (formats/_base.py)
pointer_bytes = 4
activations: Expr = x_bytes * (M * K + M * N)  # x read once, y written once


@cache
def compiled(formula: Expr) -> Callable[[Mapping[str, float]], float]:
    """A formula as a plain function of numbers by name: sympy's own substitution takes a millisecond, a plan asks ten thousand times.

    The function raises KeyError for a number that is missing, and takes no notice of those that the formula does not ask for.
    """
    symbols = sorted(formula.free_symbols, key=lambda symbol: symbol.name)
    function = sympy.lambdify(symbols, formula, modules="math")
    names = [symbol.name for symbol in symbols]
    return lambda values: float(function(*[values[name] for name in names]))


def evaluate(formula: Expr, values: Mapping[str, float]) -> float:
    """The number that a formula gives. Raises KeyError for a symbol of it that `values` lacks, and for a name that is no symbol."""
    for name in values:
        if name not in TABLE:
            raise KeyError(name)
    missing = sorted(symbol.name for symbol in formula.free_symbols if symbol.name not in values)
    if missing:
        raise KeyError(missing[0])
    return float(formula.subs({symbol: sympy.nsimplify(values[symbol.name], rational=True) for symbol in formula.free_symbols}))
