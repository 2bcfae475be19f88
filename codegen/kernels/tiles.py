"""y = x Wᵀ + bias in bfloat16 on AMX tiles, for groups of outputs that keep the same inputs: yᵀ = W xᵀ, tile by tile.

A chunk of W, r outputs × 32 kept inputs, is one or two tiles as it lies in memory. The other factor is xᵀ, 16 pairs of inputs × 16 rows of x: x is
packed once a call, transposed, in panels of 16 or 32 rows. Where the 32 inputs are neighbours (`run`) a tile of it is loaded as it lies;
else its rows are gathered, two kept inputs at a time, interleaved with one shuffle each, through a small buffer in L1.

Bound by: the tile unit for `run`; loads of packed x from L2 where rows are gathered; the bandwidth at which W arrives for few rows of x.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.finish import NOTHING, Finish
from sparsify_compiler.codegen.kernels.layout import Arguments
from sparsify_compiler.codegen.kernels.share import share
from sparsify_compiler.codegen.kernels.tile_layout import DEPTH, TileLayout, tile_arguments

WIDTH = 16              # rows of x in a tile
PAIRS = DEPTH // 2
TILE = 512              # bfloat16 elements of a whole tile
BLOCK = 1 << 19         # elements of packed x that a worker goes through again and again: they stay in L2


@dataclass(frozen=True)
class Tiles:
    """How: `across` tiles of x rows at a time (1 or 2), work split for this many threads (1: on the caller's alone), what y goes through."""

    layout: TileLayout
    across: int
    workers: int
    finish: Finish = NOTHING
    name = "tiles"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], values, columns, pointers, bias, y [M, N]), with other [M, N] before y where it adds."""
        return e.function("main", lambda: _body(self))

    @property
    def width(self) -> int:
        """Rows of x in a panel."""
        return WIDTH * self.across


def _body(how: Tiles) -> None:
    a = tile_arguments(how.layout, how.finish.add)
    panels = e.opaque(e.floordiv(a.M + (how.width - 1), how.width))
    # One panel of packed x: `run`: [tile][pair][row] words; else [input][row], row order such that interleaving two of them gives whole tiles.
    size = e.opaque(a.K * how.width if how.layout.run else (a.K + 1) * how.width)
    groups = e.opaque(e.floordiv(a.N + (how.layout.r - 1), how.layout.r))
    with e.loop(how.workers, parallel=how.workers > 1) as me:
        s = share(panels, groups, how.workers, me)
        each = e.opaque(e.minimum(e.maximum(e.floordiv(BLOCK, size), 1), e.maximum(s.own, 1)))  # panels at a time
        blocks = e.opaque(e.floordiv(s.own + (each - 1), each))
        room = _Room(e.scratch(each * size, "uint16"), e.scratch(2 * how.across * TILE, "uint16"),
                     *(e.scratch(how.layout.r * how.width, dtype) for dtype in ("float32", "uint16")),
                     e.scratch(how.layout.r * how.width, "uint16") if how.finish.add else None)
        t.configure([*([how.layout.rows] * 6), t.ROWS, t.ROWS])
        with e.loop(e.opaque(blocks + s.left)) as block:
            alone = block < blocks
            panel = e.opaque(e.either(alone, s.first + block * each, s.rest))
            count = e.opaque(e.either(alone, e.minimum(s.own - block * each, each), 1))
            first, last = e.opaque(e.either(alone, 0, s.begin)), e.opaque(e.either(alone, groups, s.end))
            _pack(a, how, room.packed, panel, count, size)
            with e.loop(last - first) as group, e.loop(count) as p:
                _group(a, how, room, e.opaque(p * size), e.opaque((panel + p) * how.width), e.opaque(first + group))
        t.release()


@dataclass(frozen=True)
class _Room:
    """What a worker has to itself: packed panels of x, two chunks of gathered inputs, the sums of a group, and the same rounded and turned.

    Also where a group hangs over the edge of y, what is added to it.
    """

    packed: Any
    gathered: Any
    finished: Any
    turned: Any
    added: Any


def _group(a: Arguments, how: Tiles, room: _Room, start: Any, row: Any, group: Any) -> None:
    """The outputs of one group for the panel that is packed from `start` on and begins at this row of x."""
    layout, across = how.layout, how.across
    first, last = e.let(e.load(a.pointers, group)), e.let(e.load(a.pointers, group + 1))
    output = e.opaque(group * layout.r)
    for m in range(how.width):  # its lines of y arrive while the sums are made
        t.prefetch(a.y, e.minimum(row + m, a.M - 1), output, near=False)
    for i in range(layout.tiles * across):
        t.zero(i)
    if layout.run:
        with e.loop(last - first) as j:
            at = e.let(start + e.cast("int32", e.load(a.columns, first + j)) * TILE)
            _multiply(a, how, e.let(first + j), room.packed, at, WIDTH * a.K)
    else:
        _gathering(a, how, room, start, first, last)
    for i in range(layout.tiles):
        for v in range(across):
            t.store(i * across + v, room.finished, (v * layout.tiles + i) * layout.rows * WIDTH)
    _write(a, how, room, row, output)


def _gathering(a: Arguments, how: Tiles, room: _Room, start: Any, first: Any, last: Any) -> None:
    """Add all chunks' products. Gathering is one chunk ahead: a tile loaded right behind the stores that fill it would wait for them."""
    halves = (0, how.across * TILE)  # even chunks, odd ones

    def gather(chunk: Any, half: int) -> None:
        _gather(a, how, room, start, chunk, halves[half])

    def multiply(chunk: Any, half: int) -> None:
        _multiply(a, how, chunk, room.gathered, halves[half], TILE)

    with e.when(first < last):
        gather(first, 0)
        twos = e.opaque(e.floordiv(last - first - 1, 2))
        with e.loop(twos) as j:
            chunk = e.let(first + 2 * j)
            for i in range(2):
                gather(e.let(chunk + i + 1), 1 - i)
                multiply(e.let(chunk + i), i)
        rest = e.opaque(first + 2 * twos)
        with e.when(rest + 1 < last):
            gather(e.let(rest + 1), 1)
        multiply(rest, 0)
        with e.when(rest + 1 < last):
            multiply(e.let(rest + 1), 1)


def _multiply(a: Arguments, how: Tiles, chunk: Any, inputs: Any, at: Any, apart: Any) -> None:
    """Add a chunk's products to the sums: tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 inputs, which lie `apart` from each other."""
    layout, across = how.layout, how.across
    for v in range(across):
        t.load(6 + v, inputs, at + v * apart)
    for i in range(layout.tiles):
        t.load(4 + i, a.values, chunk * (layout.r * DEPTH) + i * layout.rows * DEPTH)
        for v in range(across):
            t.multiply_add(i * across + v, 4 + i, 6 + v)


def _gather(a: Arguments, how: Tiles, room: _Room, start: Any, chunk: Any, half: int) -> None:
    """The 32 inputs of a chunk, paired: [tile][pair][row] words."""
    width, lanes = how.width, 8

    def row(k: int) -> Any:
        return e.let(e.load(room.packed, start + e.cast("int32", e.load(a.columns, chunk * DEPTH + k)) * width, lanes=width))

    for pair in range(PAIRS):
        low, high = row(2 * pair), row(2 * pair + 1)
        for part in range(2):  # 128 bits at a time, as the machine's unpack instructions go
            order = [side * width + base + part * 4 + i for base in range(0, width, lanes) for i in range(4) for side in range(2)]
            word = e.shuffle(low, high, order)
            to = half + (part * TILE + pair * 32 if how.across == 2 else pair * 32 + part * 16)
            e.store(room.gathered, word, to, lanes=width)


def _pack(a: Arguments, how: Tiles, packed: Any, panel: Any, count: Any, size: Any) -> None:
    """Transpose some panels of x. Rows past the last repeat it: their sums are not stored."""
    blocks = e.opaque(e.floordiv(a.K, DEPTH) + (0 if how.layout.run else 1))
    with e.loop(count) as p, e.loop(blocks) as block:
        row, first = e.opaque((panel + p) * how.width), e.opaque(block * DEPTH)
        if how.layout.run:
            for v in range(how.across):
                for pair, words in enumerate(_pairs(a, [row + v * WIDTH + i for i in range(WIDTH)], first)):
                    to = p * size + v * WIDTH * a.K + first * WIDTH + pair * 2 * WIDTH
                    e.store(packed, e.halves(words, WIDTH), to, lanes=2 * WIDTH)
        else:
            start = e.let(p * size + first * how.width)
            e.choose(first + DEPTH <= a.K, lambda: _split_pairs(a, how, packed, row, first, start),
                     lambda: _split_tail(a, how, packed, row, first, start))


def _split_pairs(a: Arguments, how: Tiles, packed: Any, row: Any, first: Any, start: Any) -> None:
    """32 whole inputs of a panel, each a row of its own."""
    words = [_pairs(a, [row + _row(how, v * WIDTH + i) for i in range(WIDTH)], first) for v in range(how.across)]
    for pair in range(PAIRS):
        parts = [e.let(e.halves(words[v][pair], WIDTH)) for v in range(how.across)]
        for side in range(2):
            order = [v * 2 * WIDTH + 2 * i + side for v in range(how.across) for i in range(WIDTH)]
            e.store(packed, e.shuffle(parts[0], parts[-1], order), start + (2 * pair + side) * how.width, lanes=how.width)


def _split_tail(a: Arguments, how: Tiles, packed: Any, row: Any, first: Any, start: Any) -> None:
    """The last inputs, and a row of zeros behind them."""
    with e.loop(a.K - first) as k, e.loop(how.width) as place:
        value = e.load(a.x, e.minimum(row + _row(how, place), a.M - 1), first + k)
        e.store(packed, e.reinterpret("uint16", value), start + k * how.width + place)
    e.store(packed, e.broadcast(e.constant(0, "uint16"), how.width), start + (a.K - first) * how.width, lanes=how.width)


def _pairs(a: Arguments, rows: list[Any], first: Any) -> list[Any]:
    """16 vectors of words: pair p of the inputs from `first` on, of each of 16 rows of x."""
    lines = [e.let(e.reinterpret("int32", e.load(a.x, e.minimum(row, a.M - 1), first, lanes=DEPTH), WIDTH)) for row in rows]
    return e.transpose(lines)


def _row(how: Tiles, place: Any) -> Any:
    """Which row of its panel stands at a place of a packed row: interleaving takes 4 of every 8 for its first part, the others for its second."""
    if isinstance(place, int):
        return place // 8 * 4 + place % 4 + how.width // 2 * (place // 4 % 2)
    return e.floordiv(place, 8) * 4 + e.floormod(place, 4) + e.floormod(e.floordiv(place, 4), 2) * (how.width // 2)


def _write(a: Arguments, how: Tiles, room: _Room, row: Any, output: Any) -> None:
    """y[row + m, output + n] = finished[n][m] + bias[n], and what follows, where y has such a place."""
    r, finish = how.layout.r, how.finish
    whole = e.both(row + how.width <= a.M, output + r <= a.N)
    rows, outputs = e.opaque(e.minimum(a.M - row, how.width)), e.opaque(e.minimum(a.N - output, r))
    _offset(a, how, room.finished, output)

    def part() -> None:
        with e.loop(rows) as m, e.loop(outputs) as n:
            e.store(a.y, e.reinterpret("bfloat16", e.load(room.turned, m * r + n)), row + m, output + n)

    def turn_aside() -> None:
        _turn(how, room.finished, lambda m, n, lanes, value: e.store(room.turned, value, m * r + n, lanes=lanes))

    def put(m: Any, n: Any, lanes: int, value: Any) -> None:
        e.store(a.y, e.reinterpret("bfloat16", value, lanes), row + m, output + n, lanes=lanes)

    if not finish.add:
        return e.choose(whole, lambda: _turn(how, room.finished, put), lambda: (turn_aside(), part()))

    def fetch(m: Any, n: Any, lanes: int = 1) -> None:
        e.store(room.added, e.reinterpret("uint16", e.load(a.other, row + m, output + n, lanes=lanes), lanes), m * r + n, lanes=lanes)

    def fetch_whole() -> None:
        with e.loop(how.width) as m:
            fetch(m, 0, r)

    def fetch_part() -> None:
        with e.loop(rows) as m, e.loop(outputs) as n:
            fetch(m, n)

    def put_whole() -> None:
        with e.loop(how.width) as m:
            put(m, 0, r, e.load(room.turned, m * r, lanes=r))

    e.choose(whole, fetch_whole, fetch_part)
    turn_aside()
    _add(how, room)
    return e.choose(whole, put_whole, part)


def _offset(a: Arguments, how: Tiles, finished: Any, first_output: Any) -> None:
    """Add the bias to the sums, and activate them where nothing else is added. A loop: unrolled, TVM's simplifier takes minutes for activations."""
    finish = replace(how.finish, activation="") if how.finish.add else how.finish
    with e.loop(how.across) as v, e.loop(how.layout.r) as n:
        place = e.let((v * how.layout.r + n) * WIDTH)
        bias = e.broadcast(e.load(a.bias, first_output + n), WIDTH)
        e.store(finished, finish(e.load(finished, place, lanes=WIDTH) + bias), place, lanes=WIDTH)


def _add(how: Tiles, room: _Room) -> None:
    """Add and activate what is turned: as torch has it, sums of two bfloat16 that are rounded."""
    with e.loop(how.width * how.layout.r // DEPTH) as line:
        y, other = (e.let(e.reinterpret("uint32", e.load(buffer, line * DEPTH, lanes=DEPTH), WIDTH)) for buffer in (room.turned, room.added))
        low, high = (how.finish(half(y, WIDTH), half(other, WIDTH)) for half in (e.upcast_low, e.upcast_high))
        e.store(room.turned, e.halves(t.bfloat16_pairs(low, high), WIDTH), line * DEPTH, lanes=DEPTH)


def _turn(how: Tiles, finished: Any, put: Any) -> None:
    """Round to bfloat16 and transpose: put(row, output, lanes, values) for every row of the panel."""
    r, pairs = how.layout.r, how.layout.r // 2
    batch = min(pairs * how.across, WIDTH)           # vectors of pairs of outputs that are transposed together
    count = min(pairs, batch)                        # pairs of a row of y
    for first in range(0, pairs * how.across, batch):
        words = []
        for v, pair in (divmod(which, pairs) for which in range(first, first + batch)):
            low, high = (e.load(finished, (v * r + output) * WIDTH, lanes=WIDTH) for output in (2 * pair, 2 * pair + 1))
            words.append(e.let(t.bfloat16_pairs(low, high)))
        lines = e.transpose([*words, *[words[-1]] * (WIDTH - batch)])
        for m, line in enumerate(lines):
            for start in range(0, batch, count):
                v, pair = divmod(first + start, pairs)
                value = line if count == WIDTH else e.part(line, start, count)
                put(v * WIDTH + m, 2 * pair, 2 * count, e.reinterpret("uint16", value, 2 * count))
