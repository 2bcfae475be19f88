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
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.gather_rows import LANES, PARTS, Chosen, Sums, each_span, weight_argument
from sparsify_compiler.codegen.kernels.products import TOGETHER as NEURONS
from sparsify_compiler.codegen.kernels.products import copy_inputs, products
from sparsify_compiler.ops import select_ffn

GROUPS = 2       # of them in a task


@dataclass(frozen=True)
class PredictedFfnRows:
    """How: `columns` outputs of down a task (a multiple of 64), with a gate or without, on torch's threads or on the caller's alone."""

    dtype: str       # of x, the weights and y: "float32" or "bfloat16"
    activation: str
    columns: int
    gated: bool
    parallel: bool
    name = "predicted_ffn_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [1, K], scores [1, H], limit [1], gate [H, K], up [H, K], gate_bias [H], up_bias [H], weight [H, W], bias [W], y [1, N]).

        H a multiple of 16, K of 16 (32 for bfloat16). Weights of bfloat16 come as int32 words of two; bias as in GatherRows. Without a gate up and
        up_bias are of any size, and gate is the one projection that there is.
        """
        return e.function("main", lambda: _body(self))


class _Arguments:
    """The parameters, and what is written on the way."""

    def __init__(self, how: PredictedFfnRows) -> None:
        self.M, self.N, self.K, self.H, self.W = (e.int32() for _ in range(5))
        words = "float32" if how.dtype == "float32" else "int32"
        self.x = e.argument((self.M, self.K), how.dtype)
        self.scores = e.argument((self.M, self.H), "float32")
        self.limit = e.argument((e.int32(),), "float32")
        self.gate, self.up = (e.argument((rows, e.int32()), words) for rows in (self.H, self.H if how.gated else e.int32()))
        self.gate_bias, self.up_bias = (e.argument((rows,), "float32") for rows in (self.H, self.H if how.gated else e.int32()))
        weight, bias = weight_argument(self.H, how.dtype), e.argument((self.W,), "float32")
        self.y = e.argument((self.M, self.N), how.dtype)
        self.inputs = e.scratch(self.K, "float32")    # x; for bfloat16 the even inputs, then the odd ones, of every load of weights
        one = tirx.const(1, "int32")
        self.chosen, self.sums = Chosen(one, self.H), Sums(how.dtype, weight, bias, one, self.W)


def _body(how: PredictedFfnRows) -> None:
    a = _Arguments(how)
    copy_inputs(a.inputs, a.x, 0, 0, a.K, how.dtype)
    count = _choose(a)
    chosen = e.let(e.floordiv(count + (NEURONS - 1), NEURONS))
    with e.loop(e.floordiv(chosen + (GROUPS - 1), GROUPS), parallel=how.parallel) as task, e.loop(e.minimum(chosen - task * GROUPS, GROUPS)) as i:
        _compute(a, how, count, e.let((task * GROUPS + i) * NEURONS))
    with each_span(a.W, how.columns, how.parallel) as (start, width):
        a.sums.add(a.chosen, count, start, width)
        a.sums.write(a.y, a.N, start, width)


def _choose(a: _Arguments) -> Any:
    """Write the places of the chosen neurons next to each other; their number."""
    found = e.stack(1, "int32")
    e.store(found, tirx.const(0, "int32"), 0)
    with e.llvm(PARTS.read_text()), e.loop(e.floordiv(a.H, LANES)) as group:
        at, count = e.let(group * LANES), e.let(e.load(found, 0))
        mask = e.let(e.external("int32", "selected", e.load(a.scores, 0, at, lanes=LANES), e.load(a.limit, 0)))
        taken = tirx.call_extern("int32", "compress_places", t.address(a.chosen.places, count), at, mask)
        e.store(found, count + taken, 0)
    return e.let(e.load(found, 0))


def _compute(a: _Arguments, how: PredictedFfnRows, count: Any, first: Any) -> None:
    """What 16 chosen neurons give; behind the last one it is taken again, and what comes of it never read."""
    rows = [e.let(e.load(a.chosen.places, e.minimum(first + n, count - 1))) for n in range(NEURONS)]

    def projected(weight: Any, bias: Any, activation: str) -> Any:
        joined = e.join([e.load(bias, row) for row in rows], 1)
        total = e.let(products(weight, rows, a.inputs, 0, a.K, how.dtype) + joined)
        return e.let(Finish(activation=activation)(total))

    total = projected(a.gate, a.gate_bias, how.activation)
    if how.gated:
        total = total * projected(a.up, a.up_bias, select_ffn.UP.get(how.activation, ""))
    e.store(a.chosen.values, total, first, lanes=NEURONS)
