"""An FFN of which every linear selects its inputs, for few rows of x, in one call: gate and up, their product, its selection, down.

Two parallel steps, each as gather_rows.py does it, and a selection before each: the columns of gate and up of a task are the same, so it computes
their part of the product as well. Calls and wake-ups are what a small FFN spends its time with; this is one of each instead of three and more.

Bound by: the bandwidth at which the selected rows of the weights arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.gather_rows import PARTS, Inputs, Sums, each_span, in_order, read_row, weight_argument
from sparsify_compiler.codegen.vectors import AVX512, Vectors
from sparsify_compiler.ops import select_ffn


@dataclass(frozen=True)
class Selection:
    """What a linear selects by beside its limit."""

    scaled: bool
    centered: bool


@dataclass(frozen=True)
class InputsFfnRows:
    """How: `hidden` and `columns` outputs of gate (up) and of down a task (multiples of 64), on torch's threads or on the caller's alone.

    up    None in an FFN without one: down(select(activation(gate(select(x)))))
    alike up selects what gate selects
    """

    dtype: str       # of x, the weights and y: "float32" or "bfloat16"
    activation: str
    hidden: int
    columns: int
    gate: Selection
    up: Selection | None
    down: Selection
    alike: bool
    parallel: bool
    cut_for: Vectors = AVX512
    name = "inputs_ffn_rows"

    def compute(self) -> Any:
        """The PrimFunc f(x [M, K], G, U, D, y [M, N]), each linear its limit [1], scale, center, weight and bias as in GatherRows.

        U is there where up is; gate and up [K, V], down [H, W]; V and W multiples of 64, H <= V, N <= W.
        """
        return e.function("main", lambda: _body(self), self.cut_for)


class _Linear:
    """The parameters of one linear."""

    def __init__(self, how: Selection, dtype: str, inputs: Any, outputs: Any) -> None:
        self.limit = e.argument((e.int32(),), "float32")
        scale, center = (e.argument((inputs if given else e.int32(),), "float32") for given in (how.scaled, how.centered))
        self.by = (scale if how.scaled else None, center if how.centered else None)
        self.weight, self.bias, self.outputs = weight_argument(inputs, dtype), e.argument((outputs,), "float32"), outputs

    def inputs(self, read: Any, rows: Any, width: Any) -> Inputs:
        return Inputs(read, rows, width, self.limit, 1, *self.by)

    def sums(self, dtype: str, rows: Any) -> Sums:
        return Sums(dtype, self.weight, self.bias, rows, self.outputs)


def _body(how: InputsFfnRows) -> None:
    M, N, K, H, V, W = (e.int32() for _ in range(6))
    x = e.argument((M, K), how.dtype)
    raising = [_Linear(kind, how.dtype, K, V) for kind in (how.gate, how.up) if kind is not None]
    down = _Linear(how.down, how.dtype, H, W)
    y = e.argument((M, N), how.dtype)
    product = e.scratch(M * V, "float32")
    inputs = [linear.inputs(partial(read_row, x), M, K) for linear in (raising[:1] if how.alike else raising)]
    sums = [linear.sums(how.dtype, M) for linear in raising]
    hidden = down.inputs(lambda m, at, lanes: e.load(product, m * V + at, lanes=lanes), M, H)
    outputs = down.sums(how.dtype, M)
    with e.llvm(PARTS.read_text()):
        counts = [one.select() for one in inputs]
        with each_span(V, how.hidden, how.parallel) as (start, width):
            for i, one in enumerate(sums):
                one.add(inputs[i % len(inputs)], counts[i % len(inputs)], start, width)
            _multiply(how, sums, product, start, width)
        count = hidden.select()
        with each_span(W, how.columns, how.parallel) as (start, width):
            outputs.add(hidden, count, start, width)
            outputs.write(y, N, start, width)


def _multiply(how: InputsFfnRows, sums: list[Sums], product: Any, start: Any, width: Any) -> None:
    """activation(gate) * up of a task's columns."""
    activate, raised = Finish(activation=how.activation), Finish(activation=select_ffn.UP.get(how.activation, ""))
    with e.loop(sums[0].rows) as m, e.loop(e.floordiv(width, sums[0].step)) as j:
        column = e.let(start + j * sums[0].step)
        values = [e.let(activate(half)) for half in sums[0].read(m, column)]
        if len(sums) > 1:
            values = [e.let(value * raised(half)) for value, half in zip(values, sums[1].read(m, column), strict=True)]
        e.store(product, in_order(values), m * sums[0].width + column, lanes=sums[0].step)
