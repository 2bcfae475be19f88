"""A gated FFN for one row of x that reads all of its gate, and of up and down only the neurons that the gate selects.

Three parallel steps: the gate's products with x and their activation; for the selected neurons, which are written next to each other between the
two, the products of up (products.py); the selected rows of down, added up as gather_rows.py does.

Bound by: the bandwidth at which the weights arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen import emit_tiles as t
from sparsify_compiler.codegen.kernels.ffn_parts import Arguments, each_group
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.gather_rows import LANES, PARTS
from sparsify_compiler.codegen.kernels.products import TOGETHER as NEURONS
from sparsify_compiler.codegen.kernels.products import products
from sparsify_compiler.codegen.vectors import AVX512, Vectors
from sparsify_compiler.ops import select_ffn

GROUPS = 4       # of 16 neurons in a task


@dataclass(frozen=True)
class FfnRows:
    """How: `columns` outputs of down a task (a multiple of 64), on torch's threads or on the caller's alone."""

    dtype: str       # of x, the weights and y: "float32" or "bfloat16"
    activation: str
    columns: int
    scaled: bool
    parallel: bool
    cut_for: Vectors = AVX512
    name = "ffn_rows"

    def compute(self) -> Any:
        """The PrimFunc of ffn_parts.Arguments, by scale [H] where there is one.

        H a multiple of 16, K of 16 (32 for bfloat16). Weights of bfloat16 come as int32 words of two; bias as in GatherRows.
        """
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: FfnRows) -> None:
    a = Arguments(how, "vector" if how.scaled else "")
    gates = e.scratch(a.H, "float32")
    with each_group(a.H, GROUPS, how.parallel) as first:
        total = products(a.gate, [first + n for n in range(NEURONS)], a.inputs, 0, a.K, how.dtype) + e.load(a.gate_bias, first, lanes=NEURONS)
        e.store(gates, Finish(activation=how.activation)(total), first, lanes=NEURONS)
    count = _select(a, gates, how.scaled)
    with each_group(count, GROUPS, how.parallel) as first:
        ups = a.projected(how, a.up, a.up_bias, a.rows(first, count), select_ffn.UP.get(how.activation, ""))
        e.store(a.chosen.values, e.load(a.chosen.values, first, lanes=NEURONS) * ups, first, lanes=NEURONS)
    a.sum_up(how, count)


def _select(a: Arguments, gates: Any, scaled: bool) -> Any:
    """Write the selected gates and their places next to each other; their number."""
    found = e.stack(1, "int32")
    e.store(found, tirx.const(0, "int32"), 0)
    with e.llvm(PARTS.read_text()), e.loop(e.floordiv(a.H, LANES)) as group:
        at, count = e.let(group * LANES), e.let(e.load(found, 0))
        value = e.let(e.load(gates, at, lanes=LANES))
        size = e.absolute(value, LANES)
        score = e.let(size * e.load(a.by, at, lanes=LANES) if scaled else size)
        mask = e.let(e.external("int32", "selected", score, e.load(a.limit, 0)))
        e.builder.evaluate(tirx.call_extern("int32", "compress_values", t.address(a.chosen.values, count), value, mask))
        e.store(found, count + tirx.call_extern("int32", "compress_places", t.address(a.chosen.places, count), at, mask), 0)
    return e.let(e.load(found, 0))
