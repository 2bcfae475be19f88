"""The padded copy of x that a convolution with a kernel, stride or padding reads: each plane cut into phases by the strides.

copy[b, c, phase, row, column] = x[b, c, row * stride + phase's row, column * stride + phase's column], 0 outside of x; a phase counts its padding.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.finish import load_between


def copy_planes(how: Any, a: Any, copy: Any) -> None:
    """Write the copy, [B, C, kinds, rows, pitch], one phase of a plane a task. `a.phases` holds (row, column) of each kind of phase."""
    down, over = how.stride
    with e.loop(a.B * a.C * a.kinds, parallel=how.parallel) as task, e.llvm(e.vectors().text("part")):
        plane, kind = e.opaque(tirx.truncdiv(task, a.kinds)), e.opaque(tirx.truncmod(task, a.kinds))
        top, left = e.opaque(e.load(a.phases, kind * 2)), e.opaque(e.load(a.phases, kind * 2 + 1))
        base = e.opaque(tirx.truncdiv(plane, a.C) * a.images.image + tirx.truncmod(plane, a.C) * a.images.plane)
        with e.loop(a.rows) as row:
            y, to = e.opaque(row * down + top), e.opaque(((plane * a.kinds + kind) * a.rows + row) * a.pitch)
            source = e.opaque(base + y * a.W + left)
            inside = tirx.And(y >= 0, y < a.H)
            end = e.opaque(tirx.Select(inside, a.W - left, 0))
            with e.loop(tirx.truncdiv(a.pitch, e.lanes())) as piece:
                column = e.opaque(piece * e.lanes())
                e.store(copy, _pixels(a.x, source, left, end, column, over), to + column, lanes=e.lanes())
            with e.loop(a.pitch, start=tirx.truncdiv(a.pitch, e.lanes()) * e.lanes()) as column:
                place = e.opaque(column * over)
                valid = tirx.And(place + left >= 0, place < end)
                e.choose(valid, lambda p=place, c=column, t=to, s=source: e.store(copy, e.load(a.x, s + p), t + c),
                         lambda c=column, t=to: e.store(copy, e.zero(), t + c))


def _pixels(x: Any, source: Any, left: Any, end: Any, column: Any, over: int) -> Any:
    """x[source + i * over] for i = column ... column + e.lanes() - 1: those at or behind -left and before `end`, zeros else."""
    if over > 2:
        return e.join([_one(x, source, left, end, (column + i) * over) for i in range(e.lanes())], 1)
    parts = []
    for half in range(over):
        at = e.opaque(column * over + half * e.lanes())
        parts.append(e.let(load_between(x, source + at, -left - at, end - at)))
    if over == 1:
        return parts[0]
    return tirx.Shuffle(parts, [tirx.const(2 * i, "int32") for i in range(e.lanes())])


def _one(x: Any, source: Any, left: Any, end: Any, at: Any) -> Any:
    return e.let(tirx.if_then_else(tirx.And(at + left >= 0, at < end), e.load(x, source + at), e.zero()))
