"""Products of whole rows of a weight with one row of x, 16 rows at a time: each in a register of partial sums, transposed and added at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify_compiler.codegen import emit as e

LANES = 16
TOGETHER = 16    # rows of the weight


def step_of(dtype: str) -> int:
    """Weights of one load of 16 words: bfloat16 comes as int32 words of two."""
    return LANES * (2 if dtype == "bfloat16" else 1)


def copy_inputs(inputs: Any, x: Any, m: Any, at: Any, size: Any, dtype: str) -> None:
    """Row m of x as float32 from inputs[at] on; for bfloat16 the even inputs, then the odd ones, of every load of weights."""
    width, step = e.lanes(), _loaded(dtype)
    with e.loop(e.floordiv(size, step)) as j:
        value = e.let(e.read_float(x, m, j * step, lanes=step))
        if dtype == "float32":
            e.store(inputs, value, at + j * width, lanes=width)
            return
        for half in range(2):
            e.store(inputs, e.shuffle(value, value, [2 * i + half for i in range(width)]), at + (2 * j + half) * width, lanes=width)


def _loaded(dtype: str) -> int:
    """Weights of one load of a register."""
    return e.lanes() * step_of(dtype) // LANES


def products(weights: Any, rows: Sequence[Any], inputs: Any, at: Any, size: Any, dtype: str) -> Any:
    """The products of these 16 rows of weights with the inputs from inputs[at] on, one a lane of a vector of 16."""
    rows = [e.wide(row) for row in rows]
    most = min(len(rows), e.vectors().count // 2)   # the other registers are for what is loaded
    found = [part for first in range(0, len(rows), most) for part in _sums(weights, rows[first : first + most], inputs, at, size, dtype)]
    return found[0] if len(found) == 1 else e.let(e.join(found, e.lanes()))


def _sums(weights: Any, rows: Sequence[Any], inputs: Any, at: Any, size: Any, dtype: str) -> list[Any]:
    """The same of some rows, in vectors of as many lanes as a register has."""
    width, step = e.lanes(), _loaded(dtype)
    halves = step // width
    sums = [e.Register(width, e.broadcast(e.zero(), width)) for _ in rows]
    with e.loop(e.floordiv(size, step)) as j:
        values = [e.let(e.load(inputs, at + (j * halves + half) * width, lanes=width)) for half in range(halves)]
        column = e.wide(j * width)
        for row, total in zip(rows, sums, strict=True):
            word = e.let(e.load(weights, row, column, lanes=width))
            parts = [word] if halves == 1 else e.upcast_pairs(word, width)
            for part, value in zip(parts, values, strict=True):
                total.multiply_add(part, value)
    return [added(e.transpose([e.let(total.get()) for total in sums[first : first + width]])) for first in range(0, len(sums), width)]


def added(lanes: list[Any]) -> Any:
    """The sum of a power of two of vectors."""
    while len(lanes) > 1:
        lanes = [e.let(low + high) for low, high in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes[0]
