"""The places that rows chose, in the order of the experts: what every kernel for many rows begins with. No row is copied, none is padded.

A unit is up to as many places of one expert as a register has lanes; the units of an expert lie one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sparsify_compiler.codegen import emit as e
from sparsify_compiler.codegen.kernels.experts_layout import ExpertsArguments


class Order:
    """Places (row * k + which of its choices) sorted by expert; where each expert's places and units begin; each unit's expert."""

    def __init__(self, a: ExpertsArguments) -> None:
        self._a, one = a, a.experts + 1
        self._begin, self._units, cursor = (e.scratch(one, "int32") for _ in range(3))
        self._places = e.scratch(e.maximum(a.M * a.k, 1), "int32")
        self._count(a)
        with e.loop(a.experts) as i:
            many = e.let(e.load(self._begin, i + 1))
            e.store(self._units, e.load(self._units, i) + e.floordiv(many + (e.lanes() - 1), e.lanes()), i + 1)
            e.store(self._begin, e.load(self._begin, i) + many, i + 1)
            e.store(cursor, e.load(self._begin, i), i)
        with self._chosen(a) as (place, expert):
            at = e.let(e.load(cursor, expert))
            e.store(self._places, place, at)
            e.store(cursor, at + 1, expert)
        self.units = e.opaque(e.load(self._units, a.experts))
        self._owner = e.scratch(e.maximum(self.units, 1), "int32")
        with e.loop(a.experts) as i, e.loop(e.load(self._units, i + 1) - e.load(self._units, i)) as j:
            e.store(self._owner, i, e.load(self._units, i) + j)

    def _count(self, a: ExpertsArguments) -> None:
        for buffer in (self._begin, self._units):
            with e.loop(a.experts + 1) as i:
                e.store(buffer, e.constant(0, "int32"), i)
        with self._chosen(a) as (_, expert):
            e.store(self._begin, e.load(self._begin, expert + 1) + 1, expert + 1)

    @contextmanager
    def _chosen(self, a: ExpertsArguments) -> Iterator[tuple[Any, Any]]:
        with e.loop(a.M) as m, e.loop(a.k) as j:
            expert = e.let(a.expert(m, j))
            with e.when(a.exists(expert)):
                yield e.let(m * a.k + j), expert

    def owner(self, unit: Any) -> Any:
        """The expert of a unit."""
        return e.opaque(e.load(self._owner, unit))

    def place(self, unit: Any, i: Any) -> Any:
        """The i-th place of a unit; behind the last one, that one again."""
        expert = e.load(self._owner, unit)
        first = e.load(self._begin, expert) + (unit - e.load(self._units, expert)) * e.lanes()
        return e.load(self._places, e.minimum(first + i, e.load(self._begin, expert + 1) - 1))

    def filled(self, unit: Any) -> Any:
        """How many places a unit has."""
        expert = e.load(self._owner, unit)
        first = e.load(self._begin, expert) + (unit - e.load(self._units, expert)) * e.lanes()
        return e.opaque(e.minimum(e.load(self._begin, expert + 1) - first, e.lanes()))

    def units_of(self, expert: Any) -> tuple[Any, Any]:
        """The first unit of an expert, and how many it has."""
        first = e.opaque(e.load(self._units, expert))
        return first, e.opaque(e.load(self._units, expert + 1) - first)

    @contextmanager
    def share(self, groups: Any, workers: int, me: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
        """`with share(...) as (expert, group, first, units):` worker `me`'s part of all experts' groups, in which every unit counts the same."""
        total = e.opaque(self.units * groups)
        low, high = (e.opaque(e.floordiv((me + i) * total, workers)) for i in range(2))
        with e.loop(self._a.experts) as expert:
            first, units = self.units_of(expert)
            with e.when(units > 0):
                ahead = [e.maximum(bound - first * groups, 0) + units - 1 for bound in (low, high)]
                begin, end = (e.opaque(e.minimum(e.floordiv(one, units), groups)) for one in ahead)
                with e.loop(end - begin) as i:
                    yield expert, e.opaque(begin + i), first, units


def each_panel(first: Any, units: Any, across: int, run: Callable[[Any, int], None]) -> None:
    """run(unit, how many) for all units of an expert, `across` at a time, and what is left over."""
    whole = e.opaque(e.floordiv(units, across))
    with e.loop(whole) as panel:
        run(e.opaque(first + panel * across), across)
    for left in range(1, across):
        with e.when(units - whole * across == left):
            run(e.opaque(first + whole * across), left)
