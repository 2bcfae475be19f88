"""Plots of a plan: what every loss would have cost, and what each site could have been."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sparsify_compiler.decision import Decision
from sparsify_compiler.planned import Option

from .drawing import DENSE, INK, MARK, SPARSE, axes_of, label, largest, plane, styled, svg
from .model import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FAINTEST, STRONGEST = 0.06, 0.95  # opacity of the least and the greatest loss
MOST_OPTIONS = 24  # columns that the heat map has room for: those that were taken most often, in the order of their loss


@styled
def front(report: Report) -> str | None:
    """The Pareto front: for each cost of all sites the least loss that the choices allow, and the plan that was taken."""
    plan = report.plan
    if plan is None or len(plan.front) < 2:
        return None
    figure, axes = plane()
    axes.plot([point.cost for point in plan.front], [point.loss for point in plan.front], "o-", color=DENSE, markersize=3.5, linewidth=1.2)
    taken = [point for point in plan.front if point.taken]
    axes.scatter([point.cost for point in taken], [point.loss for point in taken], s=70, color=SPARSE, zorder=3, label="taken")
    if plan.limit is not None and plan.unit != "loss":
        left = "budget, less all else" if plan.rest else "budget"
        axes.axvline(plan.limit - plan.rest, color=MARK, linewidth=1, linestyle="--", label=left)
    if taken or plan.limit is not None:
        axes.legend(loc="upper right", frameon=False)
    axes.set_xlabel(f"predicted {plan.unit} of all sites")
    axes.set_ylabel(f"predicted loss{', ' + plan.loss_unit if plan.loss_unit else ''}")
    return svg(figure, "front")


@styled
def sensitivity(report: Report) -> str | None:
    """A cell for each site and choice: the darker, the more quality it costs, by orders of magnitude. The choice that was taken has a frame."""
    sites = largest([site for site in report.sites if any(option.loss is not None for option in site.options)])
    columns = _columns(sites)
    if not sites or len(columns) < 2:
        return None
    figure, axes = axes_of(len(sites), 0.2)
    figure.set_figwidth(max(figure.get_figwidth(), 2.6 + 0.24 * len(columns)))
    _cells(axes, sites, columns)
    label(axes, sites)
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.grid(False)
    return svg(figure, "sensitivity")


def _cells(axes: Axes, sites: Sequence[Decision], columns: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    strength = _strengths([option.loss for site in sites for option in site.options if option.name in columns])
    for row, site in enumerate(sites):
        for option in site.options:
            if option.name not in columns or option.loss is None:
                continue
            corner = columns.index(option.name) - 0.45, row - 0.42
            axes.add_patch(Rectangle(corner, 0.9, 0.84, facecolor=SPARSE, alpha=strength[option.loss], linewidth=0))
            if option.taken:
                axes.add_patch(Rectangle(corner, 0.9, 0.84, fill=False, edgecolor=INK, linewidth=1.4))


def _columns(sites: Sequence[Decision]) -> list[str]:
    """Names of options, from the one that costs least to the one that costs most; the most frequently taken where there are too many."""
    losses: dict[str, list[float]] = {}
    taken: dict[str, int] = {}
    for option in (option for site in sites for option in site.options):
        if option.loss is not None:
            losses.setdefault(option.name, []).append(option.loss)
            taken[option.name] = taken.get(option.name, 0) + option.taken
    kept = sorted(losses, key=lambda name: -taken[name])[:MOST_OPTIONS]
    return sorted(kept, key=lambda name: sum(losses[name]) / len(losses[name]))


def _strengths(losses: Sequence[float | None]) -> Mapping[float, float]:
    """Opacity of each loss, linear in its logarithm; a loss that is not above 0 is the faintest."""
    known = sorted({loss for loss in losses if loss is not None})
    logs = [math.log10(loss) for loss in known if loss > 0]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)

    def strength(loss: float) -> float:
        share = (math.log10(loss) - low) / (high - low) if loss > 0 and high > low else 0.0
        return FAINTEST + share * (STRONGEST - FAINTEST)

    return {loss: strength(loss) for loss in known}


def rows_of(site: Decision) -> list[Option]:
    """The options of a site as a table shows them: the one that was taken first, then by loss."""
    return sorted(site.options, key=lambda option: (not option.taken, math.inf if option.loss is None else option.loss))
