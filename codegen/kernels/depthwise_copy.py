"""The inputs that a block of a depthwise convolution reads (depthwise_blocks.py), copied with zeros around them, a phase of the stride at a time.

copy[line, phase, i] = x[first line + line, (i + left - margin) * stride + phase], 0 outside of x. `over` such columns of x, one a phase, are a group.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e


def copy_lines(how: Any, block: Any, a: Any, t: Any) -> None:
    """The lines that t.rows rows of y from t.first on read, for t.columns columns from t.left on; each part of all lines by a loop of its own."""
    over = how.stride[1]
    top = e.opaque(t.first * how.stride[0] - a.top)
    c = SimpleNamespace(block=block, copy=t.copy, over=over, x=a.x.elements, W=a.W, lines=e.opaque((t.rows - 1) * how.stride[0] + block.below))
    c.above = e.opaque(e.minimum(e.maximum(-top, 0), c.lines))      # x has the lines from `above` to before `below`
    c.below = e.opaque(e.maximum(e.minimum(a.H - top, c.lines), c.above))
    groups = e.opaque(t.columns + block.reach)
    full = e.opaque(tirx.truncdiv(a.W, over) + block.margin - t.left)
    c.begin = e.opaque(e.maximum(block.margin - t.left, 0))          # and the groups from `begin` to before `end`
    c.end = e.opaque(e.maximum(e.minimum(groups, full), c.begin))
    c.source = e.wide(t.source + top * a.W + (t.left - block.margin) * over)
    _zeros(c, (0, c.above), (0, groups))
    _zeros(c, (c.below, c.lines), (0, groups))
    _zeros(c, (c.above, c.below), (0, block.margin))
    e.choose(c.end - c.begin >= e.lanes(), lambda: _registers(c), lambda: _single(c))
    _zeros(c, (c.above, c.below), (c.end, groups))
    for phase in range(over - 1):   # of a group that is not whole
        there = (full - block.margin + t.left) * over + phase < a.W
        with e.when(tirx.And(tirx.And(full >= 0, full < groups), there)), e.loop(c.below, start=c.above) as line:
            _one(c, line, full, phase)


def _registers(c: Any) -> None:
    """Of groups, the last one beginning so early that it is whole."""
    lanes = e.lanes()
    with e.loop(tirx.truncdiv(c.end - c.begin, lanes)) as number:
        _register(c, e.opaque(c.begin + number * lanes))
    with e.when(tirx.NE(tirx.truncmod(c.end - c.begin, lanes), 0)):
        _register(c, e.opaque(c.end - lanes))


def _register(c: Any, at: Any) -> None:
    lanes = e.lanes()
    with e.loop(c.below, start=c.above) as line:
        here = e.wide(line) * c.W + c.source + e.wide(at * c.over)
        parts = [e.let(e.load(c.x, here + part * lanes, lanes=lanes)) for part in range(c.over)]
        for phase in range(c.over):
            mine = parts[0] if c.over == 1 else tirx.Shuffle(parts, [tirx.const(i * c.over + phase, "int32") for i in range(lanes)])
            e.store(c.copy, mine, e.wide(line) * c.block.line + (phase * c.block.pitch + e.wide(at)), lanes=lanes)


def _single(c: Any) -> None:
    with e.loop(c.below, start=c.above) as line, e.loop(c.end, start=c.begin) as at:
        for phase in range(c.over):
            _one(c, line, at, phase)


def _one(c: Any, line: Any, at: Any, phase: int) -> None:
    e.store(c.copy, e.load(c.x, e.wide(line) * c.W + c.source + e.wide(at * c.over + phase)), line * c.block.line + phase * c.block.pitch + at)


def _zeros(c: Any, lines: tuple[Any, Any], groups: tuple[Any, Any]) -> None:
    """From one line to before another, from one group to before another and up to a register more."""
    (begin, end), lanes = groups, e.lanes()
    with e.loop(tirx.truncdiv(e.maximum(end - begin, 0) + (lanes - 1), lanes)) as number, e.loop(lines[1], start=lines[0]) as line:
        for phase in range(c.over):
            e.store(c.copy, e.broadcast(e.zero(), lanes), line * c.block.line + phase * c.block.pitch + begin + number * lanes, lanes=lanes)
