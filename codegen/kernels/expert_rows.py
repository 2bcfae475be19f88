"""y = the weighted sum of the FFNs that one row chose, in one call: of the experts' weights only those are read, once and in order.

Two parallel steps: the neurons of every chosen expert, sixteen at a time, gate and up together (products.py), times the expert's factor; then the
outputs, sixteen at a time, each the sum over the chosen experts. Results do not depend on the number of threads.

Bound by: the bandwidth at which the chosen experts' weights arrive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments, ExpertsLayout
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.products import LANES, TOGETHER, copy_inputs, products
from sparsify_compiler.codegen.vectors import AVX512, Vectors
from sparsify_compiler.ops import select_ffn

GROUPS = 4       # runs of neurons or outputs in a task


@dataclass(frozen=True)
class ExpertRows:
    """How: on torch's threads or on the caller's alone."""

    layout: ExpertsLayout
    parallel: bool
    cut_for: Vectors = AVX512
    name = "expert_rows"

    def compute(self) -> Any:
        """The PrimFunc of ExpertsArguments for one row of x; K and H multiples of 16 (32 for bfloat16), N of any size from 1 on."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: ExpertRows) -> None:
    a, dtype = ExpertsArguments(how.layout), how.layout.dtype
    inputs, hidden = e.scratch(a.K, "float32"), e.scratch(a.k * a.H, "float32")
    copy_inputs(inputs, a.x, 0, 0, a.K, dtype)
    groups = e.let(e.floordiv(a.H, TOGETHER))
    with _each(how, a.k * groups) as group:
        place = e.opaque(e.floordiv(group, groups))
        first, expert = e.opaque((group - place * groups) * TOGETHER), e.let(a.expert(0, place))
        with e.when(a.exists(expert)):
            value = _neurons(a, how.layout, inputs, expert, first) * e.broadcast(e.load(a.weights, 0, place), LANES)
            _keep(hidden, e.let(value), place * a.H, first, dtype)
    with _each(how, e.floordiv(a.N + (TOGETHER - 1), TOGETHER)) as group:
        first = e.let(group * TOGETHER)
        total = e.Register(LANES, e.broadcast(e.zero(), LANES))
        with e.loop(a.k) as place:
            expert = e.let(a.expert(0, place))
            with e.when(a.exists(expert)):
                total.set(total.get() + products(a.projections["down"][0], a.rows("down", expert, first, TOGETHER, a.N - 1), hidden, place * a.H,
                                                 a.H, dtype))
                if "bias" in a.biases:
                    bias = e.load(a.biases["bias"], e.wide(expert) * a.N + first, lanes=LANES)
                    total.multiply_add(bias, e.broadcast(e.load(a.weights, 0, place), LANES))
        e.store_tail(a.y, total.get(), LANES, 0, first, a.N)


@contextmanager
def _each(how: ExpertRows, groups: Any) -> Iterator[Any]:
    """`with _each(how, groups) as group:` GROUPS of them a task."""
    groups = e.opaque(groups)
    with (e.loop(e.floordiv(groups + (GROUPS - 1), GROUPS), parallel=how.parallel) as task,
          e.loop(e.minimum(groups - task * GROUPS, GROUPS)) as i):
        yield e.let(task * GROUPS + i)


def _neurons(a: ExpertsArguments, how: ExpertsLayout, inputs: Any, expert: Any, first: Any) -> Any:
    """What down reads of 16 neurons of an expert."""

    def raw(name: str) -> Any:
        rows = a.rows(name, expert, first, TOGETHER, a.H - 1)
        total = e.Register(LANES, products(a.projections[name][0], rows, inputs, 0, a.K, how.dtype))
        if f"{name}_bias" in a.biases:
            total.set(total.get() + e.load(a.biases[f"{name}_bias"], e.wide(expert) * a.H + first, lanes=LANES))
        return e.let(total.get())

    gates = e.let(Finish(activation=how.activation)(raw("gate")))
    return gates * Finish(activation=select_ffn.UP.get(how.activation, ""))(raw("up")) if how.gated else gates


def _keep(hidden: Any, value: Any, start: Any, first: Any, dtype: str) -> None:
    """16 neurons where products() looks for them: for bfloat16 the even ones of every 32 before the odd ones."""
    if dtype == "float32":
        return e.store(hidden, value, start + first, lanes=LANES)
    block = e.let(e.floordiv(first, 2 * LANES))
    place = e.let(start + block * (2 * LANES) + e.floordiv(first - block * (2 * LANES), 2))
    for half in range(2):
        e.store(hidden, e.shuffle(value, value, [2 * i + half for i in range(LANES // 2)]), place + half * LANES, lanes=LANES // 2)
    return None
