"""Powers and logarithms of two, for softmax: everything in base 2, scores being scaled by log2(e) beforehand.

A score of minus infinity does not count. What a place that does not count contributes is written as -0.0, which no power of two is.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.finish import constant

LANES = 16     # of AVX-512
ATANH = (2 / 9, 2 / 7, 2 / 5, 2 / 3, 2.0)    # ln((1 + t) / (1 - t)) by odd powers of t
ABSENT = -2**31     # the bits of -0.0


def lanes(value: float) -> Any:
    """A number in all lanes."""
    return e.broadcast(tirx.const(value, "float32"), e.lanes())


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c lane by lane, rounded once."""
    return e.let(tirx.call_llvm_pure_intrin(e.floats(e.lanes()), "llvm.fma", a, b, c))


def larger(value: Any, least: Any) -> Any:
    """The maximum, lane by lane; `value` where that is no number."""
    return e.let(e.external(e.floats(e.lanes()), "larger", value, least))


def exp2(power: Any, rough: bool = False) -> Any:
    """2 ** power, about 1e-38 where it would be less, NaN for NaN; relative error 9e-8, or 8e-5. Inside of `with e.llvm(attend.ll)`."""
    return e.let(e.external(e.floats(e.lanes()), "exp2_rough" if rough else "exp2", power))


def log2(value: Any) -> Any:
    """Of normal numbers; NaN for NaN."""
    bits = e.let(e.reinterpret("int32", value, e.lanes()))
    split = 0x3F3504F3  # sqrt(1/2): the fraction is between that and its double
    exponent = e.let((bits - _words(split)) >> _words(23))
    fraction = e.let(e.reinterpret("float32", bits - (exponent << _words(23)), e.lanes()))
    t = e.let((fraction - lanes(1.0)) / (fraction + lanes(1.0)))
    square, total = e.let(t * t), lanes(ATANH[0])
    for coefficient in ATANH[1:]:
        total = fma(total, square, lanes(coefficient))
    found = fma(e.let(total * t), lanes(math.log2(math.e)), e.cast_to("float32", exponent, e.lanes()))
    return unless_nan(value, found)


def unless_nan(value: Any, other: Any) -> Any:
    """`other`, lane by lane; NaN where `value` is."""
    return e.let(e.external(e.floats(e.lanes()), "unless_nan", value, e.let(other)))


def counted(share: Any) -> Any:
    """Lane by lane: is this no absent place's share?"""
    return tirx.NE(e.reinterpret("int32", share, e.lanes()), _words(ABSENT))


def finite_top(top: Any) -> Any:
    """The largest score of a row, 0 for one that has none."""
    return e.let(tirx.Select(tirx.EQ(top, constant(-math.inf, top)), lanes(0.0), top))


def _words(value: int) -> Any:
    return e.broadcast(tirx.const(value, "int32"), e.lanes())
