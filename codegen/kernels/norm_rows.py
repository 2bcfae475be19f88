"""LayerNorm and RMSNorm of the last dimension, for graphs that run without torch: rows on threads, vectors along a row, sums in float32.

The mean and the variance are taken one after the other, from values that are in L1 by then: a single pass over squares would lose digits.

Bound by: the bandwidth of x and y.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.powers import powers, total
from sparsify_compiler.codegen.kernels.row_loops import LANES, each, over_row


@dataclass(frozen=True)
class NormRows:
    """How: numbers in a row, what is added to the variance, whether the mean is taken off, whether there are a weight and a bias; threads.

    dtypes  of x and y, and of weight and bias: float32 or bfloat16
    """

    size: int
    eps: float
    centred: bool
    weight: bool
    bias: bool
    workers: int
    dtypes: tuple[str, str] = ("float32", "float32")
    name = "norm_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], (weight [K],) (bias [K],) y [M, K])."""
        return e.function("main", lambda: _body(self))


def _body(how: NormRows) -> None:
    M, K = e.int32(), e.int32()
    x = e.argument((M, K), how.dtypes[0])
    weight = e.argument((K,), how.dtypes[1]) if how.weight else None
    bias = e.argument((K,), how.dtypes[1]) if how.bias else None
    y = e.argument((M, K), how.dtypes[0])

    def row(number: Any) -> None:
        with powers(LANES):
            _row(how, x, weight, bias, y, number)

    each(M, how.size, how.workers, row)


def _row(how: NormRows, x: Any, weight: Any, bias: Any, y: Any, row: Any) -> None:
    mean = mean_of(how.size, x, row) if how.centred else None
    variance = mean_of(how.size, x, row, e.zero() if mean is None else mean)
    scale = e.let(e.constant(1.0, "float32") / tirx.sqrt(variance + e.constant(how.eps, "float32")))

    def value(place: Any, lanes: int) -> Any:
        found = e.read_float(x, row, place, lanes=lanes)
        found = found if mean is None else found - e.broadcast(mean, lanes)
        found = found * e.broadcast(scale, lanes)
        found = found if weight is None else found * e.read_float(weight, place, lanes=lanes)
        return found if bias is None else found + e.read_float(bias, place, lanes=lanes)

    def vectors(places: list[Any]) -> None:
        for place in places:
            e.write_float(y, value(place, LANES), row, place, lanes=LANES)

    over_row(how.size, vectors, lambda place: e.write_float(y, value(place, 1), row, place))


def mean_of(size: int, x: Any, row: Any, around: Any = None) -> Any:
    """The mean of a row, or of its squared distances from a number."""
    sums = [e.Register(LANES, e.broadcast(e.zero(), LANES)) for _ in range(4)]
    rest = e.stack(1, "float32")
    e.store(rest, e.zero(), 0)

    def found(place: Any, lanes: int) -> Any:
        value = e.read_float(x, row, place, lanes=lanes)
        if around is None:
            return value
        distance = e.let(value - e.broadcast(around, lanes))
        return distance * distance

    def vectors(places: list[Any]) -> None:
        for register, place in zip(sums, places, strict=False):
            register.set(register.get() + found(place, LANES))

    over_row(size, vectors, lambda place: e.store(rest, e.load(rest, 0) + found(place, 1), 0))
    whole = (sums[0].get() + sums[1].get()) + (sums[2].get() + sums[3].get())
    return e.let((total(whole, LANES) + e.load(rest, 0)) * e.constant(1.0 / size, "float32"))
