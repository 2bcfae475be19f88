"""Rivals of the solver: other ways to say what each layer becomes, at the same predicted cost. Each gives site -> Offer.

uniform, erk, owl                every layer by one rule, in one structure, the rule's density found by bisection
greedy, evolutionary, random     search among the same offers, by the same estimates of what they lose, as the solver has
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from sparsify_compiler.passes.prune._layers import find_layers
from sparsify_compiler.passes.prune.budgets.erk import erk as erk_densities
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program
from sparsify_compiler.survey import SECONDS, Offer, Survey

Taken = dict[str, Offer]
STEPS = 30                          # of a bisection
LEAST = 0.02                        # density
POPULATION, GENERATIONS, KEPT = 50, 40, 10
MUTATED = 0.1                       # share of the sites of a child
TRIES = POPULATION * GENERATIONS    # of the random search, as many as the evolutionary search looks at


def cost_at(survey: Survey, site: str, choice: int, density: float) -> float:
    """Seconds of a choice at any density, on the line between its offers and the dense layer; those of the dense layer where they are fewer."""
    costs = survey.costs(SECONDS)[site]
    known = sorted((offer.density, cost) for offer, cost in zip(survey.offers[site], costs, strict=True) if offer.choice == choice)
    dense = costs[0]
    if density >= 1 or not known:
        return dense
    below = [pair for pair in known if pair[0] <= density] or known[:1]
    above = [pair for pair in known if pair[0] > density] or [(1.0, dense)]
    (low, cheap), (high, dear) = below[-1], above[0]
    return min(dense, cheap + (dear - cheap) * (density - low) / (high - low) if high > low else cheap)


def by_rule(survey: Survey, choice: int, limit: float, densities: Callable[[float], Mapping[str, float]]) -> Taken:
    """The densest of a rule's allocations that costs no more than the limit."""
    low, high = LEAST, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        spent = math.fsum(cost_at(survey, site, choice, density) for site, density in densities(middle).items())
        low, high = (middle, high) if spent <= limit else (low, middle)
    return {site: Offer(f"{density:.0%}", choice, density) if density < 1 else survey.offers[site][0] for site, density in densities(low).items()}


def uniform(survey: Survey, choice: int, limit: float) -> Taken:
    return by_rule(survey, choice, limit, lambda density: dict.fromkeys(survey.offers, density))


def erk(survey: Survey, choice: int, limit: float, shapes: Mapping[str, tuple[int, ...]]) -> Taken:
    return by_rule(survey, choice, limit, lambda density: erk_densities(shapes, density))


def owl(survey: Survey, choice: int, limit: float, captured: Program, ctx: Context, structure: str) -> Taken:
    """OWL's window is moved as a whole: where it is clamped does not depend on what is cut elsewhere."""
    middle = 0.5
    rows = Pipeline((MaskWeights("weight_times_input_norm", structure, "owl", middle),)).run(captured, ctx, ()).decisions
    found = {site: rows[site].budget or middle for site in survey.offers}
    return by_rule(survey, choice, limit, lambda density: {site: min(max(value + density - middle, LEAST), 1.0) for site, value in found.items()})


class Search:
    """The offers of all sites as rows of numbers, a choice as a list of places in them."""

    def __init__(self, survey: Survey, limit: float, seed: int = 0) -> None:
        self.survey, self.limit, self.random = survey, limit, random.Random(seed)
        self.sites = list(survey.offers)
        self.costs = [survey.costs(SECONDS)[site] for site in self.sites]
        self.losses = [[survey.loss(site, offer) for offer in survey.offers[site]] for site in self.sites]

    def taken(self, picked: Sequence[int]) -> Taken:
        return {site: self.survey.offers[site][place] for site, place in zip(self.sites, picked, strict=True)}

    def cost(self, picked: Sequence[int]) -> float:
        return math.fsum(row[place] for row, place in zip(self.costs, picked, strict=True))

    def loss(self, picked: Sequence[int]) -> float:
        return math.fsum(row[place] for row, place in zip(self.losses, picked, strict=True))

    def greedy(self) -> Taken:
        """From dense, again and again the one change of one layer that loses least for what it saves, until the limit is kept."""
        picked = [0] * len(self.sites)
        while self.cost(picked) > self.limit:
            steps = [(self._price(site, picked[site], place), site, place) for site in range(len(picked)) for place in range(len(self.costs[site]))
                     if self.costs[site][place] < self.costs[site][picked[site]]]
            if not steps:
                break
            _, site, place = min(steps)
            picked[site] = place
        return self.taken(picked)

    def _price(self, site: int, old: int, new: int) -> float:
        return (self.losses[site][new] - self.losses[site][old]) / (self.costs[site][old] - self.costs[site][new])

    def any(self) -> list[int]:
        """Offers drawn for every layer, made to fit."""
        return self._fitting([self.random.randrange(len(row)) for row in self.costs])

    def _fitting(self, picked: list[int]) -> list[int]:
        """Layers drawn by chance take a cheaper offer by chance until the limit is kept; then they take dearer ones while it is."""
        while self.cost(picked) > self.limit:
            site = self.random.randrange(len(picked))
            cheaper = [place for place, cost in enumerate(self.costs[site]) if cost < self.costs[site][picked[site]]]
            picked[site] = self.random.choice(cheaper) if cheaper else picked[site]
        for site in self.random.sample(range(len(picked)), len(picked)):
            room = self.limit - self.cost(picked) + self.costs[site][picked[site]]
            losses = self.losses[site]
            better = [place for place, cost in enumerate(self.costs[site]) if cost <= room and losses[place] < losses[picked[site]]]
            picked[site] = self.random.choice(better) if better else picked[site]
        return picked

    def randomly(self) -> Taken:
        """The best of TRIES."""
        return self.taken(min((self.any() for _ in range(TRIES)), key=self.loss))

    def evolutionary(self) -> Taken:
        """As in SparseViT (arXiv:2303.17605, section 3.3): the best survive, half of the children cross two of them, half are one of them mutated."""
        alive = [self.any() for _ in range(POPULATION)]
        for _ in range(GENERATIONS - 1):
            best = sorted(alive, key=self.loss)[:KEPT]
            crossed = [[self.random.choice(pair) for pair in zip(self.random.choice(best), self.random.choice(best), strict=True)]
                       for _ in range((POPULATION - KEPT) // 2)]
            mutated = [[self.random.randrange(len(row)) if self.random.random() < MUTATED else place
                        for row, place in zip(self.costs, self.random.choice(best), strict=True)] for _ in range((POPULATION - KEPT) // 2)]
            alive = best + [self._fitting(child) for child in crossed + mutated]
        return self.taken(min(alive, key=self.loss))


def made(name: str, survey: Survey, limit: float, captured: Program, ctx: Context, structures: Sequence[str]) -> Taken:
    """The allocation of a rival, "uniform 16x1" or "greedy"."""
    rule, _, structure = name.partition(" ")
    if rule in ("greedy", "evolutionary", "randomly"):
        found: Taken = getattr(Search(survey, limit), rule)()
        return found
    choice = structures.index(structure)
    if rule == "erk":
        shapes = {layer.path: tuple(layer.weight.shape) for layer in find_layers(captured, ("linear",), ())[0]}
        return erk(survey, choice, limit, {site: shapes[site] for site in survey.offers})
    return owl(survey, choice, limit, captured, ctx, structure) if rule == "owl" else uniform(survey, choice, limit)
