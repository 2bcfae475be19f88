"""select for many rows of x, in one pass: x where its score reaches the limit, the centre elsewhere.

Bound by: the bandwidth at which x is read and written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e

LANES = 16


@dataclass(frozen=True)
class SelectRows:
    """How: with a scale, with a centre; on torch's threads or on the caller's alone.

    apart   y is float32, and what lies between x and the centre: 0 where that is not selected
    """

    dtype: str       # of x and y: "float32" or "bfloat16"
    scaled: bool
    centered: bool
    parallel: bool
    apart: bool = False
    name = "select_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], limit [1 or M], scale [K], center [K], y [M, K]); scale and center of any size where there is none."""
        return e.function("main", lambda: _body(self))


def _body(how: SelectRows) -> None:
    M, K, L = (e.int32() for _ in range(3))
    x, limit = e.argument((M, K), how.dtype), e.argument((L,), "float32")
    scale, center = (e.argument((K if given else e.int32(),), "float32") for given in (how.scaled, how.centered))
    y = e.argument((M, K), "float32" if how.apart else how.dtype)

    def one(m: Any, at: Any, lanes: int) -> None:
        value = e.let(e.read_float(x, m, at, lanes=lanes))
        middle = e.load(center, at, lanes=lanes) if how.centered else e.broadcast(e.zero(), lanes)
        distance = e.let(value - middle) if how.centered else value
        size = e.absolute(distance, lanes)
        score = size * e.load(scale, at, lanes=lanes) if how.scaled else size
        least = e.broadcast(e.load(limit, e.minimum(m, L - 1)), lanes)
        kept = (e.broadcast(e.zero(), lanes), distance) if how.apart else (middle, value)
        e.write_float(y, tirx.Select(score < least, *kept), m, at, lanes=lanes)

    whole = e.floordiv(K, LANES)
    with e.loop(M, parallel=how.parallel) as m:
        with e.loop(whole) as block:
            one(m, e.let(block * LANES), LANES)
        with e.loop(K - whole * LANES) as rest:
            one(m, e.let(whole * LANES + rest), 1)
