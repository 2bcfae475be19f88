"""Vectors and their bits, in the vocabulary of emit, which has these names too: lanes, shuffles, conversions, the halves of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as builder

Expr = Any
let = builder.Bind


def join(parts: Sequence[Expr], lanes: int) -> Expr:
    """One vector from scalars or vectors of that many lanes each."""
    return tirx.Shuffle(list(parts), [tirx.const(i, "int32") for i in range(len(parts) * lanes)])


def lane(vector: Expr, number: int) -> Expr:
    """One element of a vector."""
    return tirx.Shuffle([vector], [tirx.const(number, "int32")])


def part(vector: Expr, first: int, lanes: int) -> Expr:
    """Neighbouring elements of a vector."""
    return tirx.Shuffle([vector], [tirx.const(first + i, "int32") for i in range(lanes)])


def broadcast(value: Expr, lanes: int) -> Expr:
    """A scalar in all lanes of a vector."""
    return tirx.Broadcast(value, lanes) if lanes > 1 else value


def zero() -> Expr:
    """0 in float32."""
    return tirx.const(0.0, "float32")


def cast_to(dtype: str, value: Expr, lanes: int = 1) -> Expr:
    """`value`, of that many lanes, converted to `dtype`."""
    return tirx.Cast(vector_type(dtype, lanes), value)


def reinterpret(dtype: str, value: Expr, lanes: int = 1) -> Expr:
    """The same bits as `lanes` elements of dtype."""
    return tirx.reinterpret(vector_type(dtype, lanes), value)


def halves(words: Expr, lanes: int) -> Expr:
    """The uint16 halves of that many words, low before high."""
    return reinterpret("uint16", words, 2 * lanes)


def constant(value: float, dtype: str) -> Expr:
    """A number of a dtype."""
    return tirx.const(value, dtype)


def shuffle(low: Expr, high: Expr, lanes: Sequence[int]) -> Expr:
    """The lanes of two vectors, counted through both, in this order."""
    return tirx.Shuffle([low, high], [tirx.const(lane, "int32") for lane in lanes])


def transpose(rows: Sequence[Expr]) -> list[Expr]:
    """n vectors of n lanes -> their transpose: log2(n) butterfly stages of shuffles; stage s swaps bit s of row and lane numbers."""
    n, current, bit = len(rows), list(rows), 1
    while bit < n:
        before = list(current)
        for i in (i for i in range(n) if not i & bit):
            low, high = before[i], before[i | bit]
            current[i] = let(shuffle(low, high, [lane if not lane & bit else (lane ^ bit) + n for lane in range(n)]))
            current[i | bit] = let(shuffle(low, high, [lane | bit if not lane & bit else lane + n for lane in range(n)]))
        bit *= 2
    return current


def upcast_low(word: Expr, lanes: int) -> Expr:
    """The float32 of the bfloat16 in the low half of each uint32."""
    return tirx.reinterpret(vector_type("float32", lanes), word << broadcast(tirx.const(16, "uint32"), lanes))


def upcast_high(word: Expr, lanes: int) -> Expr:
    """The float32 of the bfloat16 in the high half of each uint32."""
    return tirx.reinterpret(vector_type("float32", lanes), word & broadcast(tirx.const(0xFFFF0000, "uint32"), lanes))


def upper_half(value: Expr, lanes: int) -> Expr:
    """uint16: the bfloat16 whose bits are the upper half of a float32 (exact for what was a bfloat16 before)."""
    bits = tirx.reinterpret(vector_type("uint32", lanes), value)
    return cast_to("uint16", bits >> broadcast(tirx.const(16, "uint32"), lanes), lanes)


def rounded(value: Expr, lanes: int) -> Expr:
    """uint32: the bits of the bfloat16 nearest to each float32, the even one of two; any NaN is the quiet one."""
    def every(n: int) -> Expr:
        return broadcast(tirx.const(n, "uint32"), lanes)

    value = let(value)
    bits = let(reinterpret("uint32", value, lanes))
    nearest = (bits + every(0x7FFF) + ((bits >> every(16)) & every(1))) >> every(16)
    return tirx.Select(tirx.NE(value, value), every(0x7FC0), nearest)


def rounded_pairs(low: Expr, high: Expr, lanes: int) -> Expr:
    """int32 words of two float32 each, rounded likewise."""
    return reinterpret("int32", rounded(low, lanes) | (rounded(high, lanes) << broadcast(tirx.const(16, "uint32"), lanes)), lanes)


def absolute(value: Expr, lanes: int) -> Expr:
    """|value| of float32; a NaN stays one."""
    return reinterpret("float32", reinterpret("uint32", value, lanes) & broadcast(tirx.const(0x7FFFFFFF, "uint32"), lanes), lanes)


def upcast_pairs(words: Expr, lanes: int) -> list[Expr]:
    """The float32 of the low halves of int32 words of two bfloat16, and of the high halves."""
    bits = let(reinterpret("uint32", words, lanes))
    return [upcast_low(bits, lanes), upcast_high(bits, lanes)]


def pair(low: Expr, high: Expr, lanes: int) -> Expr:
    """int32 words of two uint16 each."""
    word = cast_to("uint32", low, lanes) | (cast_to("uint32", high, lanes) << broadcast(tirx.const(16, "uint32"), lanes))
    return tirx.reinterpret(vector_type("int32", lanes), word)


def interleave(low: Expr, high: Expr, lanes: int) -> list[Expr]:
    """The same of all lanes, as two vectors of words of the first and the last half of them."""
    vectors = [let(low), let(high)]
    order = [[tirx.const(number, "int32") for i in range(first, first + lanes // 2) for number in (i, i + lanes)] for first in (0, lanes // 2)]
    return [let(tirx.reinterpret(vector_type("int32", lanes // 2), tirx.Shuffle(vectors, part))) for part in order]


def pair_upper(low: Expr, high: Expr, lanes: int) -> Expr:
    """int32 words of the bfloat16 whose bits are the upper halves of two float32."""
    words = [reinterpret("uint32", value, lanes) for value in (low, high)]
    word = (words[0] >> broadcast(tirx.const(16, "uint32"), lanes)) | (words[1] & broadcast(tirx.const(0xFFFF0000, "uint32"), lanes))
    return reinterpret("int32", word, lanes)


def vector_type(dtype: str, lanes: int) -> str:
    """The dtype of so many of a dtype."""
    return f"{dtype}x{lanes}" if lanes > 1 else dtype
