"""What is no number in TVM's own operators, as in torch: it is the largest and the least of all, and unlike itself.

TVM's Max and Min give the other of two, its `!=` says that they are alike, and a value equals itself by its simplifier, whatever it is.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm_ffi import structural_equal, structural_map


def numbers_as_torch(function: Any) -> Any:
    """The same function, in whose extremes and comparisons what is no number counts as in torch."""
    return structural_map(function, callbacks=[(tirx.Max, _larger), (tirx.Min, _smaller), (tirx.NE, _unlike), (tirx.EQ, _alike), (tirx.Not, _not)])


def _larger(found: Any) -> Any:
    return _extreme(found, lambda a, b: a > b)


def _smaller(found: Any) -> Any:
    return _extreme(found, lambda a, b: a < b)


def _extreme(found: Any, first: Any) -> Any:
    a, b = found.a, found.b
    if not _is_float(a):
        return found
    if isinstance(a, tirx.FloatImm):    # one of two orders reaches both: a constant is the second
        a, b = b, a
    return tirx.Select(_any(first(a, b), _is_none(a)), a, b)


def _unlike(found: Any) -> Any:
    return _any(found, *map(_is_none, (found.a, found.b))) if _is_float(found.a) else found


def _alike(found: Any) -> Any:
    """The simplifier makes True of a value that is compared with itself."""
    return tirx.Not(_is_none(found.a)) if _is_float(found.a) and structural_equal(found.a, found.b) else found


def _not(found: Any) -> Any:
    """The simplifier turns a comparison around: what is no number would be on the other side of it, where it is on neither."""
    asked = found.a
    ordered = isinstance(asked, tirx.LT | tirx.LE | tirx.GT | tirx.GE)
    return _any(found, *map(_is_none, (asked.a, asked.b))) if ordered and _is_float(asked.a) else found


def _any(*conditions: Any) -> Any:
    """Is one of these true? None stands for what cannot be."""
    known = [one for one in conditions if one is not None]
    whole = known[0]
    for one in known[1:]:
        whole = tirx.Or(whole, one)
    return whole


def _is_none(value: Any) -> Any:
    """Is this no number? None of a constant, which is one."""
    if isinstance(value, tirx.FloatImm) and not math.isnan(value.value):
        return None
    return tirx.isnan(value if _dtype(value) in ("float32", "float64") else tirx.Cast("float32", value))


def _is_float(value: Any) -> bool:
    return _dtype(value).startswith(("float", "bfloat"))


def _dtype(value: Any) -> str:
    return str(value.ty).partition("x")[0]
