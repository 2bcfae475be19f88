"""Plots of what was measured: latency of the whole, time and density of each site, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify_compiler.decision import Decision

from . import words
from .drawing import DENSE, INK, MARK, SPARSE, axes_of, label, largest, styled, svg
from .model import Form, Report

MOST_STEPS = 8  # names of layers that the waterfall shows one by one

@styled
def latency(report: Report) -> str | None:
    """The whole model's latency in every form that was measured."""
    compiled = [] if report.compiled is None else [report.compiled]
    forms = [form for form in [*report.dense, *compiled] if form.median is not None]
    if not forms:
        return None
    figure, axes = axes_of(len(forms), 0.34)
    for row, form in enumerate(forms):
        axes.barh(
            row, form.median or 0.0, height=0.62, color=SPARSE if form is report.compiled else DENSE, xerr=_quartiles(form), ecolor=INK, capsize=2
        )
        axes.annotate(words.ms(form.median), (max(form.median or 0.0, form.high or 0.0), row), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(forms)), [form.name for form in forms])
    axes.set_xlabel("milliseconds, median and quartiles")
    axes.margins(x=0.14)
    return svg(figure, "latency")


@styled
def times(report: Report) -> str | None:
    """Each site's time, dense and now."""
    sites = largest([site for site in report.sites if words.on_the_example(site) and site.dense_ms is not None and site.compiled_ms is not None])
    if not sites:
        return None
    figure, axes = axes_of(len(sites), 0.27)
    rows = range(len(sites))
    axes.barh([row - 0.2 for row in rows], [site.dense_ms or 0.0 for site in sites], height=0.36, color=DENSE, label="dense")
    axes.barh([row + 0.2 for row in rows], [site.compiled_ms or 0.0 for site in sites], height=0.36, color=SPARSE, label="now")
    label(axes, sites)
    axes.set_xlabel("milliseconds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return svg(figure, "times")


@styled
def densities(report: Report) -> str | None:
    """What each site kept of its weight; a mark where the budget asked for another density."""
    sites = largest([site for site in report.sites if site.structure != "dense" or words.pays(site)])
    if not sites:
        return None
    figure, axes = axes_of(len(sites), 0.2)
    rows = range(len(sites))
    axes.barh(rows, [100 * site.density for site in sites], height=0.62, color=[SPARSE if words.pays(site) else DENSE for site in sites])
    asked = [(100 * site.budget, row) for row, site in enumerate(sites) if abs(site.budget - site.density) > 0.005]
    if asked:
        axes.scatter([x for x, _ in asked], [y for _, y in asked], marker="|", s=60, color=MARK, label="asked for")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    label(axes, sites)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the weights kept")
    return svg(figure, "densities")


@styled
def waterfall(report: Report) -> str | None:
    """From the fastest dense form to the compiled model: what the layers of each name saved together, and what else changed."""
    best, compiled = report.fastest_dense, report.compiled
    if best is None or best.median is None or compiled is None or compiled.median is None:
        return None
    saved = _savings(report.sites)
    if not saved:
        return None
    rest = compiled.median - best.median + sum(saved.values())
    steps = [(best.name, 0.0, best.median, DENSE)]
    level = best.median
    for name, change in [*((name, -gain) for name, gain in saved.items()), ("everything else", rest)]:
        steps.append((name, level, change, SPARSE if change <= 0 else MARK))
        level += change
    steps.append((compiled.name, 0.0, compiled.median, SPARSE))
    figure, axes = axes_of(len(steps), 0.3)
    for row, (_, start, length, colour) in enumerate(steps):
        axes.barh(row, length, left=start, height=0.62, color=colour)
        axes.annotate(_change(length, start), (max(start, start + length), row), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(steps)), [name for name, *_ in steps])
    axes.set_xlabel("milliseconds")
    axes.margins(x=0.14)
    return svg(figure, "waterfall")


def _savings(sites: Sequence[Decision]) -> dict[str, float]:
    """Milliseconds that sites saved, by their name within the block ("intermediate.dense"), the greatest first; small ones together."""
    found: dict[str, float] = {}
    for site in sites:
        if words.on_the_example(site) and site.dense_ms is not None and site.compiled_ms is not None and site.compiled_ms < site.dense_ms:
            name = words.split_path(site.site)[1]
            found[name] = found.get(name, 0.0) + site.dense_ms - site.compiled_ms
    ordered = sorted(found.items(), key=lambda item: -item[1])
    others = sum(gain for _, gain in ordered[MOST_STEPS:])
    return dict(ordered[:MOST_STEPS]) | ({"other sites": others} if others else {})


def _change(length: float, start: float) -> str:
    return words.ms(length) if start == 0.0 else f"{'−' if length < 0 else '+'}{words.ms(abs(length))}"


def _quartiles(form: Form) -> list[list[float]] | None:
    if form.median is None or form.low is None or form.high is None:
        return None
    return [[max(0.0, form.median - form.low)], [max(0.0, form.high - form.median)]]
