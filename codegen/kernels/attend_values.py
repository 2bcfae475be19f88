"""Values as AMX tiles of [column][key], for attend_tiles.py: 32 keys a step, all columns in tiles of 16; and those that are no finite numbers."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels import softmax
from sparsify_compiler.codegen.kernels.attend_arguments import Places
from sparsify_compiler.codegen.kernels.softmax import LANES

DEPTH = 32          # keys of a step
TILE = 512          # numbers of a tile
INFINITE = 0x7F800000   # the exponent's bits of what is infinite or no number


def pack_step(a: Any, values: Any, places: Places, first: Any, number: Any) -> None:
    """The values of 32 keys from `first` on into step `number`. Keys past the last repeat it: their shares are 0."""
    found_bad = e.Register(1, e.constant(0, "int32"), "int32")
    with e.loop(tirx.truncdiv(a.wide, DEPTH)) as chunk:
        column = e.opaque(chunk * DEPTH)
        low, high = [], []
        for pair in range(LANES):
            both = []
            for i in range(2):
                at = e.wide(places.at("value", e.minimum(first + pair * 2 + i, a.K - 1)) + e.cast("int64", column))
                words = e.let(tirx.call_extern("int32x16", "load_halves", t.address(a.value.elements, at), e.opaque(a.E - column)))
                found_bad.set(found_bad.get() | e.external("int32", "bad_halves", words))
                both.append(e.let(e.halves(e.let(e.external("int32x16", "finite_halves", words)), LANES)))
            for side, found in enumerate((low, high)):
                lanes = [half for i in range(LANES) for half in (side * LANES + i, DEPTH + side * LANES + i)]
                found.append(e.let(e.reinterpret("int32", e.shuffle(*both, lanes), LANES)))
        for side, found in enumerate((low, high)):
            to = e.opaque((number * a.wide + column + side * LANES) * DEPTH)
            for i, line in enumerate(e.transpose(found)):
                e.store(values.packed, e.halves(line, LANES), to + i * DEPTH, lanes=DEPTH)
    e.store(values.bad, found_bad.get(), number)


def bad(values: Any, base: Any, steps: Any) -> Any:
    """Is any value of these steps infinite, or no number?"""
    found = e.stack(1, "int32")
    e.store(found, e.constant(0, "int32"), 0)
    with e.loop(steps) as step:
        e.store(found, e.load(found, 0) | e.load(values.bad, base + step), 0)
    return tirx.NE(e.load(found, 0), 0)


def spoil(how: Any, a: Any, room: Any, places: Places, keys: Any) -> None:
    """Add what the tiles left out to the rows that read it."""
    with e.loop(keys.count) as n, e.loop(a.E) as column:
        at = e.wide(places.at("value", keys.first + n) + e.cast("int64", column))
        value = e.let(e.read_float(a.value.elements, at))
        exponent = e.reinterpret("int32", value) & INFINITE
        with e.when(tirx.EQ(exponent, INFINITE)), e.loop(how.vectors) as v:
            pair = e.let(tirx.truncdiv(n, 2))
            words = e.let(e.load(room.shares, pair * how.rows + v * LANES, lanes=LANES))
            low, high = e.upcast_pairs(words, LANES)
            share = e.let(tirx.Select(e.broadcast(tirx.EQ(pair * 2, n), LANES), low, high))
            place = e.let(column * how.rows + v * LANES)
            total = e.let(e.load(room.sums, place, lanes=LANES))
            more = softmax.fma(share, e.broadcast(value, LANES), total)
            e.store(room.sums, tirx.Select(softmax.counted(share), more, total), place, lanes=LANES)
