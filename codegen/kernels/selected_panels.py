"""y = select(x) W + bias for many rows of x, W input by input: what is selected (select_rows.py), multiplied with all of W (dense_panel.py).

Bound by: the FMA rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.host import emit_within
from sparsify_compiler.codegen.kernels.dense_panel import DensePanel
from sparsify_compiler.codegen.kernels.finish import NOTHING, Finish
from sparsify_compiler.codegen.kernels.gather_rows import weight_argument
from sparsify_compiler.codegen.kernels.select_rows import SelectRows
from sparsify_compiler.codegen.vectors import AVX512, Vectors


@dataclass(frozen=True)
class SelectedPanels:
    """How: with a scale, with a centre; work split for this many threads (1: on the caller's alone); what follows the sums.

    dtype, out  of x and the weight; of y, if it is another
    given       of x, if it is another
    """

    dtype: str
    scaled: bool
    centered: bool
    workers: int
    out: str = ""
    given: str = ""
    finish: Finish = NOTHING
    cut_for: Vectors = AVX512
    name = "selected_panels"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], limit [1 or M], scale [K], center [K], weight [K, W], bias [W], y [M, N]) as of GatherRows."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: SelectedPanels) -> None:
    M, N, K = (e.int32() for _ in range(3))
    x, limit = e.argument((M, K), how.given or how.dtype), e.argument((e.int32(),), "float32")
    scale, center = (e.argument((K if there else e.int32(),), "float32") for there in (how.scaled, how.centered))
    weight, bias, y = weight_argument(K, how.dtype), e.argument((e.int32(),), "float32"), e.argument((M, N), how.out or how.dtype)
    chosen = e.matrix(M, K)
    select = SelectRows(how.given or how.dtype, how.scaled, how.centered, how.workers > 1, apart=True)
    emit_within(select, [x, limit, scale, center, chosen])
    emit_within(DensePanel("inputs", how.workers, how.finish, "float32", how.dtype, how.out or how.dtype, how.cut_for), [chosen, weight, bias, y])
