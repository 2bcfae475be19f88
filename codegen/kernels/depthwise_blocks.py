"""Depthwise convolutions where no lanes of a register can be left out (NEON, AVX2): blocks of y, each from a copy of the inputs that it reads.

A copy has zeros where x ends, and is cut into phases by the stride of the width, so that a column of the kernel is a plain shift of the phase that it
lies in. What computes has no branches: a tile of some rows of y and registers side by side loads each register of inputs once for all rows of the
kernel that meet it, takes weights from lanes of registers (from all lanes, where that cannot be), and writes a row when its last line was there: as
many sums are kept as the kernel has rows. The last tile of a row begins so early that it is whole.

Bound by: FMAs, which on Arm share their ports with what is written: 9 of 11 slots for 3x3, 25 of 27 for 5x5.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.depthwise_copy import copy_lines

COLUMNS = 56            # of y in a block, at the most; whole registers
ROWS, BANDS = 7, 4      # of a tile: divides the heights of most networks; tiles of a block, one below the other
ACROSS = 4              # registers of a tile side by side, at the most
MANY = 49               # weights above which tiles get lower, so that their code does not grow


def text() -> str:
    """LLVM IR of what is called here."""
    held = e.vectors().text("held")
    return e.vectors().text("part", "scalar") + (held if e.vectors().by_element else held.replace("=w", "=x"))


class Blocks:
    """How blocks of a convolution lie; its attributes are Python's numbers.

    rows, bands    rows of a tile, tiles of a block
    places         of each column of the kernel: where in a line of the copy the inputs of the first column of y begin
    margin, reach  groups of `over` columns of x before those of the first column of y, and more of them than y has columns
    pitch, line    elements of a phase, and of a line of the copy
    lines          of the copy
    """

    def __init__(self, how: Any) -> None:
        lanes, (down, over) = e.lanes(), how.stride
        taps = how.kernel[0] * how.kernel[1]
        self.rows = max(1, ROWS * MANY // max(MANY, taps))
        weights = -(-taps // lanes) if e.vectors().by_element else taps
        self.across = max(1, min(ACROSS, (e.vectors().count - 2 - weights) // (min(self.rows, how.kernel[0]) + 1)))
        self.bands = max(1, BANDS * ROWS // (self.rows * over))
        shifts = [divmod(kx * how.dilation[1] - how.padding, over) for kx in range(how.kernel[1])]
        self.margin = -min(shift for shift, _ in shifts)
        self.reach = max(shift for shift, _ in shifts) + self.margin
        self.pitch = -(-(COLUMNS + self.reach + lanes - 1) // lanes) * lanes
        self.line = over * self.pitch
        self.places = [phase * self.pitch + shift + self.margin for shift, phase in shifts]
        self.below = (how.kernel[0] - 1) * how.dilation[0] + 1
        self.lines = (self.rows * self.bands - 1) * down + self.below
        self.start = self.lines * self.line


def planes(how: Any, a: Any, t: Any) -> None:
    """Rows t.begin to t.end of a plane of y, which has as many columns as a register."""
    block = Blocks(how)
    starts = block.rows * block.across
    t.copy = e.scratch(block.start + starts * e.lanes(), "float32")
    for number in range(starts):    # as many as a tile has sums: LLVM would load one and copy it
        e.store(t.copy, t.bias, block.start + number * e.lanes(), lanes=e.lanes())
    t.sums = e.scratch(block.rows * block.bands * COLUMNS, "float32") if how.finish.long else None
    cuts = e.opaque(tirx.truncdiv(a.w + (COLUMNS - 1), COLUMNS))
    width = e.opaque(tirx.truncdiv(tirx.truncdiv(a.w + cuts - 1, cuts) + (e.lanes() - 1), e.lanes()) * e.lanes())
    height = block.rows * block.bands
    with e.loop(tirx.truncdiv(t.end - t.begin + (height - 1), height)) as down, e.loop(tirx.truncdiv(a.w + width - 1, width)) as over:
        t.first, t.left = e.opaque(t.begin + down * height), e.opaque(e.minimum(over * width, a.w - e.lanes()))
        t.rows, t.columns = e.opaque(e.minimum(t.end - t.first, height)), e.opaque(e.minimum(a.w - t.left, width))
        copy_lines(how, block, a, t)
        _tiles(how, block, a, t)
        if t.sums is not None:
            _finish(how, a, t)


def _tiles(how: Any, block: Blocks, a: Any, t: Any) -> None:
    """Of the block: as many as are as high as they are to be, then single rows."""
    bands = e.opaque(tirx.truncdiv(t.rows, block.rows))
    for rows, begin, count in ((block.rows, 0, bands), (1, e.opaque(bands * block.rows), e.opaque(t.rows - bands * block.rows))):
        with e.loop(count) as band:
            row = e.opaque(begin + band * rows)
            places = [e.wide((row + i) * COLUMNS if how.finish.long else (t.first + row + i) * a.w + t.left) for i in range(rows)]
            _across(how, block, a, t, SimpleNamespace(source=e.wide(row * (how.stride[0] * block.line)), places=places))


def _across(how: Any, block: Blocks, a: Any, t: Any, at: Any) -> None:
    """From left to right, in tiles as wide as can be; the last one begins so early that it is whole."""
    lanes, most = e.lanes(), block.across
    registers = e.opaque(tirx.truncdiv(t.columns, lanes))
    tiles = e.opaque(tirx.truncdiv(registers, most))
    rest = e.opaque(registers - tiles * most)
    with e.loop(tiles) as number:
        _tile(how, block, a, t, at, e.wide(number * (most * lanes)), most)
    for count in range(2, most):
        with e.when(tirx.EQ(rest, count)):
            _tile(how, block, a, t, at, e.wide((registers - count) * lanes), count)
    done = e.opaque(e.either(rest > 1, registers, registers - rest) * lanes)
    with e.loop(tirx.truncdiv(t.columns - done + (lanes - 1), lanes)) as number:
        _tile(how, block, a, t, at, e.wide(e.minimum(done + number * lanes, t.columns - lanes)), 1)


def _tile(how: Any, block: Blocks, a: Any, t: Any, at: Any, column: Any, across: int) -> None:
    """Rows at.places of y, `across` registers from a column on. Each is written when its last input was there: few sums are kept at a time."""
    lanes, uses = e.lanes(), uses_of(how, len(at.places))
    sums: dict[int, list[e.Register]] = {}
    columns = [e.opaque(e.scalar(at.source + column + place), "int64") for place in block.places]
    for line in sorted(uses):
        for row, ky in uses[line]:
            if ky == 0:
                sums[row] = [e.Register(lanes, e.load(t.copy, block.start + (row * across + v) * lanes, lanes=lanes)) for v in range(across)]
        for kx, first in enumerate(columns):
            inputs = [e.let(e.load(t.copy, first + (line * block.line + v * lanes), lanes=lanes)) for v in range(across)]
            for row, ky in uses[line]:
                for total, value in zip(sums[row], inputs, strict=True):
                    total.multiply_add(t.weights[ky * how.kernel[1] + kx], value)
        for row, ky in uses[line]:
            for v, total in enumerate(sums[row]):
                total.set(e.external(total.dtype, "held", total.get()))
                if ky == how.kernel[0] - 1:
                    _write(how, a, t, total.get(), at.places[row] + column + v * lanes)


def _write(how: Any, a: Any, t: Any, value: Any, place: Any) -> None:
    """Into y, or what is to be finished later among t.sums."""
    if how.finish.long:
        return e.store(t.sums, value, place, lanes=e.lanes())
    other = None if a.other is None else e.let(e.load(a.other.elements, t.added + place, lanes=e.lanes()))
    return e.store(a.y.elements, how.finish(value, other), t.to + place, lanes=e.lanes())


def _finish(how: Any, a: Any, t: Any) -> None:
    """From t.sums into y."""
    lanes = e.lanes()
    with e.loop(t.rows) as row, e.loop(tirx.truncdiv(t.columns + (lanes - 1), lanes)) as vector:
        column = e.opaque(e.minimum(vector * lanes, t.columns - lanes))
        place = e.opaque((t.first + row) * a.w + t.left + column)
        other = None if a.other is None else e.let(e.load(a.other.elements, t.added + place, lanes=lanes))
        value = e.let(e.load(t.sums, row * COLUMNS + column, lanes=lanes))
        e.store(a.y.elements, how.finish(value, other), t.to + place, lanes=lanes)


def uses_of(how: Any, rows: int) -> dict[int, list[tuple[int, int]]]:
    """Row of x below a tile's first -> (row of the tile, row of the kernel) that read it."""
    uses: dict[int, list[tuple[int, int]]] = {}
    for row in range(rows):
        for ky in range(how.kernel[0]):
            uses.setdefault(row * how.stride[0] + ky * how.dilation[0], []).append((row, ky))
    return uses
