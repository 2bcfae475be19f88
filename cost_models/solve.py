"""Choosing one option a site: least total loss within limits, how far that is from the best there could be, and the whole trade-off.

A multiple-choice knapsack (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). Pure numbers: rows of one number an option, one row
a site; rows may differ in length. What an option costs may be seconds, bytes or operations, and what it loses any number that adds up over sites;
an option with an infinite number cannot be taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from sparsify_compiler.errors import BudgetError

Rows = Sequence[Sequence[float]]  # site -> option -> number
Numbers = NDArray[np.float64]
NODES = 20_000  # of branch and bound, after which the best that was found counts: a number of nodes, not of seconds, so that it is the same each time
GAP = 1e-6  # relative: a difference in loss that no measurement of it could tell
FEASIBLE = 1e-9  # relative: by how much a total may exceed its limit


@dataclass(frozen=True)
class Solution:
    """One option for every site.

    choice   site -> number of its option
    loss     total of the options
    spent    total of each cost, in the order of the limits
    relaxed  what the linear program loses, which may mix the options of a site: no choice loses less (the certificate)
    """

    choice: tuple[int, ...]
    loss: float
    spent: tuple[float, ...]
    relaxed: float

    @property
    def gap(self) -> float:
        """(loss - relaxed) / loss: by how much at most another choice could lose less. 0 where nothing is lost."""
        return max(0.0, (self.loss - self.relaxed) / abs(self.loss)) if self.loss else 0.0


@dataclass(frozen=True)
class Point:
    """A choice on the front: nobody loses less at this cost by mixing two choices."""

    cost: float
    loss: float
    choice: tuple[int, ...]


def solve(losses: Rows, limits: Sequence[tuple[Rows, float]], *, alike: Sequence[Sequence[int]] = (),
          forced: Mapping[int, int] | None = None) -> Solution:
    """The choice of least total loss whose costs stay within their limits.

    limits  (what each option costs, the most that all may cost together); swap the roles for a limit on loss
    alike   groups of sites that must take options of the same number
    forced  site -> option that it must take

    Deterministic. Raises BudgetError where no choice stays within the limits, with the least that is possible of the first of them.
    """
    units = _units([losses, *[cost for cost, _ in limits]], alike, forced or {})
    if not units:
        return Solution((), 0.0, tuple(0.0 for _ in limits), 0.0)
    most = [limit for _, limit in limits]
    _check_possible(units, most)
    picked, relaxed = _mixed_integer(units, most)
    choice = _choice(units, picked, len(losses))
    return Solution(choice, _total(losses, choice), tuple(_total(cost, choice) for cost, _ in limits), relaxed)


def front(losses: Rows, costs: Rows, *, alike: Sequence[Sequence[int]] = (), forced: Mapping[int, int] | None = None, most: int = 200) -> list[Point]:
    """The lower convex hull of (cost, loss) over all choices, from the cheapest to the one that loses least; at most `most` points of it.

    Every corner of the hull is a choice, found by walking down the hulls of all sites, steepest step first (Dyer, 1984; Zemel, 1984). Between two
    corners of a large problem lies next to nothing: each step changes one site.
    """
    units = _units([losses, costs], alike, forced or {})
    picked = [0] * len(units)
    steps = []
    for number, unit in enumerate(units):
        corners = _hull(unit.table[:, 1], unit.table[:, 0])
        picked[number] = corners[0]
        for one, other in pairwise(corners):
            paid, saved = unit.table[other, 1] - unit.table[one, 1], unit.table[one, 0] - unit.table[other, 0]
            steps.append((-saved / paid, number, other))
    steps.sort()
    wanted = set(np.linspace(0, len(steps), min(most, len(steps) + 1)).round().astype(int).tolist())
    points = []
    for done in range(len(steps) + 1):
        if done:
            picked[steps[done - 1][1]] = steps[done - 1][2]
        if done in wanted:
            choice = _choice(units, picked, len(losses))
            points.append(Point(_total(costs, choice), _total(losses, choice), choice))
    return points


@dataclass(frozen=True)
class _Unit:
    """Sites that are decided together. table [options, 1 + costs]: loss and costs; numbers: the options' own numbers."""

    sites: tuple[int, ...]
    numbers: tuple[int, ...]
    table: Numbers


def _units(rows: Sequence[Rows], alike: Sequence[Sequence[int]], forced: Mapping[int, int]) -> list[_Unit]:
    """Groups as one unit each, without options that cannot be taken, or that another one beats in every respect."""
    together = {site: tuple(sorted(group)) for group in alike for site in group}
    units = []
    for sites in dict.fromkeys(together.get(site, (site,)) for site in range(len(rows[0]))):
        table = np.array([np.sum([row[site] for site in sites], axis=0) for row in rows], dtype=np.float64).T
        allowed = {forced[site] for site in sites if site in forced}
        numbers = [n for n in range(len(table)) if bool(np.isfinite(table[n]).all()) and allowed <= {n}]
        if not numbers:
            raise BudgetError(f"no option is left for site {sites[0]}", where="solve", hint="check what is forced, and which sites must choose alike")
        kept = [number for number, beaten in zip(numbers, _beaten(table[numbers]), strict=True) if not beaten]
        units.append(_Unit(sites, tuple(kept), table[kept]))
    return units


def _beaten(table: Numbers) -> list[bool]:
    """For each option: is another one no worse in anything, and better in something or, where all is equal, the first?"""
    one, other = table[:, None], table[None]
    no_worse, better = (one <= other).all(-1), (one < other).any(-1)
    first = np.tri(len(table), k=-1, dtype=bool).T
    beats: NDArray[np.bool_] = no_worse & (better | first)
    return [bool(column.any()) for column in beats.T]


def _check_possible(units: Sequence[_Unit], most: Sequence[float]) -> None:
    for number, limit in enumerate(most):
        least = math.fsum(float(unit.table[:, 1 + number].min()) for unit in units)
        if least > limit + FEASIBLE * abs(limit):
            raise BudgetError(f"no choice stays within {limit:.6g}", where="solve", hint=f"the least that is possible is {least:.6g}")


def _mixed_integer(units: Sequence[_Unit], most: Sequence[float]) -> tuple[list[int], float]:
    """(the option's place in each unit, the linear program's loss)."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    table = np.concatenate([unit.table for unit in units])
    sizes = [len(unit.numbers) for unit in units]
    starts = np.cumsum([0, *sizes])
    one_each = csr_array((np.ones(len(table)), np.arange(len(table)), starts), shape=(len(units), len(table)))
    scale = max(float(np.abs(table[:, 0]).max()), 1e-300)
    objective = table[:, 0] / scale
    best, relaxed = None, math.nan
    for tightened in (0.0, 1e-6, 1e-5):  # HiGHS takes 1e-6 of a row for nothing; we do not
        limits = [LinearConstraint(one_each, 1, 1)]
        for number, limit in enumerate(most):
            unit_of_cost = abs(limit) or float(np.abs(table[:, 1 + number]).max()) or 1.0
            limits.append(LinearConstraint(table[:, 1 + number][None] / unit_of_cost, -np.inf, (limit / unit_of_cost) - tightened))
        given = {"c": objective, "constraints": limits, "bounds": Bounds(0, 1)}
        if not tightened:
            linear = milp(**given)
            relaxed = float(linear.fun) * scale if linear.fun is not None else math.nan
        found = milp(**given, integrality=np.ones(len(table)), options={"mip_rel_gap": GAP, "node_limit": NODES})
        if found.x is None:
            continue
        picked = [int(np.argmax(found.x[starts[i] : starts[i + 1]])) for i in range(len(units))]
        if _within(units, picked, most):
            best = picked
            break
    if best is None:
        best = _cheapest(units, most)
    return best, relaxed


def _within(units: Sequence[_Unit], picked: Sequence[int], most: Sequence[float]) -> bool:
    totals = [math.fsum(float(unit.table[at, 1 + n]) for unit, at in zip(units, picked, strict=True)) for n in range(len(most))]
    return all(total <= limit + FEASIBLE * abs(limit) for total, limit in zip(totals, most, strict=True))


def _cheapest(units: Sequence[_Unit], most: Sequence[float]) -> list[int]:
    """Within a single limit there is always the cheapest of everything. Raises BudgetError where several limits contradict each other."""
    for number in range(len(most)):
        picked = [int(np.argmin(unit.table[:, 1 + number])) for unit in units]
        if _within(units, picked, most):
            return picked
    raise BudgetError("no choice stays within all of the limits at once", where="solve", hint="loosen one of them")


def _hull(costs: Numbers, losses: Numbers) -> list[int]:
    """Places of the lower convex hull's corners, cheapest first, each losing less than the one before."""
    corners: list[int] = []
    for place in np.lexsort((losses, costs)).tolist():
        if corners and losses[place] >= losses[corners[-1]]:
            continue
        while len(corners) > 1 and _above(costs, losses, corners[-2], corners[-1], place):
            corners.pop()
        corners.append(place)
    return corners


def _above(costs: Numbers, losses: Numbers, left: int, middle: int, right: int) -> bool:
    """Does the middle one lie on or above the line between the others?"""
    return bool((losses[left] - losses[middle]) * (costs[right] - costs[left]) <= (losses[left] - losses[right]) * (costs[middle] - costs[left]))


def _choice(units: Sequence[_Unit], picked: Sequence[int], sites: int) -> tuple[int, ...]:
    choice = [0] * sites
    for unit, place in zip(units, picked, strict=True):
        for site in unit.sites:
            choice[site] = unit.numbers[place]
    return tuple(choice)


def _total(rows: Rows, choice: Sequence[int]) -> float:
    return math.fsum(rows[site][number] for site, number in enumerate(choice))
