"""What a planner knows before it plans: what each site could be, what that would cost, and what the model would lose; and choosing from it."""

from __future__ import annotations

import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from . import catalog
from .passes_api import Context, Pass
from .pipeline import Pipeline
from .planned import Option, Planned, Point
from .program import Program
from .silence import without_lines

DENSE = "dense"
SECONDS, BYTES, WEIGHTS, FLOPS, JOULES = "seconds", "bytes", "weights", "flops", "joules"
# Unit in a report, and how many of it one of ours is.
SHOWN = {SECONDS: ("ms", 1e3), BYTES: ("bytes", 1.0), WEIGHTS: ("weights", 1.0), FLOPS: ("MFLOP", 1e-6), JOULES: ("mJ", 1e3)}


@dataclass(frozen=True)
class Offer:
    """One way a site could be. `choice` is the planner's own number of the method, None for the layer as it is; a density is kept / total."""

    name: str
    choice: int | None = None
    density: float = 1.0
    loss: float = 0.0


@dataclass(frozen=True)
class Plan:
    """An offer for every site, the pipeline that makes it so, and the solver's certificate."""

    taken: Mapping[str, Offer]
    pipeline: Pipeline
    loss: float
    cost: float
    bound: float


@dataclass
class Survey:
    """The offers of every site, the first of them the layer as it is.

    price    (kind of cost) -> site -> the costs of its offers; computed when it is first asked for
    pipeline (site -> offer) -> the passes that make it so
    alike    groups of sites that take offers of the same number
    scale    site -> what its losses are multiplied with: what probes of the whole model said of the estimates
    belief   how far the differences between sites are believed, 0 to 1 (see believe)
    sketch   (the passes of a plan) -> the Program after them, made as quickly as is enough to compare plans. None where only the passes can tell
    """

    offers: dict[str, list[Offer]]
    price: Callable[[str], dict[str, list[float]]]
    pipeline: Callable[[Mapping[str, Offer]], Pipeline]
    loss_unit: str = ""
    alike: list[list[str]] = field(default_factory=list)
    scale: dict[str, float] = field(default_factory=dict)
    belief: float = 1.0
    sketch: Callable[[Pipeline], Program] | None = None
    seconds: float = 0.0  # that the solver took, over all plans
    _typical: dict[tuple[int | None, float], float] = field(default_factory=dict)  # what offers of a kind lose on a weight
    _costs: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _thought: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # costs before anything was measured, where something was
    # (kind, cost that like sites were thought to have, choice, density) -> logarithms of measured / thought
    _known: dict[tuple[str, float, int | None, float], list[float]] = field(default_factory=dict)

    def costs(self, kind: str) -> dict[str, list[float]]:
        """Site -> what each of its offers costs."""
        if kind not in self._costs:
            self._costs[kind] = self.price(kind)
        return self._costs[kind]

    def cost(self, kind: str, site: str, offer: Offer) -> float:
        """What an offer costs."""
        return self.costs(kind)[site][self.offers[site].index(offer)]

    def spent(self, kind: str, taken: Mapping[str, Offer]) -> float:
        """What offers cost together, by what is known now."""
        return math.fsum(self.cost(kind, site, offer) for site, offer in taken.items())

    def loss(self, site: str, offer: Offer) -> float:
        """What an offer is thought to lose."""
        own = offer.loss * self.scale.get(site, 1.0)
        if self.belief == 1 or own <= 0:
            return own
        typical = self._typical[offer.choice, offer.density] * self.cost(WEIGHTS, site, self.offers[site][0])
        return math.exp(self.belief * math.log(own) + (1 - self.belief) * math.log(typical))

    def believe(self, share: float) -> None:
        """How far the differences between sites count: at 1 all that was estimated, at 0 none of it, so that only the sites' sizes differ.

        In between the logarithm of what a weight of the site loses lies between its own and that of a typical one, the mean over all weights.
        """
        self.belief, self._typical = 1.0, {}
        sums: dict[tuple[int | None, float], tuple[float, float]] = {}
        for site, offers in self.offers.items():
            size = self.cost(WEIGHTS, site, offers[0]) if share < 1 else 0.0
            for offer in offers:
                loss, weights = sums.get((offer.choice, offer.density), (0.0, 0.0))
                sums[offer.choice, offer.density] = loss + self.loss(site, offer), weights + size
        if share < 1:
            self.belief, self._typical = share, {kind: loss / weights for kind, (loss, weights) in sums.items()}

    def lost(self, taken: Mapping[str, Offer]) -> float:
        """What offers are thought to lose together."""
        return math.fsum(self.loss(site, offer) for site, offer in taken.items())

    def plan(self, kind: str, limit: float) -> Plan:
        """The offers that together lose least within a limit of one kind of cost. Raises BudgetError where nothing stays within it."""
        losses, costs = self._rows(kind)
        return self._solved(kind, losses, [(costs, limit)], swapped=False)

    def within_loss(self, kind: str, most: float) -> Plan:
        """The offers that together cost least while no more is lost than that."""
        losses, costs = self._rows(kind)
        return self._solved(kind, costs, [(losses, most)], swapped=True)

    def as_it_is(self, kind: str) -> Plan:
        """Nothing changes."""
        taken = {site: offers[0] for site, offers in self.offers.items()}
        return Plan(taken, Pipeline(), 0.0, math.fsum(rows[0] for rows in self.costs(kind).values()), 0.0)

    def without(self, kind: str, plan: Plan, sites: Iterable[str]) -> Plan:
        """The same plan with some sites as they were."""
        taken = {**plan.taken, **{site: self.offers[site][0] for site in sites if site in self.offers}}
        loss = self.lost(taken)
        return Plan(taken, self.pipeline(taken), loss, self.spent(kind, taken), min(plan.bound, loss))

    def front(self, kind: str, most: int = 60) -> list[Plan]:
        """Plans along the trade-off, the cheapest first; without a bound of their own, for they lie on it."""
        losses, costs = self._rows(kind)
        points = catalog.get("solver", "solve").front(losses, costs, alike=self._groups(), most=most)
        return [self._plan(point.choice, point.loss, point.cost, point.loss) for point in points]

    def correct(self, kind: str, measured: Mapping[str, float], taken: Mapping[str, Offer], dense: Mapping[str, float]) -> None:
        """Take over what was measured of a plan: of its offers, and of the sites as they were.

        Sites are alike when their dense forms were thought to cost the same. Of like sites the median counts, over all that was ever measured: who
        believes each of a hundred measurements plans for those that erred. What no site was measured at lies between the densities that some were.
        No offer takes longer than the site as it was: what would, is not lowered so.
        """
        thought = self._thought.get(kind) or self.costs(kind)
        known = {key: list(logs) for key, logs in self._known.items()}
        rows = [(site, self.offers[site][0], value) for site, value in dense.items() if site in self.offers]
        rows += [(site, taken[site], value) for site, value in measured.items() if taken[site].choice is not None or site not in dense]
        for site, offer, value in rows:
            before = thought[site][self.offers[site].index(offer)]
            if value > 0 and before > 0:
                known.setdefault((kind, thought[site][0], offer.choice, offer.density), []).append(math.log(value / before))
        self._thought, self._known = {**self._thought, kind: thought}, known
        curves: dict[tuple[float, int | None], dict[float, float]] = {}
        for (of, first, choice, density), logs in known.items():
            if of == kind:
                curves.setdefault((first, choice), {})[density] = statistics.median(logs)
        costs = {}
        for site, offers in self.offers.items():
            first = thought[site][0]
            found = [cost * _ratio(curves.get((first, offer.choice)), offer.density) for cost, offer in zip(thought[site], offers, strict=True)]
            costs[site] = [min(cost, found[0]) for cost in found] if kind == SECONDS else found
        self._costs = {**self._costs, kind: costs}

    def planned(self, kind: str, plan: Plan, limit: float | None, rounds: int, whole: Pipeline, rest: float = 0.0) -> Planned:
        """The plan as the report's data; `whole` is it with the passes around it, `rest` what was measured of all that is no site."""
        unit, times = SHOWN[kind]
        front = [Point(one.cost * times, one.loss) for one in self.front(kind) if one.taken != plan.taken]
        front.append(Point(self.spent(kind, plan.taken) * times, self.lost(plan.taken), taken=True))
        return Planned(str(whole), unit, self.loss_unit, None if limit is None else limit * times, plan.cost * times, plan.loss, plan.bound,
                       sorted(front, key=lambda point: point.cost), self.seconds, rounds, rest * times, self.belief)

    def options(self, site: str, taken: Offer) -> list[Option]:
        """What a site could be, as the report's data."""
        seconds, size = self._costs.get(SECONDS, {}).get(site), self._costs.get(BYTES, {}).get(site)
        mine = self.offers[site].index(taken)
        shown = []
        for number, offer in enumerate(self.offers[site]):
            time_ms = None if seconds is None else seconds[number] * 1e3
            why = "" if number == mine else self._why_not(site, number, mine, seconds or size)
            shown.append(Option(offer.name, time_ms, self.loss(site, offer), None if size is None else size[number], why))
        return shown

    def _why_not(self, site: str, number: int, mine: int, costs: Sequence[float] | None) -> str:
        offer, taken = self.offers[site][number], self.offers[site][mine]
        lost = self.loss(site, offer) - self.loss(site, taken)
        if costs is None:
            return f"loses {lost:+.2g}"
        if number and costs[number] >= costs[0]:
            return "no cheaper than dense"
        better = next((o.name for o, c in zip(self.offers[site], costs, strict=True) if o is not offer and c <= costs[number]
                       and self.loss(site, o) <= self.loss(site, offer)), None)
        if better is not None:
            return f"{better} loses less and costs no more"
        cheaper = (costs[mine] - costs[number]) / costs[mine] if costs[mine] else 0.0
        return f"{abs(cheaper):.0%} {'cheaper' if cheaper > 0 else 'dearer'}, for {abs(lost):.2g} {'more' if lost > 0 else 'less'} loss"

    def _rows(self, kind: str) -> tuple[list[list[float]], list[list[float]]]:
        costs = self.costs(kind)
        losses = [[self.loss(site, offer) for offer in offers] for site, offers in self.offers.items()]
        return losses, [costs[site] for site in self.offers]

    def _groups(self) -> list[list[int]]:
        places = {site: number for number, site in enumerate(self.offers)}
        return [[places[site] for site in group] for group in self.alike]

    def _solved(self, kind: str, objective: list[list[float]], limits: list[tuple[list[list[float]], float]], *, swapped: bool) -> Plan:
        start = time.perf_counter()
        with without_lines(b"HighsMipSolverData"):  # scipy's solver prints so for itself, whatever it is told
            found = catalog.get("solver", "solve").solve(objective, limits, alike=self._groups())
        self.seconds += time.perf_counter() - start
        loss, cost = (found.spent[0], found.loss) if swapped else (found.loss, found.spent[0])
        return self._plan(found.choice, loss, cost, found.relaxed)

    def _plan(self, choice: Sequence[int], loss: float, cost: float, bound: float) -> Plan:
        taken = {site: offers[number] for (site, offers), number in zip(self.offers.items(), choice, strict=True)}
        return Plan(taken, self.pipeline(taken), loss, cost, bound)


def _ratio(logs: Mapping[float, float] | None, density: float) -> float:
    """By what a cost is multiplied, from the logarithms that are known at some densities: on the line between two of them, beyond as at the last."""
    if not logs:
        return 1.0
    return math.exp(np.interp(density, sorted(logs), [logs[one] for one in sorted(logs)]))


@dataclass(frozen=True)
class Planner(Pass):
    """A pass that chooses from what other passes could do to each site, and lets those that it chose do it.

    By itself it keeps to a density. compile() makes the survey itself, and plans again until the budget holds as measured.
    """

    idempotent: ClassVar[bool] = False

    @abstractmethod
    def survey(self, program: Program, ctx: Context) -> Survey:
        """What each site could be. Raises CalibrationError where that cannot be known without batches."""

    @abstractmethod
    def refine(self, survey: Survey, kind: str, plan: Plan, program: Program, ctx: Context) -> Plan:
        """Look at the losses again around a plan, where the other sites are what it makes of them, and plan again for what it costs.

        Another plan only where the whole model, not the sum of estimates, says that it loses less; else the first, and the survey as it was.
        """

    def run(self, program: Program, ctx: Context) -> Program:
        """The Program after the plan that keeps to a density, the pass's own or the budget's; as it was where there is none."""
        density = self.own_density() if self.own_density() is not None else ctx.density
        if density is None:
            ctx.miss("there is no budget, so nothing is traded for quality")
            return program
        survey = self.survey(program, ctx)
        if not survey.offers:
            return program
        plan = self.refine(survey, WEIGHTS, survey.plan(WEIGHTS, density * survey.as_it_is(WEIGHTS).cost), program, ctx)
        given = ctx.given
        found = plan.pipeline.run(program, ctx, ())
        ctx.given = given
        for site, offer in plan.taken.items():
            if site in found.decisions:
                found.decisions[site].loss, found.decisions[site].options = survey.loss(site, offer), survey.options(site, offer)
        ctx.planned = survey.planned(WEIGHTS, plan, density * survey.as_it_is(WEIGHTS).cost, 1, plan.pipeline)
        return found


def with_targets(item: Pass, targets: Mapping[str, float], **options: Any) -> Pass:
    """The same pass on these sites only, to the density that each is told."""
    changed: dict[str, Any] = {"targets": tuple(targets), "ignore": (), **options}
    own = item.own_density()
    if own is not None:
        changed["density"] = own  # said aloud, so that no budget of another number is in its way
    else:
        values = sorted(set(targets.values()))
        changed |= {"density": values[0]} if len(values) == 1 else {"budget": f"given(densities={dict(targets)!r})"}
    return replace(item, **changed)
