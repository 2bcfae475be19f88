"""The mean of the last dimension of float32, as pooling over whole images takes it: rows on threads, vectors along a row.

Bound by: the bandwidth of x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.norm_rows import mean_of
from sparsify_compiler.codegen.kernels.powers import powers
from sparsify_compiler.codegen.kernels.row_loops import LANES, each


@dataclass(frozen=True)
class MeanRows:
    """How: numbers in a row; threads."""

    size: int
    workers: int
    name = "mean_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], y [M])."""
        return e.function("main", lambda: _body(self))


def _body(how: MeanRows) -> None:
    M, K = e.int32(), e.int32()
    x, y = e.argument((M, K), "float32"), e.argument((M,), "float32")

    def row(number: Any) -> None:
        with powers(LANES):
            e.store(y, mean_of(how.size, x, number), number)

    each(M, how.size, how.workers, row)
