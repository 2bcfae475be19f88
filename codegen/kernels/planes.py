"""A sparse convolution over images x [B, C, H, W]: the pixels of a plane are the lanes of the vectors, so nothing is transposed.

Kept weight (o, i, ky, kx) times a shifted plane of input i is added to plane o, as in Fast Sparse ConvNets (Elsen et al., arXiv:1911.09723,
section 4). A task computes some groups of r outputs on one tile of up to `vectors` registers of pixels: for each kept column of a group it loads
the tile's registers and does r × `vectors` fused multiply-adds with weights broadcast from memory.

A 1×1 convolution of stride 1 without padding reads x as it lies. Any other reads a padded copy, cut into `phases` by the strides: in it, every place
of the kernel is a plain shift, and the pixels of y are rows of `pitch`, of which the last few are computed in vain and not written.

Bound by: loads for r = 1 (an index and a weight for each column, an input for each FMA), from L2 where a tile of all inputs exceeds L1; the FMA rate
from r = 4 on. `chunked` weights come in chunks of columns, so that what a tile reads of x stays in L1; sums are kept in memory between them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.finish import Finish, Images, images, load_part, store_part
from sparsify_compiler.codegen.kernels.planes_copy import copy_planes
from sparsify_compiler.codegen.vectors import AVX512, Vectors

NUMBERS = ("groups", "chunks", "pixels", "pitch", "rows", "kinds")


@dataclass(frozen=True)
class Planes:
    """How.

    r         outputs that share columns
    vectors   registers of pixels in a tile
    chunked   whether the columns come in several chunks
    stride    of the padded copy (height, width); None where x is read as it lies
    """

    r: int
    vectors: int
    chunked: bool
    finish: Finish
    parallel: bool
    stride: tuple[int, int] | None = None
    cut_for: Vectors = AVX512
    name = "planes"

    def compute(self) -> Any:
        """The PrimFunc f(values, offsets, pointers, visits, bias, strips, phases, numbers, x [B, C, H, W], (other like y,) y [B, O, H', W'])."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _arguments(how: Planes) -> Any:
    a = SimpleNamespace(**{name: e.int32() for name in ("B", "C", "H", "W", "O", "h", "w", "T")})
    a.values, a.offsets, a.pointers, a.visits, a.bias = (e.argument((e.int32(),), kind)
                                                                  for kind in ("float32", "int32", "int32", "int32", "float32"))
    a.strips, a.phases, numbers = e.argument((a.T,), "int32"), e.argument((e.int32(),), "int32"), e.argument((len(NUMBERS),), "int32")
    given, made = (a.B, a.C, a.H, a.W), (a.B, a.O, a.h, a.w)
    a.images, a.other, a.y = images(given, made if how.finish.add else None, made)
    a.x = a.images.elements
    for place, name in enumerate(NUMBERS):
        setattr(a, name, e.let(e.load(numbers, place)))
    return a


def _body(how: Planes) -> None:
    a = _arguments(how)
    image = a.images.image
    if how.stride is not None:
        image = e.opaque(a.C * a.kinds * a.rows * a.pitch)
        copy = e.scratch(a.B * image, "float32")
        copy_planes(how, a, copy)
        a.x = copy
    _tasks(how, a, image)


def _tasks(how: Planes, a: Any, image: Any) -> None:
    registers = e.opaque(tirx.truncdiv(a.pixels + (e.lanes() - 1), e.lanes()))
    tiles, strips = e.opaque(tirx.truncdiv(registers + (how.vectors - 1), how.vectors)), e.opaque(a.T - 1)
    with e.loop(a.B * tiles * strips, parallel=how.parallel) as task, e.llvm(e.vectors().text("part")):
        strip, tile = e.opaque(tirx.truncmod(task, strips)), e.opaque(tirx.truncdiv(task, strips))
        b, number = e.opaque(tirx.truncdiv(tile, tiles)), e.opaque(tirx.truncmod(tile, tiles))
        begin = e.opaque(tirx.truncdiv(number * registers, tiles))
        count = e.opaque(tirx.truncdiv((number + 1) * registers, tiles) - begin)
        t = SimpleNamespace(b=b, start=e.opaque(begin * e.lanes()))
        t.first, t.end = (e.opaque(e.load(a.strips, strip + i)) for i in range(2))
        t.source = e.opaque(b * image + t.start)
        for m in range(1, how.vectors + 1):
            with e.when(tirx.EQ(count, m)):
                t.last = e.opaque(e.minimum(a.pixels - t.start - (m - 1) * e.lanes(), e.lanes()))
                _tile(how, a, t, m)


def _tile(how: Planes, a: Any, t: Any, m: int) -> None:
    """The outputs of one strip on a tile of m registers."""
    if not how.chunked:
        with e.loop(t.end, start=t.first) as visit:
            g = e.let(e.load(a.visits, visit))
            _write(how, a, t, g, _sums(how, a, t, m, visit, lambda row, v: e.broadcast(e.load(a.bias, g * how.r + row), e.lanes())))
        return
    held = e.scratch((t.end - t.first) * (how.r * m * e.lanes()), "float32")
    with e.loop(a.chunks) as chunk, e.loop(t.end, start=t.first) as visit:
        g = e.let(e.load(a.visits, chunk * a.groups + visit))
        kept = e.let((g - t.first) * (how.r * m * e.lanes()))

        def start(row: int, v: int, kept: Any = kept) -> Any:
            return e.load(held, kept + (row * m + v) * e.lanes(), lanes=e.lanes())

        with e.when(tirx.EQ(chunk, 0)):
            for row in range(how.r):
                bias = e.let(e.broadcast(e.load(a.bias, g * how.r + row), e.lanes()))
                for v in range(m):
                    e.store(held, bias, kept + (row * m + v) * e.lanes(), lanes=e.lanes())
        sums = _sums(how, a, t, m, chunk * a.groups + visit, start)

        def keep(sums: Any = sums, kept: Any = kept) -> None:
            for row in range(how.r):
                for v in range(m):
                    e.store(held, sums[row][v].get(), kept + (row * m + v) * e.lanes(), lanes=e.lanes())

        e.choose(chunk < a.chunks - 1, keep, lambda g=g, sums=sums: _write(how, a, t, g, sums))


def _sums(how: Planes, a: Any, t: Any, m: int, at: Any, start: Any) -> list[list[e.Register]]:
    """[r][m] registers: what they start with plus the products of the columns that pointers[at] begins."""
    first, last = e.let(e.load(a.pointers, at)), e.let(e.load(a.pointers, at + 1))
    lanes = e.lanes()
    sums = [[e.Register(lanes, start(row, v)) for v in range(m)] for row in range(how.r)]

    def add(load_last: Any) -> None:
        with e.loop(last, start=first) as place:
            source = e.let(t.source + e.load(a.offsets, place))
            inputs = [e.let(e.load(a.x, source + v * lanes, lanes=lanes) if v < m - 1 else load_last(source + v * lanes)) for v in range(m)]
            weights = e.broadcasts(a.values, place * how.r, how.r)
            for row in range(how.r):
                weight = weights(row)
                for v in range(m):
                    sums[row][v].multiply_add(weight, inputs[v])

    def part(at: Any) -> Any:
        return load_part(a.x, at, t.last)

    if e.vectors().masked:
        add(part)
    else:   # where no lanes can be left out, part of a register is loaded by branches
        e.choose(t.last >= lanes, lambda: add(lambda at: e.load(a.x, at, lanes=lanes)), lambda: add(part))
    return sums


def _write(how: Planes, a: Any, t: Any, g: Any, sums: list[list[e.Register]]) -> None:
    """Finish the sums of a group and write them where y has such an output and pixel."""
    for row, registers in enumerate(sums):
        output = e.let(g * how.r + row)
        with e.when(output < a.O):
            if how.stride is not None:
                _write_rows(how, a, t, output, registers)
                continue
            to, added = _plane(a.y, t.b, output, t.start), _plane(a.other, t.b, output, t.start)
            for v, register in enumerate(registers):
                whole, other = v < len(registers) - 1, None
                if a.other is not None:
                    place = added + v * e.lanes()
                    other = e.let(e.load(a.other.elements, place, lanes=e.lanes()) if whole else load_part(a.other.elements, place, t.last))
                value = how.finish(register.get(), other)
                if whole:
                    e.store(a.y.elements, value, to + v * e.lanes(), lanes=e.lanes())
                else:
                    store_part(a.y.elements, value, to + v * e.lanes(), t.last)


def _plane(tensor: Images | None, b: Any, c: Any, offset: Any = 0) -> Any:
    """Where a plane begins, or an element of it."""
    return None if tensor is None else e.opaque(b * tensor.image + c * tensor.plane + offset)


def _write_rows(how: Planes, a: Any, t: Any, output: Any, registers: list[e.Register]) -> None:
    """Pixels in rows of `pitch`, of which the first w are y's."""
    line, length = e.stack(len(registers) * e.lanes(), "float32"), len(registers) * e.lanes()
    for v, register in enumerate(registers):
        e.store(line, register.get(), v * e.lanes(), lanes=e.lanes())
    to, added = _plane(a.y, t.b, output), _plane(a.other, t.b, output)
    first = e.opaque(tirx.truncdiv(t.start, a.pitch))
    with e.loop(e.minimum(tirx.truncdiv(t.start + (length - 1), a.pitch) + 1, a.h), start=first) as row:
        begin = e.opaque(e.maximum(t.start - row * a.pitch, 0))
        end = e.opaque(e.minimum(t.start + length - row * a.pitch, a.w))
        with e.loop(tirx.truncdiv(e.maximum(end - begin, 0) + (e.lanes() - 1), e.lanes())) as piece:
            column = e.opaque(begin + piece * e.lanes())
            count, place = e.opaque(e.minimum(end - column, e.lanes())), e.opaque(row * a.w + column)
            other = None if a.other is None else e.let(load_part(a.other.elements, added + place, count))
            value = how.finish(load_part(line, row * a.pitch + column - t.start, count), other)
            store_part(a.y.elements, value, to + place, count)
