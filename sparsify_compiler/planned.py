"""What a planner says of its plan, as plain data: what each site could have been, what it was predicted to cost, and how good the solution is."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Option:
    """One choice that a site had.

    name       the choice and its density, to read: "16x1, obs, 30 %"; "dense" for the layer as it was
    predicted  milliseconds of the site's fastest form, as the plan assumed it
    loss       what the plan assumed that the choice costs, in the unit of Planned.loss_unit
    bytes      of the weight in that form
    why_not    why it was not taken: "slower than dense", "dominated by 2:4", "0.8 ms more for 0.001 less loss"; "" for the one that was
    """

    name: str
    predicted: float | None = None
    loss: float | None = None
    bytes: float | None = None
    why_not: str = ""

    @property
    def taken(self) -> bool:
        """Is this what the site became?"""
        return not self.why_not


@dataclass(frozen=True)
class Point:
    """A plan on the Pareto front: the cost of all sites, in the budget's unit, and the loss that it takes."""

    cost: float
    loss: float
    taken: bool = False


@dataclass(frozen=True)
class Planned:
    """The plan, and the solver's certificate.

    pipeline   the plan as pipeline text, which parses back and can be run again
    unit       of costs: "ms", "bytes", "FLOPs" or "loss"
    loss_unit  what a loss is: "rise of the output error", "nats", ...
    limit      what the whole model has to keep to, in `unit`
    cost, loss of the plan over all sites, as predicted when it was made
    bound      the least loss that any plan of these choices can have within the limit, by the linear relaxation
    front      the Pareto front, cheapest first; the plan that was taken is a point of it, or lies beside it
    seconds    that the solver took
    rounds     how often the plan was made, measured and solved again
    rest       what was measured of all that is no site, in `unit`: what the limit leaves for the sites is less by that
    belief     how far differences between sites counted, 0 to 1: less than 1 where an evener plan lost less in the whole model
    lost       of a budget of quality: what the whole model loses as measured, in the budget's unit; without a metric of the user's on batches that
               nothing was fitted to, with what chance may add (held_out.upper)
    """

    pipeline: str
    unit: str = "ms"
    loss_unit: str = ""
    limit: float | None = None
    cost: float | None = None
    loss: float | None = None
    bound: float | None = None
    front: list[Point] = field(default_factory=list)
    seconds: float | None = None
    rounds: int | None = None
    rest: float = 0.0
    belief: float = 1.0
    lost: float | None = None

    @property
    def gap(self) -> float | None:
        """By which share of its loss the plan may lie above the best there is: 0.02 for two per cent."""
        if self.loss is None or self.bound is None:
            return None
        return max(self.loss - self.bound, 0.0) / self.loss if self.loss > 0 else 0.0
