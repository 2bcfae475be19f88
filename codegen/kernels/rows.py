"""y = x Wᵀ + bias for few rows of x: one row at a time, vectorised over the r outputs of a group, so that W is read once, in order.

A row of x is first copied to float32 with a zero behind it (what absent places of W point at). Several columns of a group are summed apart,
which hides the latency of the FMA. Used for one row of x, and for a few of them where blocks leave the registers nothing better to do.

Bound by: the bandwidth at which W arrives (r = 16); the load ports for r = 1, which needs an index, an input and a weight for each FMA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.layout import LANES, OUTPUTS, Layout, arguments, weights_of


@dataclass(frozen=True)
class Rows:
    """How: on torch's threads or on the caller's alone."""

    layout: Layout
    parallel: bool
    name = "rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], values, columns, pointers, bias, y [M, N])."""
        return e.function("main", lambda: _body(self))


def _body(how: Rows) -> None:
    a, r = arguments(how.layout), how.layout.r
    inputs = e.scratch(a.M * (a.K + 1), "float32")
    with e.loop(a.M) as m:
        start = e.let(m * (a.K + 1))
        whole = e.let(e.floordiv(a.K, LANES))
        with e.loop(whole) as k:
            e.store(inputs, e.read_float(a.x, m, k * LANES, lanes=LANES), start + k * LANES, lanes=LANES)
        with e.loop(a.K, start=whole * LANES) as k:
            e.store(inputs, e.read_float(a.x, m, k), start + k)
        e.store(inputs, e.zero(), start + a.K)
    with e.loop(e.floordiv(a.N + (OUTPUTS - 1), OUTPUTS), parallel=how.parallel) as strip, e.loop(a.M) as m:
        sums = e.stack(OUTPUTS, "float32")
        start = e.let(m * (a.K + 1))
        with e.loop(OUTPUTS // r) as g:
            group = e.let(strip * (OUTPUTS // r) + g)
            e.store(sums, _group(a, how, inputs, start, group), g * r, lanes=r)
        e.store_tail(a.y, e.load(sums, 0, lanes=OUTPUTS), OUTPUTS, m, strip * OUTPUTS, a.N)


def _group(a: Any, how: Rows, inputs: Any, start: Any, group: Any) -> Any:
    """The r outputs of one group."""
    r, unroll = how.layout.r, how.layout.unroll
    first, last = e.let(e.load(a.pointers, group)), e.let(e.load(a.pointers, group + 1))

    def x(place: Any) -> Any:
        return e.load(inputs, start + e.cast("int32", e.load(a.columns, place)))

    if r == 1:
        return _dot(a, how, x, first, last, e.load(a.bias, group))
    partial = [e.Register(r, e.load(a.bias, group * r, lanes=r) if u == 0 else e.broadcast(e.zero(), r)) for u in range(unroll)]
    with e.loop(e.floordiv(last - first, unroll)) as j:
        for u, total in enumerate(partial):
            total.multiply_add(e.broadcast(x(first + j * unroll + u), r), weights_of(a, how.layout, first + j * unroll, u, 0, lanes=r))
    while len(partial) > 1:
        for low, high in zip(partial[::2], partial[1::2], strict=True):
            low.set(low.get() + high.get())
        partial = partial[::2]
    return partial[0].get()


def _dot(a: Any, how: Rows, x: Any, first: Any, last: Any, bias: Any) -> Any:
    """One output alone: `unroll` inputs are put together into a vector, so that their weights come with one load and one FMA."""
    unroll = how.layout.unroll
    total = e.Register(unroll, e.broadcast(e.zero(), unroll))
    with e.loop(e.floordiv(last - first, unroll)) as j:
        place = e.let(first + j * unroll)
        if how.layout.step == 1:
            order, weights = range(unroll), e.load(a.values, place, lanes=unroll)
        else:
            words = e.let(e.cast_to("uint32", e.load(a.values, e.floordiv(place, 2), lanes=unroll // 2), unroll // 2))
            order = [*range(0, unroll, 2), *range(1, unroll, 2)]
            weights = e.join([e.upcast_low(words, unroll // 2), e.upcast_high(words, unroll // 2)], unroll // 2)
        total.multiply_add(e.join([x(place + u) for u in order], 1), weights)
    lanes = [e.lane(total.get(), i) for i in range(unroll)]
    while len(lanes) > 1:
        lanes = [low + high for low, high in zip(lanes[::2], lanes[1::2], strict=True)]
    return lanes[0] + bias
