"""A dense depthwise convolution over images x [B, C, H, W]: every plane of y from one of x, the pixels of a row in lanes.

Processors share a large image by its rows, as those of planes.py do: what one of them writes, it reads in the next layer. `numbers` are the padding
of the height and the number of such pieces.

Where no lanes can be left out, planes of y that are not narrower than a register are computed by depthwise_blocks.py. Else nothing is padded or
copied: lanes outside of x are masked off where they are loaded. A tile is ROWS rows of y, so that each loaded vector serves
every row of the kernel that it meets. Where a row of x and its padding fit into as many registers as the stride has columns, each row is loaded once,
and what each column of the kernel sees of it is a permutation; else each column of the kernel has loads of its own.

Bound by: loads from L1 (most are not aligned) for small kernels, permutations and FMAs where rows are short; the bytes of x and y where they do not
fit L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels import depthwise_blocks
from sparsify_compiler.codegen.kernels.finish import Finish, images, load_between, load_part, store_part
from sparsify_compiler.codegen.vectors import AVX512, Vectors

ROWS = 7    # divides the heights of most networks
WHOLE = 2   # registers of a row that is loaded once, at the most


@dataclass(frozen=True)
class Depthwise:
    """How. Pairs are (height, width); the weight has one input a group, and C groups. padding is that of the width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: int
    finish: Finish
    parallel: bool
    cut_for: Vectors = AVX512
    name = "depthwise"

    def compute(self) -> Any:
        """The PrimFunc f(weight [O * kh * kw], bias [O], numbers [2], x [B, C, H, W], (other like y,) y [B, O, H', W'])."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: Depthwise) -> None:
    a = SimpleNamespace(**{name: e.int32() for name in ("B", "C", "H", "W", "O", "h", "w")})
    a.weight, a.bias = e.argument((e.int32(),), "float32"), e.argument((e.int32(),), "float32")
    numbers = e.argument((2,), "int32")
    made = (a.B, a.O, a.h, a.w)
    a.x, a.other, a.y = images((a.B, a.C, a.H, a.W), made if how.finish.add else None, made)
    a.top, pieces = (e.opaque(e.load(numbers, i)) for i in range(2))
    text = e.vectors().text("part") if e.vectors().masked else depthwise_blocks.text()
    with e.loop(a.B * pieces * a.O, parallel=how.parallel) as task, e.llvm(text):
        o, part = e.opaque(tirx.truncmod(task, a.O)), e.opaque(tirx.truncdiv(task, a.O))
        b, piece = e.opaque(tirx.truncdiv(part, pieces)), e.opaque(tirx.truncmod(part, pieces))
        begin, end = e.opaque(tirx.truncdiv(piece * a.h, pieces)), e.opaque(tirx.truncdiv((piece + 1) * a.h, pieces))
        source = e.opaque(b * a.x.image + tirx.truncdiv(o, e.opaque(tirx.truncdiv(a.O, a.C))) * a.x.plane)
        to, added = (None if one is None else e.opaque(b * one.image + o * one.plane) for one in (a.y, a.other))
        taps = how.kernel[0] * how.kernel[1]
        load_weight = e.broadcasts(a.weight, o * taps, taps)
        weights = [load_weight(tap) for tap in range(taps)]
        bias = e.let(e.broadcast(e.load(a.bias, o), e.lanes()))
        t = SimpleNamespace(source=source, to=to, added=added, begin=begin, end=end, weights=weights, bias=bias)
        if not e.vectors().masked:
            e.choose(a.w >= e.lanes(), lambda: depthwise_blocks.planes(how, a, t), lambda: _pieces(how, a, t))
        elif how.stride[1] > WHOLE:
            _pieces(how, a, t)
        else:
            room, last = e.lanes() * how.stride[1], (how.kernel[1] - 1) * how.dilation[1]
            fits = tirx.And((a.w - 1) * how.stride[1] + last < room, a.W + how.padding <= room)
            e.choose(fits, lambda: _bands(how, a, t, 0, a.w, lambda y: _row(how, a, e.opaque(source + y * a.W))), lambda: _pieces(how, a, t))


def _pieces(how: Depthwise, a: Any, t: Any) -> None:
    """Rows of y cut into pieces of e.lanes() columns."""
    with e.loop(tirx.truncdiv(a.w + (e.lanes() - 1), e.lanes())) as vector:
        column = e.opaque(vector * e.lanes())
        count = e.opaque(e.minimum(a.w - column, e.lanes()))
        left = e.opaque(column * how.stride[1] - how.padding)
        first, end = e.opaque(-left), e.opaque(a.W - left)

        def between(at: Any, place: int) -> Any:
            return load_between(a.x.elements, at + place, first - place, end - place)

        _bands(how, a, t, column, count, lambda y: _line(how, e.opaque(t.source + y * a.W + left), between))


def _bands(how: Depthwise, a: Any, t: Any, column: Any, count: Any, inputs: Callable[[Any], list[Any]]) -> None:
    """`count` columns of y from `column` on, ROWS rows after the other."""
    with e.loop(tirx.truncdiv(t.end - t.begin + (ROWS - 1), ROWS)) as band:
        _tile(how, a, t, e.opaque(t.begin + band * ROWS), column, count, inputs)


def _tile(how: Depthwise, a: Any, t: Any, first: Any, column: Any, count: Any, inputs: Callable[[Any], list[Any]]) -> None:
    """ROWS rows of y, e.lanes() columns; what lies outside of x counts as 0, what lies outside of y is not written.

    inputs   for a row of x: the vector that each column of the kernel sees
    """
    top = e.opaque(first * how.stride[0] - a.top)
    sums = [e.Register(e.lanes(), t.bias) for _ in range(ROWS)]
    for line, uses in sorted(depthwise_blocks.uses_of(how, ROWS).items()):
        y = e.opaque(top + line)
        with e.when(tirx.And(y >= 0, y < a.H)):
            vectors = inputs(y)
            for row, ky in uses:
                for kx, vector in enumerate(vectors):
                    sums[row].multiply_add(t.weights[ky * how.kernel[1] + kx], vector)
    for row, total in enumerate(sums):
        with e.when(first + row < t.end):
            place = e.opaque((first + row) * a.w + column)
            other = None if a.other is None else e.let(load_part(a.other.elements, t.added + place, count))
            store_part(a.y.elements, how.finish(total.get(), other), t.to + place, count)


def _row(how: Depthwise, a: Any, source: Any) -> list[Any]:
    """The same as _line of a whole row, which is loaded once; the lanes behind it are zeros, and those before it come round to them."""
    over = how.stride[1]
    parts = [e.let(load_part(a.x.elements, source + part * e.lanes(), a.W - part * e.lanes())) for part in range(over)]
    shifts = [kx * how.dilation[1] - how.padding for kx in range(how.kernel[1])]
    return [parts[0] if over == 1 and shift == 0 else
            e.let(tirx.Shuffle(parts, [tirx.const((i * over + shift) % (e.lanes() * over), "int32") for i in range(e.lanes())])) for shift in shifts]


def _line(how: Depthwise, source: Any, load_from: Callable[[Any, int], Any]) -> list[Any]:
    """For each column of the kernel a vector of inputs of one row of x. load_from(source, place): from source + place on, 0 outside of the row."""
    loaded: dict[int, Any] = {}

    def load(at: int) -> Any:
        if at not in loaded:
            loaded[at] = e.let(load_from(source, at))
        return loaded[at]

    def column(kx: int) -> Any:
        over, at = how.stride[1], kx * how.dilation[1]
        if over == 1:
            return load(at)
        whole = at - at % over  # the columns of a kernel share their loads
        parts = [load(whole + part * e.lanes()) for part in range(over)]
        current = [tirx.const(i * over + at % over, "int32") for i in range(e.lanes())]
        return e.let(tirx.Shuffle(parts, current))

    return [column(kx) for kx in range(how.kernel[1])]
