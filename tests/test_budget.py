"""Budgets and the search that meets them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify_compiler.budget import Budget
from sparsify_compiler.errors import BudgetError
from sparsify_compiler.plan import LOWEST, Attempt, search


@pytest.mark.parametrize("wrong", [{}, {"density": 0.5, "speedup": 2.0}, {"density": 0.0}, {"density": 1.5}, {"density": -0.1}, {"speedup": 0.5},
                                   {"density": math.nan}, {"bytes": 0}, {"quality_drop": -1.0}, {"density": "0.5"}, {"density": True},
                                   {"latency_ms": math.inf}])
def test_impossible_budgets_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BudgetError):
        Budget(**wrong)


def test_a_budget_says_what_it_is() -> None:
    assert str(Budget(density=0.5)) == "density 0.5"
    assert Budget(bytes=1000).given() == {"bytes": 1000}


@given(st.floats(0.05, 1.0))
def test_search_for_bytes_comes_close_from_below(share: float) -> None:
    full = 1000.0
    found = search(Budget(bytes=int(full)), full * share, lambda d: Attempt(d, full * d, d), steps=10)
    assert found.taken.value <= full * share
    assert found.taken.value >= full * share - full / 2**9


@given(st.floats(0.0, 0.9))
def test_search_for_quality_takes_the_sparsest_that_holds(limit: float) -> None:
    found = search(Budget(quality_drop=limit), limit, lambda d: Attempt(d, (1 - d) ** 2, d), steps=12)
    assert found.taken.value <= limit
    assert found.taken.density <= max(1 - math.sqrt(limit), LOWEST) + 1e-3


def test_what_cannot_be_met_says_how_far_it_got() -> None:
    with pytest.raises(BudgetError, match=r"0\.5.*density 0\.02"):
        search(Budget(speedup=10.0), 0.1, lambda d: Attempt(d, 0.5 + d - LOWEST, d))


def test_a_recipe_with_a_fixed_density_is_tried_once() -> None:
    tried: list[float] = []

    def attempt(density: float) -> Attempt[None]:
        tried.append(density)
        return Attempt(density, 5.0, None)

    assert search(Budget(latency_ms=6.0), 6.0, attempt, fixed=0.5).taken.density == 0.5
    with pytest.raises(BudgetError):
        search(Budget(latency_ms=4.0), 4.0, attempt, fixed=0.5)
    assert tried == [0.5, 0.5]
