"""softmax of the last dimension of float32, for graphs that run without torch: rows on threads, vectors along a row.

A row of minus infinity only has no shares, as in torch: NaN.

Bound by: exponentials, about ten instructions a vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.powers import exp2, larger, largest, powers, total
from sparsify_compiler.codegen.kernels.row_loops import LANES, each, over_row

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class SoftmaxRows:
    """How: numbers in a row; threads."""

    size: int
    workers: int
    name = "softmax_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], y [M, K])."""
        return e.function("main", lambda: _body(self))


def _body(how: SoftmaxRows) -> None:
    M, K = e.int32(), e.int32()
    x, y = e.argument((M, K), "float32"), e.argument((M, K), "float32")

    def row(number: Any) -> None:
        with powers(LANES):
            _row(how, x, y, number)

    each(M, how.size * 4, how.workers, row)


def _row(how: SoftmaxRows, x: Any, y: Any, row: Any) -> None:
    tops, top_left, sums, rest = (e.Register(LANES, _lanes(value)) for value in (-math.inf, -math.inf, 0.0, 0.0))

    def find(places: list[Any]) -> None:
        for place in places:
            tops.set(larger(tops.get(), e.load(x, row, place, lanes=LANES), LANES))

    over_row(how.size, find, lambda place: top_left.set(larger(top_left.get(), e.broadcast(e.load(x, row, place), LANES), LANES)))
    top = largest(larger(tops.get(), top_left.get(), LANES), LANES)

    def share(place: Any, lanes: int) -> Any:
        distance = e.let((e.load(x, row, place, lanes=lanes) - e.broadcast(top, lanes)) * e.broadcast(e.constant(LOG2_E, "float32"), lanes))
        return exp2(distance, LANES) if lanes > 1 else e.let(e.lane(exp2(e.broadcast(distance, LANES), LANES), 0))

    def raised(places: list[Any]) -> None:
        for place in places:
            value = share(place, LANES)
            sums.set(sums.get() + value)
            e.store(y, value, row, place, lanes=LANES)

    def one(place: Any) -> None:
        value = share(place, 1)
        rest.set(rest.get() + e.broadcast(value, LANES))
        e.store(y, value, row, place)

    over_row(how.size, raised, one)
    scale = e.let(e.constant(1.0, "float32") / (total(sums.get(), LANES) + e.lane(rest.get(), 0)))

    def scaled(places: list[Any]) -> None:
        for place in places:
            e.store(y, e.load(y, row, place, lanes=LANES) * e.broadcast(scale, LANES), row, place, lanes=LANES)

    over_row(how.size, scaled, lambda place: e.store(y, e.load(y, row, place) * scale, row, place))


def _lanes(value: float) -> Any:
    return e.broadcast(e.constant(value, "float32"), LANES)
