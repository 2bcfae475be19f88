"""The solver against brute force on small problems, and its speed on a large one."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparsify_compiler.cost_models.solve import front, solve
from sparsify_compiler.errors import BudgetError

Rows = list[list[float]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Rows, Rows, float]:
    """(losses, costs, limit): up to five sites of up to four options, in whole numbers, so that ties and exact limits occur."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    number = st.integers(0, 30).map(float)
    losses, costs = ([[draw(number) for _ in range(size)] for size in sizes] for _ in range(2))
    return losses, costs, float(draw(st.integers(0, 120)))


def everything(losses: Rows, costs: Rows) -> list[tuple[float, float, tuple[int, ...]]]:
    """(loss, cost, choice) of every choice."""
    return [(sum(row[i] for row, i in zip(losses, choice, strict=True)), sum(row[i] for row, i in zip(costs, choice, strict=True)), choice)
            for choice in itertools.product(*(range(len(row)) for row in losses))]


@settings(deadline=None, max_examples=60)
@given(problems())
def test_nobody_loses_less(problem: tuple[Rows, Rows, float]) -> None:
    losses, costs, limit = problem
    allowed = [loss for loss, cost, _ in everything(losses, costs) if cost <= limit]
    if not allowed:
        with pytest.raises(BudgetError, match=f"least that is possible is {sum(map(min, costs)):g}"):
            solve(losses, [(costs, limit)])
        return
    found = solve(losses, [(costs, limit)])
    assert found.loss == min(allowed) == sum(row[i] for row, i in zip(losses, found.choice, strict=True))
    assert found.spent[0] <= limit
    assert found.relaxed <= found.loss + 1e-6 * max(found.loss, 1)
    assert found == solve(losses, [(costs, limit)])


@settings(deadline=None, max_examples=40)
@given(problems(), st.data())
def test_groups_and_forced_options_hold(problem: tuple[Rows, Rows, float], data: st.DataObject) -> None:
    losses, costs, limit = problem
    width = min(map(len, losses))
    losses, costs = [row[:width] for row in losses], [row[:width] for row in costs]
    group = data.draw(st.sets(st.integers(0, len(losses) - 1), min_size=min(2, len(losses))))
    forced = {data.draw(st.integers(0, len(losses) - 1)): data.draw(st.integers(0, width - 1))}
    allowed = [loss for loss, cost, choice in everything(losses, costs) if cost <= limit and len({choice[s] for s in group}) == 1
               and all(choice[s] == number for s, number in forced.items())]
    if not allowed:
        with pytest.raises(BudgetError):
            solve(losses, [(costs, limit)], alike=[sorted(group)], forced=forced)
        return
    found = solve(losses, [(costs, limit)], alike=[sorted(group)], forced=forced)
    assert len({found.choice[site] for site in group}) == 1
    assert all(found.choice[site] == number for site, number in forced.items())
    assert found.loss == min(allowed)


@settings(deadline=None, max_examples=60)
@given(problems())
@example(([[0.0], [1.0, 0.0]], [[0.0], [0.0, 1.0]], 0.0))  # a limit of nothing: no unit of a cost
def test_the_front_is_the_lower_hull_of_all_choices(problem: tuple[Rows, Rows, float]) -> None:
    losses, costs, limit = problem
    points = front(losses, costs)
    assert all(one.cost < other.cost and one.loss > other.loss for one, other in itertools.pairwise(points))
    every = everything(losses, costs)
    assert (points[0].cost, points[-1].loss) == (min(cost for _, cost, _ in every), min(loss for loss, _, _ in every))
    for loss, cost, _ in every:
        assert loss >= at(points, cost) - 1e-9
    if points[0].cost <= limit:  # the hull is what the linear program finds
        assert solve(losses, [(costs, limit)]).relaxed == pytest.approx(at(points, limit), abs=1e-5)


def at(points: list, cost: float) -> float:  # type: ignore[type-arg]
    """The front's loss at a cost, on the lines between its points."""
    return float(np.interp(cost, [point.cost for point in points], [point.loss for point in points]))


def test_several_limits_at_once() -> None:
    losses, seconds, size = [[0.0, 1, 5]] * 2, [[10.0, 5, 1]] * 2, [[1.0, 4, 9]] * 2
    assert solve(losses, [(seconds, 15.0), (size, 8.0)]).choice in {(0, 1), (1, 0)}
    with pytest.raises(BudgetError, match="at once"):
        solve(losses, [(seconds, 2.0), (size, 2.0)])


def test_what_is_infinite_is_never_taken() -> None:
    assert solve([[0.0, math.inf], [3.0, 1.0]], [([[5.0, 0.0], [1.0, math.inf]], 9.0)]).choice == (0, 0)
    with pytest.raises(BudgetError, match="no option is left"):
        solve([[math.inf]], [([[1.0]], 9.0)])


def test_no_site_and_nothing_to_limit() -> None:
    assert solve([], [([], 1.0)]).choice == ()
    assert solve([[2.0, 1.0]], []).choice == (1,)
    assert [point.choice for point in front([], [])] == [()]


def test_a_thousand_sites_of_forty_options_take_seconds() -> None:
    generator = np.random.default_rng(3)
    density = np.linspace(1, 0.02, 40)
    weight = generator.lognormal(0, 1, (1000, 1))
    losses = weight * generator.lognormal(0, 2, (1000, 1)) * (1 - density) ** 2 * generator.uniform(0.9, 1.1, (1000, 40))
    costs = weight * density * generator.uniform(0.8, 1.2, (1000, 40))
    start = time.process_time()
    found = solve(losses.tolist(), [(costs.tolist(), float(costs[:, 0].sum() / 3))])
    assert time.process_time() - start < 20  # 5 s of an idle machine are the aim; this one may be busy
    assert found.gap < 1e-3
