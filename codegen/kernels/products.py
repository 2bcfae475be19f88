"""Products of whole rows of a weight with one row of x, 16 rows at a time: each in a register of partial sums, transposed and added at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def keep_inputs(inputs: Any, value: Any, at: Any, dtype: str) -> None:
    """16 numbers where products() of that dtype looks for those of inputs[at : at + 16]."""
    both = e.lanes() * step_of(dtype) // LANES   # even and odd ones of a load
    if both > LANES:
        block = e.let(e.floordiv(at, both))
        place = e.let(block * both + e.floordiv(at - block * both, 2))
        for half in range(2):
            e.store(inputs, e.shuffle(value, value, [2 * i + half for i in range(LANES // 2)]), place + half * LANES, lanes=LANES // 2)
        return
    if dtype == "bfloat16":
        order = [first + 2 * i + half for first in range(0, LANES, both) for half in range(2) for i in range(both // 2)]
        value = e.shuffle(value, value, order)
    e.store(inputs, value, at, lanes=LANES)


def _loaded(dtype: str) -> int:
    """Weights of one load of a register."""
    return e.lanes() * step_of(dtype) // LANES


def products(weights: Any, rows: Sequence[Any], inputs: Any, at: Any, size: Any, dtype: str) -> Any:
    """The products of these 16 rows of weights with the inputs from inputs[at] on, one a lane of a vector of 16."""
    return some_at_a_time(rows, lambda some: _sums(weights, some, inputs, at, size, dtype))


def some_at_a_time(rows: Sequence[Any], sums: Callable[[list[Any]], list[e.Register]]) -> Any:
    """sums(rows), each a register to be added up, of as many rows as leave registers for what is loaded -> a vector of one number of each row."""
    rows, width = [e.wide(row) for row in rows], e.lanes()
    most, found = min(len(rows), e.vectors().count // 2), []
    for first in range(0, len(rows), most):
        totals = sums(rows[first : first + most])
        found += [added(e.transpose([e.let(total.get()) for total in totals[at : at + width]])) for at in range(0, len(totals), width)]
    return found[0] if len(found) == 1 else e.let(e.join(found, width))


def _sums(weights: Any, rows: Sequence[Any], inputs: Any, at: Any, size: Any, dtype: str) -> list[e.Register]:
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
    return sums


def added(lanes: list[Any]) -> Any:
    """The sum of a power of two of vectors."""
    while len(lanes) > 1:
        lanes = [e.let(low + high) for low, high in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes[0]
