"""Plots as inline SVG whose colours are the page's own, so that dark mode and print follow."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from sparsify_compiler.decision import Decision

from . import words
from .model import Form, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that matplotlib draws with, and the CSS variables that they become.
INK, FAINT, DENSE, SPARSE, MARK = "#010101", "#020202", "#030303", "#040404", "#050505"
VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)", DENSE: "var(--dense)", SPARSE: "var(--sparse)", MARK: "var(--mark)"}
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": INK, "ytick.color": INK, "ytick.major.size": 0, "xtick.major.size": 0, "axes.spines.top": False, "axes.spines.right": False,
    "axes.spines.left": False, "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "x", "grid.color": FAINT, "grid.linewidth": 0.6,
}  # fmt: skip
MOST_ROWS = 60  # sites that one plot shows: the slowest ones, in the order of the model
WIDTH = 6.0  # inches


def _styled(draw: Callable[[Report], str | None]) -> Callable[[Report], str | None]:
    """Run a plot with our settings: texts take their colour when they are made."""

    @wraps(draw)
    def styled(report: Report) -> str | None:
        from matplotlib import rc_context

        with rc_context(SETTINGS):  # type: ignore[arg-type]
            return draw(report)

    return styled


@_styled
def latency(report: Report) -> str | None:
    """The whole model's latency in every form that was measured."""
    compiled = [] if report.compiled is None else [report.compiled]
    forms = [form for form in [*report.dense, *compiled] if form.median is not None]
    if not forms:
        return None
    figure, axes = _axes(len(forms), 0.34)
    for row, form in enumerate(forms):
        axes.barh(
            row, form.median or 0.0, height=0.62, color=SPARSE if form is report.compiled else DENSE, xerr=_quartiles(form), ecolor=INK, capsize=2
        )
        axes.annotate(words.ms(form.median), (max(form.median or 0.0, form.high or 0.0), row), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(forms)), [form.name for form in forms])
    axes.set_xlabel("milliseconds, median and quartiles")
    axes.margins(x=0.14)
    return _svg(figure, "latency")


@_styled
def times(report: Report) -> str | None:
    """Each site's time, dense and now."""
    sites = _largest([site for site in report.sites if site.dense_ms is not None and site.compiled_ms is not None])
    if not sites:
        return None
    figure, axes = _axes(len(sites), 0.27)
    rows = range(len(sites))
    axes.barh([row - 0.2 for row in rows], [site.dense_ms or 0.0 for site in sites], height=0.36, color=DENSE, label="dense")
    axes.barh([row + 0.2 for row in rows], [site.compiled_ms or 0.0 for site in sites], height=0.36, color=SPARSE, label="now")
    _label(axes, sites)
    axes.set_xlabel("milliseconds")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return _svg(figure, "times")


@_styled
def densities(report: Report) -> str | None:
    """What each site kept of its weight; a mark where the budget asked for another density."""
    sites = _largest([site for site in report.sites if site.structure != "dense" or words.pays(site)])
    if not sites:
        return None
    figure, axes = _axes(len(sites), 0.2)
    rows = range(len(sites))
    axes.barh(rows, [100 * site.density for site in sites], height=0.62, color=[SPARSE if words.pays(site) else DENSE for site in sites])
    asked = [(100 * site.budget, row) for row, site in enumerate(sites) if abs(site.budget - site.density) > 0.005]
    if asked:
        axes.scatter([x for x, _ in asked], [y for _, y in asked], marker="|", s=60, color=MARK, label="asked for")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    _label(axes, sites)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the weights kept")
    return _svg(figure, "densities")


def _largest(sites: Sequence[Decision]) -> list[Decision]:
    slowest = sorted(range(len(sites)), key=lambda i: -(sites[i].dense_ms or 0.0))[:MOST_ROWS]
    return [sites[i] for i in sorted(slowest)]


def _label(axes: Axes, sites: Sequence[Decision]) -> None:
    names = [site.site if len(site.site) <= 40 else f"…{site.site[-39:]}" for site in sites]
    axes.set_yticks(range(len(sites)), names)


def _quartiles(form: Form) -> list[list[float]] | None:
    if form.median is None or form.low is None or form.high is None:
        return None
    return [[max(0.0, form.median - form.low)], [max(0.0, form.high - form.median)]]


def _axes(rows: int, inches: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.9 + inches * rows), layout="constrained")
    axes = figure.add_subplot()
    axes.invert_yaxis()
    axes.margins(y=0.3 / max(rows, 1))
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element, the same for the same data."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
