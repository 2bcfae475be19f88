"""Costs of kernels on this very machine: layers are timed in all of their forms, and the costs that are shipped are fitted to them.

What is shipped was fitted on a few processors; on another one predictions can be off by half (benchmarks/RESULTS.md, "Cost model"). A fit takes
minutes, once: it is kept beside the machine's numbers, and whatever predicts for this machine takes it from there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import catalog, machines
from .errors import InputError
from .progress import Show
from .work import Work, measure
from .work_draw import FITTING, KINDS, draw

if TYPE_CHECKING:
    from .cost_models.fit import Timed
    from .cost_models.machine import Machine

PULL = 0.1              # of the shipped costs
LAYERS = {"linears": 400, "others": 200, "kernels": 100}
EVERY = {"others": 4, "kernels": 8}     # a layer of these after so many linear ones
HELD = 5                # of every so many layers one is judged by, and not fitted on
LEAST = 2 * HELD        # layers
ALIKE = (("dense eager", "dense by output"), ("torch grouped_mm", "chosen experts"))


@dataclass(frozen=True)
class Fitted:
    """What a fit came to: layers and forms that were timed, and the median error of predictions on those that it did not see, before and after."""

    machine: Machine
    layers: int
    forms: int
    before: float
    after: float

    @property
    def kept(self) -> bool:
        """Do predictions gain by it?"""
        return self.after < self.before


def fit_host(minutes: float, show: Show = lambda what, done, total: None) -> Fitted:
    """Measure this machine, time layers for so many minutes, and keep what kernels cost here where predictions gain by it.

    Timings are kept one by one: a fit that is stopped goes on where it was. Nothing else should run meanwhile. Raises InputError.
    """
    if not 0 < minutes < 1440:
        raise InputError(f"minutes is a number above 0 and below a day, got {minutes!r}", where="fit_host")
    machine = replace(machines.measure_host(), costs={})
    timed = _timed(60 * minutes, machine, show)
    if len(timed) < LEAST:
        raise InputError(f"{len(timed)} layers were timed in {minutes:g} minutes, a fit takes {LEAST} or more", where="fit_host",
                         hint="again, with more minutes: what was built and timed is kept")
    seen = [point for i, points in enumerate(timed) if i % HELD for point in points]
    held = [point for i, points in enumerate(timed) if not i % HELD for point in points]
    trial = replace(machine, costs=_fit(seen, machine))
    before, after = error(held, machine), error(held, trial)
    found = Fitted(machine, len(timed), len(seen) + len(held), before, after)
    if not found.kept:
        return found
    machines.keep_costs(_fit(seen + held, machine))
    return replace(found, machine=machines.machine())


def error(points: Sequence[Timed], machine: Machine) -> float:
    """The median of |predicted / measured - 1|."""
    import statistics

    model = catalog.get("cost model", "predict")
    ratios: list[float] = [model.seconds(point.form, point.values, machine, point.between, point.again).total / point.seconds for point in points]
    return statistics.median(abs(ratio - 1) for ratio in ratios)


def timed_forms(work: Work, machine: Machine) -> list[Timed]:
    """Every form of a layer that has a formula, timed here."""
    return timed(work, measure(work), machine)


def timed(work: Work, seconds: Mapping[str, float], machine: Machine, own: bool = False) -> list[Timed]:
    """Forms that were timed in turns, those that have a formula; own: the machine goes with each.

    Between two calls of a form not only work.between bytes are read, but the weights of all other forms, too. Pairs of ALIKE read the same one, one
    half a turn after the other.
    """
    model, fit = catalog.get("cost model", "predict"), catalog.get("cost model", "fit")
    formulas = {form.name: form for form in model.forms(work.op, work.values, work.dtype, machine) if form.name in seconds}
    weights = {name: model.weight(form, work.values, machine) for name, form in formulas.items()}
    alike = next((pair for pair in ALIKE if set(pair) <= set(weights)), ())
    distinct = sum(weights.values()) - sum(weights[name] for name in alike[1:])
    others = {name: (distinct - weight) / (2 if name in alike else 1) for name, weight in weights.items()}
    return [fit.Timed(form, work.values, work.between + others[name], seconds[name], machine if own else None, again=work.between)
            for name, form in formulas.items()]


def _timed(seconds: float, machine: Machine, show: Show) -> list[list[Timed]]:
    end, found = time.monotonic() + seconds, []
    for work in _layers():
        left = end - time.monotonic()
        if left <= 0:
            break
        show("time layers", int(seconds - left), int(seconds))
        found.append(timed_forms(work, machine))
    show("time layers", int(seconds), int(seconds))
    return found


def _layers() -> list[Work]:
    """Linear layers, and the other kinds among them."""
    drawn = {kind: draw(FITTING.start, count, KINDS[kind]) for kind, count in LAYERS.items()}
    mixed = []
    for number, work in enumerate(drawn.pop("linears"), 1):
        mixed += [work, *(rest.pop(0) for kind, rest in drawn.items() if rest and number % EVERY[kind] == 0)]
    return mixed


def _fit(points: Sequence[Timed], machine: Machine) -> Mapping[str, Mapping[str, float]]:
    shipped = catalog.get("cost model", "shipped").costs_of(machine.arch, machine.features)
    found: Mapping[str, Mapping[str, float]] = catalog.get("cost model", "fit").fit(points, machine, shipped, PULL)
    return found
