"""From a budget to a lowered Program: with a planner by solving, with any other recipe by searching its density."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from .call import instantiate
from .pipeline import Pipeline
from .plan import Attempt, search
from .plan_loop import PlanLoop
from .program import Program
from .survey import Planner
from .trials import COMPILED, counted, dense_latency, idle, latency, loss_of_quality

if TYPE_CHECKING:
    from .compile_job import Job

Forms = Mapping[str, Callable[[], object]]

def meet_budget(job: Job, captured: Program, dense: Forms) -> Program:
    """The Program, lowered, that meets the budget. Raises BudgetError with the best that was reached when none does."""
    budget = job.budget
    if budget is None or budget.density is not None:
        return job.build(captured, budget.density if budget else None)
    planner = next((item for item in job.pipeline.passes if isinstance(item, Planner)), None)
    if planner is not None:
        return PlanLoop(job, planner, captured, dense).run()
    fixed = _fixed_density(job.pipeline)
    if budget.of_quality:
        lost = loss_of_quality(job, captured)
        most = next(iter(budget.given().values()))
        return job.lower(search(budget, most, lambda density: _try_quality(job, captured, density, lost), fixed=fixed).taken.result)
    if budget.counted is not None:
        kind, limit = budget.counted
        whole = counted(job, captured, kind).whole
        return search(budget, limit, lambda density: _try_counted(job, captured, density, whole), fixed=fixed).taken.result
    limit = latency_limit(job, dense)
    return search(budget, limit, lambda density: _try_latency(job, captured, density), fixed=fixed).taken.result


def latency_limit(job: Job, dense: Forms) -> float:
    """Milliseconds that a budget of latency or speed-up allows."""
    assert job.budget is not None
    if job.budget.latency_ms is not None:
        return job.budget.latency_ms
    assert job.budget.speedup is not None
    return min(dense_latency(job, dense).values()) / job.budget.speedup


def _try_quality(job: Job, captured: Program, density: float, lost: Callable[[nn.Module], float]) -> Attempt[Program]:
    rewritten = job.rewrite(captured, density)
    return Attempt(density, lost(instantiate(rewritten)), rewritten)


def _try_counted(job: Job, captured: Program, density: float, whole: Callable[[Program], float]) -> Attempt[Program]:
    lowered = job.build(captured, density)
    return Attempt(density, whole(lowered), lowered)


def _try_latency(job: Job, captured: Program, density: float) -> Attempt[Program]:
    """Sites that do not pay keep their own weights: quality is only given up where it buys time."""
    lowered = job.build(captured, density)
    for_nothing = idle(lowered)
    if for_nothing:
        lowered = job.build(captured, density, ignore=for_nothing)
    return Attempt(density, latency(job, lowered)[COMPILED], lowered)


def _fixed_density(pipeline: Pipeline) -> float | None:
    """The density that the recipe has by itself, whatever the budget says: 0.5 of a 2:4 recipe. None when the budget may choose."""
    own = [density for item in pipeline.passes if (density := item.own_density()) is not None]
    return min(own) if own else None
