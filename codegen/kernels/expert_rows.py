"""y = the weighted sum of the FFNs that one row chose, in one call: of the experts' weights only those are read, once and in order.

Two parallel steps: the neurons of every chosen expert, sixteen at a time, gate and up together (products.py), times the expert's factor; then the
outputs, sixteen at a time, each the sum over the chosen experts. Results do not depend on the number of threads. In bfloat16 neurons stay float32
where weights are upcast, and are rounded where one instruction multiplies words (expert_dots.py).

Bound by: the bandwidth at which the chosen experts' weights arrive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.expert_dots import copy_words, dots, keep_words
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments, ExpertsLayout
from sparsify_compiler.codegen.kernels.finish import Finish
from sparsify_compiler.codegen.kernels.products import LANES, TOGETHER, copy_inputs, keep_inputs, products
from sparsify_compiler.codegen.vectors import AVX512, Vectors
from sparsify_compiler.ops import select_ffn

GROUPS = 4       # runs of neurons or outputs in a task


@dataclass(frozen=True)
class ExpertRows:
    """How: on torch's threads or on the caller's alone; dots: bfloat16 by products of pairs (expert_dots.py)."""

    layout: ExpertsLayout
    parallel: bool
    cut_for: Vectors = AVX512
    dots: bool = False
    name = "expert_rows"

    def compute(self) -> Any:
        """The PrimFunc of ExpertsArguments for one row of x; K and H multiples of 16 (32 for bfloat16), N of any size from 1 on."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: ExpertRows) -> None:
    a = ExpertsArguments(how.layout)
    with e.llvm(how.cut_for.dot) if how.dots else nullcontext():
        _steps(how, a, Words(a) if how.dots else Floats(a, how.layout.dtype))


def _steps(how: ExpertRows, a: ExpertsArguments, lines: Lines) -> None:
    groups = e.let(e.floordiv(a.H, TOGETHER))
    with _each(how, a.k * groups) as group:
        place = e.opaque(e.floordiv(group, groups))
        first, expert = e.opaque((group - place * groups) * TOGETHER), e.let(a.expert(0, place))
        with e.when(a.exists(expert)):
            value = _neurons(a, how.layout, lines, expert, first) * e.broadcast(e.load(a.weights, 0, place), LANES)
            lines.keep(e.let(value), place, first)
    with _each(how, e.floordiv(a.N + (TOGETHER - 1), TOGETHER)) as group:
        first = e.let(group * TOGETHER)
        total = e.Register(LANES, e.broadcast(e.zero(), LANES))
        with e.loop(a.k) as place:
            expert = e.let(a.expert(0, place))
            with e.when(a.exists(expert)):
                total.set(total.get() + lines.of_hidden(a.projections["down"][0], a.rows("down", expert, first, TOGETHER, a.N - 1), place))
                if "bias" in a.biases:
                    bias = e.load(a.biases["bias"], e.wide(expert) * a.N + first, lanes=LANES)
                    total.multiply_add(bias, e.broadcast(e.load(a.weights, 0, place), LANES))
        e.store_tail(a.y, total.get(), LANES, 0, first, a.N)


class Lines(Protocol):
    """x, and the neurons of every place, as they are multiplied with 16 rows of a weight."""

    def of_inputs(self, weight: Any, rows: list[Any]) -> Any: ...

    def of_hidden(self, weight: Any, rows: list[Any], place: Any) -> Any: ...

    def keep(self, value: Any, place: Any, first: Any) -> None: ...


class Floats:
    """In float32; of bfloat16 in the order in which products() upcasts weights."""

    def __init__(self, a: ExpertsArguments, dtype: str) -> None:
        self._a, self._dtype = a, dtype
        self._inputs, self._hidden = e.scratch(a.K, "float32"), e.scratch(a.k * a.H, "float32")
        copy_inputs(self._inputs, a.x, 0, 0, a.K, dtype)

    def of_inputs(self, weight: Any, rows: list[Any]) -> Any:
        return products(weight, rows, self._inputs, 0, self._a.K, self._dtype)

    def of_hidden(self, weight: Any, rows: list[Any], place: Any) -> Any:
        return products(weight, rows, self._hidden, place * self._a.H, self._a.H, self._dtype)

    def keep(self, value: Any, place: Any, first: Any) -> None:
        keep_inputs(self._hidden, value, e.let(place * self._a.H + first), self._dtype)


class Words:
    """In words of two bfloat16, as weights have them."""

    def __init__(self, a: ExpertsArguments) -> None:
        self._a, self._size = a, e.let(e.floordiv(a.H, 2))
        self._inputs, self._hidden = e.scratch(e.floordiv(a.K, 2), "int32"), e.scratch(a.k * self._size, "int32")
        copy_words(self._inputs, 0, a.x, 0, a.K)

    def of_inputs(self, weight: Any, rows: list[Any]) -> Any:
        return dots(weight, rows, self._inputs, 0, self._a.K)

    def of_hidden(self, weight: Any, rows: list[Any], place: Any) -> Any:
        return dots(weight, rows, self._hidden, place * self._size, self._a.H)

    def keep(self, value: Any, place: Any, first: Any) -> None:
        keep_words(self._hidden, value, e.let(place * self._size + e.floordiv(first, 2)))


@contextmanager
def _each(how: ExpertRows, groups: Any) -> Iterator[Any]:
    """`with _each(how, groups) as group:` GROUPS of them a task."""
    groups = e.opaque(groups)
    with (e.loop(e.floordiv(groups + (GROUPS - 1), GROUPS), parallel=how.parallel) as task,
          e.loop(e.minimum(groups - task * GROUPS, GROUPS)) as i):
        yield e.let(task * GROUPS + i)


def _neurons(a: ExpertsArguments, how: ExpertsLayout, lines: Lines, expert: Any, first: Any) -> Any:
    """What down reads of 16 neurons of an expert."""

    def raw(name: str) -> Any:
        rows = a.rows(name, expert, first, TOGETHER, a.H - 1)
        total = e.Register(LANES, lines.of_inputs(a.projections[name][0], rows))
        if f"{name}_bias" in a.biases:
            total.set(total.get() + e.load(a.biases[f"{name}_bias"], e.wide(expert) * a.H + first, lanes=LANES))
        return e.let(total.get())

    gates = e.let(Finish(activation=how.activation)(raw("gate")))
    return gates * Finish(activation=select_ffn.UP.get(how.activation, ""))(raw("up")) if how.gated else gates

