"""y = the weighted sums of the FFNs that many rows chose: a grouped matrix product with its gather, activation and scatter inside.

The places are sorted by expert (expert_order.py), and the rows of one expert, as many as a register has lanes, are turned into a unit [input][row],
whose rows are the lanes of every vector that follows: W is multiplied as it lies in memory, and a unit of hidden values is written as the second
product reads it.
Every worker computes a part of the experts' neurons, then some of the outputs of all experts: no output is summed by two of them, and sums
are taken in the order of the experts, whatever the number of threads. (Fused gather and scatter without padding: ScatterMoE, arXiv:2403.08245.)

Bound by: the FMA rate or the tile unit where experts have many rows, the bandwidth at which the chosen experts' weights arrive where they have few.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.expert_cores import Core, Fma, Tile
from sparsify_compiler.codegen.kernels.expert_dots import Dot
from sparsify_compiler.codegen.kernels.expert_order import Order, each_panel
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments, ExpertsLayout
from sparsify_compiler.codegen.kernels.products import LANES
from sparsify_compiler.codegen.vectors import AVX512, Vectors

CORES: dict[str, type[Core]] = {"fma": Fma, "dots": Dot, "tiles": Tile}    # any; bfloat16 by products of pairs; bfloat16 by AMX tiles


@dataclass(frozen=True)
class ExpertPanels:
    """How: work split for this many threads (1: on the caller's alone)."""

    layout: ExpertsLayout
    workers: int
    cut_for: Vectors = AVX512
    core: str = "fma"   # of CORES
    name = "expert_panels"

    def compute(self) -> Any:
        """The PrimFunc of ExpertsArguments; K and H multiples of 16, for bfloat16 K, H and N of 32. Else N of any size from 1 on."""
        return e.function("main", lambda: _body(self), self.cut_for)


def _body(how: ExpertPanels) -> None:
    a = ExpertsArguments(how.layout)
    order, core = Order(a), CORES[how.core](a, how.layout)
    room = e.maximum(order.units, 1)
    packed, hidden = e.scratch(room * core.size(a.K), core.dtype), e.scratch(room * core.size(a.H), core.dtype)
    width = e.opaque(e.floordiv(a.N + (core.strip - 1), core.strip) * core.strip)
    sums = e.scratch(a.M * width, "float32")
    with e.loop(order.units, parallel=how.workers > 1) as unit:
        _by_rows(core, order, unit, e.constant(1, "int32"), lambda: core.copy_rows(order, packed, unit), lambda: _pack(a, core, order, packed, unit))
    with e.llvm(how.cut_for.dot) if how.core == "dots" else nullcontext():
        with e.loop(how.workers, parallel=how.workers > 1) as me:
            core.open()
            with order.share(e.floordiv(a.H, core.group), how.workers, me) as (expert, group, first, units):
                at = e.let(group * core.group)
                _by_rows(core, order, first, units, lambda: core.row_neurons(order, packed, hidden, expert, at, first), lambda: each_panel(
                    first, units, core.across, lambda unit, many: core.neurons(packed, hidden, expert, at, unit, many)))
            core.close()
        with e.loop(how.workers, parallel=how.workers > 1) as me:
            core.open()
            _outputs(a, how, core, order, me, hidden, sums, width)
            core.close()


def _by_rows(core: Core, order: Order, first: Any, units: Any, few: Callable[[], None], many: Callable[[], None]) -> None:
    """What to do where an expert has few rows, of which the core takes one after the other; and elsewhere."""
    if core.few:
        expert = order.owner(first)
        alone = e.both(units == 1, order.units_of(expert)[1] == 1)
        e.choose(e.both(alone, order.filled(first) <= core.few), few, many)
    else:
        many()


def _pack(a: ExpertsArguments, core: Core, order: Order, packed: Any, unit: Any) -> None:
    with e.loop(e.floordiv(a.K, core.depth)) as block:
        rows = [e.let(e.floordiv(order.place(unit, i), a.k)) for i in range(e.lanes())]
        core.pack(packed, e.let(unit * core.size(a.K)), rows, e.opaque(block * core.depth))


def _outputs(a: ExpertsArguments, how: ExpertPanels, core: Core, order: Order, me: Any, hidden: Any, sums: Any, width: Any) -> None:
    """One worker's columns of y."""
    strips = e.opaque(e.floordiv(width, core.strip))
    begin, end = (e.opaque(e.floordiv((me + i) * strips, how.workers)) for i in range(2))
    columns = e.opaque(e.floordiv((end - begin) * core.strip, LANES))
    with e.loop(a.M) as m, e.loop(columns) as j:
        e.store(sums, e.broadcast(e.zero(), LANES), m * width + begin * core.strip + j * LANES, lanes=LANES)
    with e.loop(a.experts) as expert:
        first, units = order.units_of(expert)
        with e.when(units > 0), e.loop(end - begin) as i:
            column = e.opaque((begin + i) * core.strip)

            def run(unit: Any, many: int, column: Any = column, expert: Any = expert) -> None:
                core.outputs(hidden, expert, column, unit, many)
                with e.loop(many) as v, e.loop(core.strip // LANES) as part:
                    _scatter(a, core, order, sums, width, e.opaque(unit + v), expert, e.opaque(v * core.strip + part * LANES),
                             e.opaque(column + part * LANES))

            def add(i: Any, value: Any, first: Any = first, expert: Any = expert, column: Any = column) -> None:
                _add(a, order, sums, width, first, i, expert, column, value)

            _by_rows(core, order, first, units, lambda: core.row_outputs(order, hidden, expert, column, first, add),
                     lambda: each_panel(first, units, core.across, run))
    with e.loop(a.M) as m, e.loop(columns) as j:
        column = e.opaque(begin * core.strip + j * LANES)
        with e.when(column < a.N):
            e.store_tail(a.y, e.load(sums, m * width + column, lanes=LANES), LANES, m, column, a.N)


def _scatter(a: ExpertsArguments, core: Core, order: Order, sums: Any, width: Any, unit: Any, expert: Any, line: Any, column: Any) -> None:
    """Turn 16 outputs of a unit, which lie from `line` on in what the core finished, and add each row's to its sums, times the row's factor."""
    of = e.lanes()
    for i, row in enumerate(e.turn([e.let(e.load(core.finished, (line + n) * of, lanes=of)) for n in range(LANES)])):
        e.store(core.turned, row, i * LANES, lanes=LANES)
    with e.loop(order.filled(unit)) as i:
        _add(a, order, sums, width, unit, i, expert, column, e.load(core.turned, i * LANES, lanes=LANES))


def _add(a: ExpertsArguments, order: Order, sums: Any, width: Any, unit: Any, i: Any, expert: Any, column: Any, value: Any) -> None:
    """16 outputs of one row of a unit, times its factor."""
    place = e.opaque(order.place(unit, i))
    m = e.opaque(e.floordiv(place, a.k))
    total = e.Register(LANES, e.load(sums, m * width + column, lanes=LANES))
    if "bias" in a.biases:
        value = value + e.load(a.biases["bias"], e.wide(expert) * a.N + column, lanes=LANES)
    total.multiply_add(e.let(value), e.let(e.broadcast(e.load(a.weights, m, place - m * a.k), LANES)))
    e.store(sums, total.get(), m * width + column, lanes=LANES)
