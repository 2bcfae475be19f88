"""y = x Wᵀ + bias, dense, for few rows of x: W is read once, in order, where the model holds it.

A task takes runs of 16 outputs, whose weights lie behind each other; every row of x is multiplied with them while they are in the cache.

Bound by: the bandwidth at which W arrives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.products import LANES, TOGETHER, copy_inputs, products
from sparsify_compiler.codegen.vectors import AVX512, Vectors

GROUPS = 4       # runs of outputs in a task


@dataclass(frozen=True)
class StreamRows:
    """How: on torch's threads or on the caller's alone."""

    dtype: str       # of x, W and y: "float32" or "bfloat16"
    parallel: bool
    cut_for: Vectors = AVX512
    name = "stream_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], weight [N, K], bias [N or more], y [M, N]); K a multiple of 16 (32 for bfloat16), N of any size from 1 on.

        Weights of bfloat16 come as int32 words of two, [N, K / 2]; the bias is float32 and reaches to the next multiple of 16.
        """
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: StreamRows) -> None:
    M, N, K = (e.int32() for _ in range(3))
    x = e.argument((M, K), how.dtype)
    weight = e.argument((N, e.int32()), "float32" if how.dtype == "float32" else "int32")
    bias = e.argument((e.int32(),), "float32")
    y = e.argument((M, N), how.dtype)
    inputs = e.scratch(M * K, "float32")
    with e.loop(M) as m:
        copy_inputs(inputs, x, m, m * K, K, how.dtype)
    groups = e.let(e.floordiv(N + (TOGETHER - 1), TOGETHER))
    tasks = e.floordiv(groups + (GROUPS - 1), GROUPS)
    with e.loop(tasks, parallel=how.parallel) as task, e.loop(e.minimum(groups - task * GROUPS, GROUPS)) as i:
        first = e.let((task * GROUPS + i) * TOGETHER)
        rows = [e.let(e.minimum(first + n, N - 1)) for n in range(TOGETHER)]
        with e.loop(M) as m:
            total = products(weight, rows, inputs, m * K, K, how.dtype) + e.load(bias, first, lanes=LANES)
            e.store_tail(y, total, LANES, m, first, N)
