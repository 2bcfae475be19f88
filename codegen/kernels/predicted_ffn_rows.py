"""An FFN for one row of x that reads, of gate, up and down, only the neurons whose scores reach a limit.

The places of the chosen neurons are written next to each other; then, in two parallel steps, the products of gate and up for them (products.py), and
their rows of down, added up as gather_rows.py does.

Bound by: the bandwidth at which the chosen weights arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.ffn_parts import Arguments, each_group
from sparsify_compiler.codegen.kernels.gather_rows import LANES, PARTS
from sparsify_compiler.codegen.kernels.products import TOGETHER as NEURONS
from sparsify_compiler.codegen.vectors import AVX512, Vectors
from sparsify_compiler.ops import select_ffn

GROUPS = 2       # of 16 neurons in a task


@dataclass(frozen=True)
class PredictedFfnRows:
    """How: `columns` outputs of down a task (a multiple of 64), with a gate or without, on torch's threads or on the caller's alone."""

    dtype: str       # of x, the weights and y: "float32" or "bfloat16"
    activation: str
    columns: int
    gated: bool
    parallel: bool
    cut_for: Vectors = AVX512
    name = "predicted_ffn_rows"

    def compute(self) -> Any:
        """The PrimFunc of ffn_parts.Arguments, by scores [1, H].

        H a multiple of 16, K of 16 (32 for bfloat16). Weights of bfloat16 come as int32 words of two; bias as in GatherRows.
        """
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: PredictedFfnRows) -> None:
    a = Arguments(how, "rows", how.gated)
    count = _choose(a)
    with each_group(count, GROUPS, how.parallel) as first:
        rows = a.rows(first, count)
        total = a.projected(how, a.gate, a.gate_bias, rows, how.activation)
        if how.gated:
            total = total * a.projected(how, a.up, a.up_bias, rows, select_ffn.UP.get(how.activation, ""))
        e.store(a.chosen.values, total, first, lanes=NEURONS)
    a.sum_up(how, count)


def _choose(a: Arguments) -> Any:
    """Write the places of the chosen neurons next to each other; their number."""
    found = e.stack(1, "int32")
    e.store(found, tirx.const(0, "int32"), 0)
    with e.llvm(PARTS.read_text()), e.loop(e.floordiv(a.H, LANES)) as group:
        at, count = e.let(group * LANES), e.let(e.load(found, 0))
        mask = e.let(e.external("int32", "selected", e.load(a.by, 0, at, lanes=LANES), e.load(a.limit, 0)))
        taken = tirx.call_extern("int32", "compress_places", t.address(a.chosen.places, count), at, mask)
        e.store(found, count + taken, 0)
    return e.let(e.load(found, 0))
