"""Closing the loop around a planner: solve, lower, measure, correct what was predicted, and solve again, until the budget holds as measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from .call import instantiate
from .decision import Decision
from .errors import BudgetError
from .pipeline import Pipeline
from .program import Program
from .survey import SECONDS, SHOWN, Offer, Plan, Planner, Survey
from .trials import COMPILED, counted, dense_latency, idle, latency, loss_of_quality

if TYPE_CHECKING:
    from .compile_job import Job

ROUNDS = 5  # plans that are lowered and measured, at the most
REFINED = 2  # of them after the losses were looked at again
QUALITY_ROUNDS = 7  # plans whose quality is measured: each halves the interval that the limit of the loss lies in
MORE_ROUNDS = 3  # likewise, once it is known what layers cost: the limit that held is near the one that is looked for
REPLANNED = 3  # times that a budget of quality plans again with what was measured of the layers
WORTH = 0.99  # of what the layers take: a plan that is not thought to get below is not tried
CLOSE = 0.05  # part of the limit: a plan this near below it is near enough
AIM = 0.985  # of a limit: what the plan is made for, since a second measurement differs from the first
SAFETY = 0.97  # of a limit of quality, which another set of data sees a little differently


@dataclass(frozen=True)
class Trial:
    """A plan as it was lowered, and its value in the unit of the limit: seconds, bytes, operations, joules, or quality lost."""

    plan: Plan
    value: float
    lowered: Program


@dataclass
class PlanLoop:
    """One budget, met by a planner."""

    job: Job
    planner: Planner
    captured: Program
    dense: Mapping[str, Callable[[], object]]
    rounds: int = 0
    trials: list[Trial] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)  # of the sites, as the first trial found them: nothing was changed in it
    predicted: dict[tuple[str, Offer], float] = field(default_factory=dict)  # what each offer of a site was thought to cost before it was measured

    def run(self) -> Program:
        """The lowered Program whose plan meets the budget with the least loss. Raises BudgetError with the best that was reached."""
        job, budget = self.job, self.job.budget
        assert budget is not None
        passes = job.rewriting().passes
        place = passes.index(self.planner)
        self.before, self.after = Pipeline(passes[:place]), Pipeline(passes[place + 1 :])
        self.base = self.before.run(self.captured, job.context(None), job.instruments)
        self.survey: Survey = self.planner.survey(self.base, job.context(None))
        if budget.of_quality:
            return self.of_quality(next(iter(budget.given().values())))
        if budget.counted is not None:
            kind, most = budget.counted
            by = counted(job, self.captured, kind)
            return self.of_cost(kind, most, by.whole, by.now, by.was)
        best, fastest = min((median, name) for name, median in dense_latency(job, self.dense).items())
        limit = budget.latency_ms if budget.latency_ms is not None else best / (budget.speedup or 1.0)
        seconds = partial(self._seconds, fastest=fastest, reference=best, limit=limit / 1e3)
        return self.of_cost(SECONDS, limit / 1e3, seconds, took, lambda row: _in_seconds(row.dense_ms))

    # --- a limit on what the model costs ------------------------------------------------------------------------------------------------

    def of_cost(self, kind: str, limit: float, measured: Callable[[Program], float], now: Callable[[Decision], float | None],
                was: Callable[[Decision], float | None]) -> Program:
        """Plans for what the sites may cost: the limit, less what was measured of everything else."""
        def tried(plan: Plan) -> Trial:
            return self._try(plan, kind, measured, now, was)

        trial = tried(self.survey.as_it_is(kind))
        if trial.value > limit:
            self._approach(self._for_room(trial, kind, limit), kind, limit, tried, ROUNDS)
        best = self._best(kind, limit)
        second = self.planner.refine(self.survey, kind, best.plan, self.base, self.job.context(None))
        self.survey.sketch = None  # nor what it holds of the dense model: plans are not looked at any more
        if second is not best.plan:
            self._approach(second, kind, limit, tried, REFINED)
            best = self._best(kind, limit)
        for_nothing = idle(best.lowered)
        if for_nothing:  # quality is given up only where it buys something
            again = tried(self.survey.without(kind, best.plan, for_nothing))
            best = again if again.value <= limit else best
        return self._finish(best, kind, limit)

    def _approach(self, plan: Plan, kind: str, limit: float, tried: Callable[[Plan], Trial], rounds: int) -> None:
        """Try a plan, and by what it was measured to take another, until one is near below the limit and no other is thought to lose much less, or
        was tried before."""
        for _ in range(rounds):
            if any(plan.taken == old.plan.taken for old in self.trials):
                return
            trial = tried(plan)
            plan = self._for_room(trial, kind, limit)
            if limit * (1 - CLOSE) <= trial.value <= limit and plan.loss >= (1 - CLOSE) * self.survey.lost(trial.plan.taken):
                return

    def _for_room(self, trial: Trial, kind: str, limit: float) -> Plan:
        """The plan for what the limit leaves to the sites."""
        return self._next(kind, limit * AIM - (trial.value - self.survey.spent(kind, trial.plan.taken)))

    def _best(self, kind: str, limit: float) -> Trial:
        """Of the trials within the limit the one that loses least, by what is known now. Raises BudgetError where there is none."""
        kept = [one for one in self.trials if one.value <= limit]
        if not kept:
            lowest = min(self.trials, key=lambda one: one.value)
            raise BudgetError(f"the budget cannot be met: {self.job.budget}", where="plan", hint=_hint(kind, lowest.value, limit))
        return min(kept, key=lambda one: (self.survey.lost(one.plan.taken), one.value))

    def _next(self, kind: str, room: float) -> Plan:
        """The plan for what the sites may cost together; where none is so cheap, the cheapest there is."""
        try:
            return self.survey.plan(kind, room)
        except BudgetError:
            return self.survey.front(kind, 1)[0]

    def _try(self, plan: Plan, kind: str, measured: Callable[[Program], float], now: Callable[[Decision], float | None],
             was: Callable[[Decision], float | None]) -> Trial:
        """Lower a plan, measure it, and correct the survey by that."""
        lowered = self.build(plan)
        value = measured(lowered)
        self.rounds += 1
        self._correct(plan, lowered, kind, now, was)
        self.trials.append(Trial(plan, value, lowered))
        return self.trials[-1]

    def _correct(self, plan: Plan, lowered: Program, kind: str, now: Callable[[Decision], float | None],
                 was: Callable[[Decision], float | None]) -> None:
        """Take over what was measured of a plan's sites."""
        rows = {site: lowered.decisions[site] for site in plan.taken if site in lowered.decisions}
        for site, row in rows.items():
            self.dtypes.setdefault(site, row.dtype)
        as_it_was = {site: row for site, row in rows.items() if row.dtype == self.dtypes[site]}  # another dtype's dense form is not the layer's own
        of_sites, dense = _known(rows, now), _known(as_it_was, was)
        if kind == SECONDS:
            for site, row in rows.items():
                offer = plan.taken[site]
                row.predicted_ms = self.predicted.setdefault((site, offer), self.survey.cost(kind, site, offer)) * 1e3
        self.survey.correct(kind, of_sites, plan.taken, dense)

    def _seconds(self, lowered: Program, fastest: str, reference: float, limit: float) -> float:
        """Of the whole model. What is within the limit is measured once more, and the longer time counts: a lucky measurement meets no budget."""
        first = self._beside(lowered, fastest, reference)
        return first if first > limit else max(first, self._beside(lowered, fastest, reference))

    def _beside(self, lowered: Program, fastest: str, reference: float) -> float:
        """Beside the fastest dense form: where that takes longer than it did, the machine is slower, for both."""
        assert self.job.budget is not None
        found = latency(self.job, lowered, {fastest: self.dense[fastest]})
        drift = 1.0 if self.job.budget.latency_ms is not None else reference / found[fastest]
        return found[COMPILED] * drift / 1e3

    # --- a limit on what quality may be lost ----------------------------------------------------------------------------------------------

    def of_quality(self, most: float) -> Program:
        """The cheapest plan whose measured loss of quality stays within the limit.

        What is measured of the layers of a plan corrects what all are thought to cost. Where another plan that may be thought to lose as much is
        cheaper by that, it is looked for again: what layers lose that gain nothing is then lost by others, which gain.
        """
        lost = loss_of_quality(self.job, self.captured)
        limit, self.survey.sketch = most, None  # plans are measured, and none is looked at beside another
        for rounds in (QUALITY_ROUNDS, *[MORE_ROUNDS] * REPLANNED):
            plan, limit, value = self._most_lost(limit, most, lost, rounds)
            if any(plan.taken == old.plan.taken for old in self.trials) or (self.trials and not limit):
                break
            self.trials.append(self._lowered(plan, value, most, lost))
            best = min(self.trials, key=self._spent)
            if self.survey.within_loss(SECONDS, limit).cost > WORTH * self._spent(best):
                break
        best = min(self.trials, key=self._spent)
        return self._finish(replace(best, plan=replace(best.plan, cost=self._spent(best))), SECONDS, None, lost=best.value)

    def _spent(self, trial: Trial) -> float:
        """Seconds of a plan's sites, by what is known now."""
        return self.survey.spent(SECONDS, trial.plan.taken)

    def _most_lost(self, limit: float, most: float, lost: Callable[[nn.Module], float], rounds: int) -> tuple[Plan, float, float]:
        """(the plan that may be thought to lose the most, of those whose measured loss holds; how much that is; what was measured).

        A search that begins at `limit`. The model as it is, and nothing, where none of so many holds.
        """
        front = [plan for plan in self.survey.front(SECONDS, 200) if plan.loss > 0]
        found = self.survey.as_it_is(SECONDS), 0.0, 0.0
        tried: list[tuple[float, float]] = []
        known: dict[str, float] = {}
        limit = limit if not front else min(max(limit, front[-1].loss), front[0].loss)
        while front and len(known) < rounds and len(tried) < 3 * rounds:  # limits that are near to each other may have the same plan
            plan = self.survey.within_loss(SECONDS, limit)
            made = str(plan.pipeline)
            if made not in known:
                known[made] = lost(instantiate(self.rewrite(plan)))
                self.rounds += 1
            value = known[made]
            tried.append((limit, value))
            self.job.progress(f"plan: loses {value:.3g} of {most:.3g}", self.rounds, QUALITY_ROUNDS + REPLANNED * MORE_ROUNDS)
            if _holds(value, most):
                found = plan, limit, value
                if value >= most * (SAFETY - 2 * CLOSE) or limit >= front[0].loss:
                    break
            limit = min(_next_limit(tried, most), front[0].loss)
        return found

    def _lowered(self, plan: Plan, value: float, most: float, lost: Callable[[nn.Module], float]) -> Trial:
        """Lower a plan that loses `value`, and take over what was measured of its layers. Where it holds so, those that gain nothing stay dense."""
        lowered = self.build(plan)
        self._correct(plan, lowered, SECONDS, took, lambda row: _in_seconds(row.dense_ms))
        for_nothing = idle(lowered)
        if for_nothing:
            without = self.survey.without(SECONDS, plan, for_nothing)
            less = lost(instantiate(self.rewrite(without)))
            if _holds(less, most):
                return Trial(without, less, self.build(without))
        return Trial(plan, value, lowered)

    # --- building ---------------------------------------------------------------------------------------------------------------------------

    def build(self, plan: Plan) -> Program:
        """The Program after a plan, lowered."""
        return (plan.pipeline | self.after | self.job.lowering()).run(self.base, self.job.context(None), self.job.instruments)

    def rewrite(self, plan: Plan) -> Program:
        """The Program after a plan, not lowered."""
        return (plan.pipeline | self.after).run(self.base, self.job.context(None), self.job.instruments)

    def _finish(self, trial: Trial, kind: str, limit: float | None, lost: float | None = None) -> Program:
        """Write the plan down for the report."""
        survey, plan = self.survey, trial.plan
        rest = 0.0 if limit is None else trial.value - survey.spent(kind, plan.taken)
        for site, offer in plan.taken.items():
            row = trial.lowered.decisions.get(site)
            if row is not None:
                row.loss, row.options = survey.loss(site, offer), survey.options(site, offer)
        whole = self.before | plan.pipeline | self.after
        self.job.plan = replace(survey.planned(kind, plan, limit, self.rounds, whole, rest), lost=lost)
        return trial.lowered


def _holds(value: float, most: float) -> bool:
    return value <= most * SAFETY or (value <= most and most == 0)


def _next_limit(tried: Sequence[tuple[float, float]], most: float) -> float:
    """The next limit of the estimated loss to try, by (limit, measured loss) of those before.

    Between what holds and what does not, where the line between their logarithms meets what is aimed at, and not too near to either; while one of
    them is not known, in proportion to what was measured last.
    """
    kept, over = [one for one in tried if _holds(one[1], most)], [one for one in tried if not _holds(one[1], most)]
    aim = most * (SAFETY - CLOSE)
    if kept and over:
        (low, there), (high, beyond) = max(kept), min(over)
        share = math.log(aim / there) / math.log(beyond / there) if 0 < there < beyond < math.inf else 0.5
        return low * math.pow(high / low, min(max(share, 0.2), 0.8))
    limit, value = tried[-1]
    step = aim / value if value > 0 else math.inf
    return limit * (min(max(step, 1.25), 4.0) if kept else max(min(step, 0.8), 0.25))


def _known(rows: Mapping[str, Decision], read: Callable[[Decision], float | None]) -> dict[str, float]:
    """Site -> what a row says, where it says something."""
    found = {site: read(row) for site, row in rows.items()}
    return {site: value for site, value in found.items() if value is not None}


def took(row: Decision) -> float | None:
    """Seconds of what a plan made of a site. Where that lost to the dense form, its own time: other densities are judged by it, too."""
    if row.format == "dense" and row.structure != "dense" and row.sparse_ms is not None and row.dense_ms is not None:
        return max(row.sparse_ms, row.dense_ms) / 1e3
    return _in_seconds(row.compiled_ms)


def _in_seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3


def _hint(kind: str, lowest: float, limit: float) -> str:
    unit, times = SHOWN[kind]
    return (f"the best that a plan reaches is {lowest * times:.4g} {unit}, the limit is {limit * times:.4g}; loosen the budget, or give the "
            "planner lower densities or other choices")
