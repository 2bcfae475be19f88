"""From a budget to a density: try, measure, and close in on what the user asked for.

One density for the whole recipe; its own allocator shares it out over the layers. The search is bisection on a measured value, so it needs
that value to grow (bytes, latency) or fall (quality lost) with density, which holds up to noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from .budget import Budget
from .errors import BudgetError

Result = TypeVar("Result")
LOWEST = 0.02  # below one weight in fifty nothing of a trained layer is left


@dataclass(frozen=True)
class Attempt(Generic[Result]):
    """What one density gave. `value` is in the unit of the budget: bytes, milliseconds, or quality lost."""

    density: float
    value: float
    result: Result


@dataclass(frozen=True)
class Search(Generic[Result]):
    """The attempt that was taken, and all that were made, in order."""

    taken: Attempt[Result]
    tried: tuple[Attempt[Result], ...]


def search(budget: Budget, limit: float, attempt: Callable[[float], Attempt[Result]], *, fixed: float | None = None,
           steps: int = 6) -> Search[Result]:
    """The densest attempt whose value is within `limit`; for quality lost, the sparsest one.

    fixed  the only density there is, for a recipe whose structure decides it (2:4)
    Raises BudgetError, with the best value that was reached, when no density meets the budget.
    """
    more_is_worse = not budget.of_quality
    easy, hard = (LOWEST, 1.0) if more_is_worse else (1.0, LOWEST)
    if fixed is not None:
        easy = hard = fixed
    best = attempt(hard)
    tried = [best]
    if best.value <= limit:
        return Search(best, tuple(tried))
    if easy != hard:
        best = attempt(easy)
        tried.append(best)
    if best.value > limit:
        reached = min(tried, key=lambda t: t.value)
        raise BudgetError(f"the budget cannot be met: {budget}", where="plan",
                          hint=f"the best that this recipe reaches is {reached.value:.4g} (limit {limit:.4g}) at density {reached.density:.2f}; "
                               "loosen the budget, or take another recipe or structure")
    for _ in range(steps):
        middle = (easy + hard) / 2
        trial = attempt(middle)
        tried.append(trial)
        if trial.value <= limit:
            easy, best = middle, trial
        else:
            hard = middle
    return Search(best, tuple(tried))
