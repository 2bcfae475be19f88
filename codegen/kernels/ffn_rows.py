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
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.gather_rows import LANES, PARTS, Chosen, Sums, each_span, weight_argument
from sparsify_compiler.codegen.kernels.products import TOGETHER as NEURONS
from sparsify_compiler.codegen.kernels.products import copy_inputs, products
from sparsify_compiler.ops import select_ffn

GROUPS = 4       # of them in a task


@dataclass(frozen=True)
class FfnRows:
    """How: `columns` outputs of down a task (a multiple of 64), on torch's threads or on the caller's alone."""

    dtype: str       # of x, the weights and y: "float32" or "bfloat16"
    activation: str
    columns: int
    scaled: bool
    parallel: bool
    name = "ffn_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [1, K], limit [1], scale [H], gate [H, K], up [H, K], gate_bias [H], up_bias [H], weight [H, W], bias [W], y [1, N]).

        H a multiple of 16, K of 16 (32 for bfloat16). Weights of bfloat16 come as int32 words of two; bias as in GatherRows.
        """
        return e.function("main", lambda: _body(self))


class _Arguments:
    """The parameters, and what is written on the way."""

    def __init__(self, how: FfnRows) -> None:
        self.M, self.N, self.K, self.H, self.W = (e.int32() for _ in range(5))
        words = "float32" if how.dtype == "float32" else "int32"
        self.x = e.argument((self.M, self.K), how.dtype)
        self.limit = e.argument((e.int32(),), "float32")
        self.scale = e.argument((self.H if how.scaled else e.int32(),), "float32")
        self.gate, self.up = (e.argument((self.H, e.int32()), words) for _ in range(2))
        self.gate_bias, self.up_bias = (e.argument((self.H,), "float32") for _ in range(2))
        weight, bias = weight_argument(self.H, how.dtype), e.argument((self.W,), "float32")
        self.y = e.argument((self.M, self.N), how.dtype)
        self.inputs = e.scratch(self.K, "float32")    # x; for bfloat16 the even inputs, then the odd ones, of every load of weights
        self.gates = e.scratch(self.H, "float32")
        one = tirx.const(1, "int32")
        self.chosen, self.sums = Chosen(one, self.H), Sums(how.dtype, weight, bias, one, self.W)


def _body(how: FfnRows) -> None:
    a = _Arguments(how)
    copy_inputs(a.inputs, a.x, 0, 0, a.K, how.dtype)
    groups = e.let(e.floordiv(a.H, NEURONS))
    with e.loop(e.floordiv(groups + (GROUPS - 1), GROUPS), parallel=how.parallel) as task, e.loop(e.minimum(groups - task * GROUPS, GROUPS)) as i:
        first = e.let((task * GROUPS + i) * NEURONS)
        total = products(a.gate, [first + n for n in range(NEURONS)], a.inputs, 0, a.K, how.dtype) + e.load(a.gate_bias, first, lanes=NEURONS)
        e.store(a.gates, Finish(activation=how.activation)(total), first, lanes=NEURONS)
    count = _select(a, how, groups)
    chosen = e.let(e.floordiv(count + (NEURONS - 1), NEURONS))
    with e.loop(e.floordiv(chosen + (GROUPS - 1), GROUPS), parallel=how.parallel) as task, e.loop(e.minimum(chosen - task * GROUPS, GROUPS)) as i:
        _raise(a, how, count, e.let((task * GROUPS + i) * NEURONS))
    with each_span(a.W, how.columns, how.parallel) as (start, width):
        a.sums.add(a.chosen, count, start, width)
        a.sums.write(a.y, a.N, start, width)


def _select(a: _Arguments, how: FfnRows, groups: Any) -> Any:
    """Write the selected gates and their places next to each other; their number."""
    found = e.stack(1, "int32")
    e.store(found, tirx.const(0, "int32"), 0)
    with e.llvm(PARTS.read_text()), e.loop(groups) as group:
        at, count = e.let(group * LANES), e.let(e.load(found, 0))
        value = e.let(e.load(a.gates, at, lanes=LANES))
        size = e.absolute(value, LANES)
        score = e.let(size * e.load(a.scale, at, lanes=LANES) if how.scaled else size)
        mask = e.let(e.external("int32", "selected", score, e.load(a.limit, 0)))
        e.builder.evaluate(tirx.call_extern("int32", "compress_values", t.address(a.chosen.values, count), value, mask))
        e.store(found, count + tirx.call_extern("int32", "compress_places", t.address(a.chosen.places, count), at, mask), 0)
    return e.let(e.load(found, 0))


def _raise(a: _Arguments, how: FfnRows, count: Any, first: Any) -> None:
    """values *= up x, for 16 selected neurons; behind the last one it is taken again, and what comes of it never read."""
    rows = [e.let(e.load(a.chosen.places, e.minimum(first + n, count - 1))) for n in range(NEURONS)]
    bias = e.join([e.load(a.up_bias, row) for row in rows], 1)
    total = e.let(Finish(activation=select_ffn.UP.get(how.activation, ""))(products(a.up, rows, a.inputs, 0, a.K, how.dtype) + bias))
    e.store(a.chosen.values, e.load(a.chosen.values, first, lanes=NEURONS) * total, first, lanes=NEURONS)
