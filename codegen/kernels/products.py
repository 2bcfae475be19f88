"""Products of whole rows of a weight with one row of x, 16 rows at a time: each in a register of partial sums, transposed and added at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsify_compiler.codegen import emit as e

LANES = 16
TOGETHER = 16    # rows of the weight


def step_of(dtype: str) -> int:
    """Weights of one load: bfloat16 comes as int32 words of two."""
    return LANES * (2 if dtype == "bfloat16" else 1)


def copy_inputs(inputs: Any, x: Any, m: Any, at: Any, size: Any, dtype: str) -> None:
    """Row m of x as float32 from inputs[at] on; for bfloat16 the even inputs, then the odd ones, of every load of weights."""
    step = step_of(dtype)
    with e.loop(e.floordiv(size, step)) as j:
        value = e.let(e.read_float(x, m, j * step, lanes=step))
        if dtype == "float32":
            e.store(inputs, value, at + j * LANES, lanes=LANES)
            return
        for half in range(2):
            e.store(inputs, e.shuffle(value, value, [2 * i + half for i in range(LANES)]), at + (2 * j + half) * LANES, lanes=LANES)


def products(weights: Any, rows: Sequence[Any], inputs: Any, at: Any, size: Any, dtype: str) -> Any:
    """The products of these 16 rows of weights with the inputs from inputs[at] on, one a lane."""
    sums = [e.Register(LANES, e.broadcast(e.zero(), LANES)) for _ in rows]
    rows = [e.wide(row) for row in rows]
    with e.loop(e.floordiv(size, step_of(dtype))) as j:
        halves = step_of(dtype) // LANES
        values = [e.let(e.load(inputs, at + (j * halves + half) * LANES, lanes=LANES)) for half in range(halves)]
        column = e.wide(j * LANES)
        for row, total in zip(rows, sums, strict=True):
            word = e.let(e.load(weights, row, column, lanes=LANES))
            parts = [word] if halves == 1 else e.upcast_pairs(word, LANES)
            for part, value in zip(parts, values, strict=True):
                total.multiply_add(part, value)
    lanes = e.transpose([e.let(total.get()) for total in sums])
    while len(lanes) > 1:
        lanes = [e.let(low + high) for low, high in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes[0]
