"""An activation of every element of a tensor, after another one was added to it where one is, for graphs that run without torch.

Bound by: bandwidth, or the exponentials of what has them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.row_loops import LANES, each

BLOCK = 1024        # elements of a task


@dataclass(frozen=True)
class PointwiseFlat:
    """How: what is computed; threads; float32 or bfloat16."""

    finish: Finish
    workers: int
    dtype: str = "float32"
    name = "pointwise_flat"

    def compute(self) -> Any:
        """The PrimFunc f(x [T], (other [T],) y [T])."""
        return e.function("main", lambda: _body(self))


def _body(how: PointwiseFlat) -> None:
    T = e.int32()
    x = e.argument((T,), how.dtype)
    other = e.argument((T,), how.dtype) if how.finish.add else None
    y = e.argument((T,), how.dtype)

    def value(place: Any, lanes: int) -> Any:
        return how.finish(e.read_float(x, place, lanes=lanes), None if other is None else e.read_float(other, place, lanes=lanes))

    def block(number: Any) -> None:
        start = e.let(number * BLOCK)
        count = e.let(e.minimum(T - start, BLOCK))
        whole = e.let(e.floordiv(count, LANES))
        with e.loop(whole) as i:
            place = e.let(start + i * LANES)
            e.write_float(y, value(place, LANES), place, lanes=LANES)
        with e.loop(count - whole * LANES) as i:
            place = e.let(start + whole * LANES + i)
            e.write_float(y, value(place, 1), place)

    each(e.let(e.floordiv(T + (BLOCK - 1), BLOCK)), BLOCK, how.workers, block)
