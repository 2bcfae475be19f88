"""How every plot of the report is drawn: inline SVG whose colours are the page's own, so that dark mode and print follow."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from sparsify_compiler.decision import Decision

from .model import Report

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
WIDTH, HEIGHT = 6.0, 3.3  # inches


def styled(draw: Callable[[Report], str | None]) -> Callable[[Report], str | None]:
    """Run a plot with our settings: texts take their colour when they are made."""

    @wraps(draw)
    def drawn(report: Report) -> str | None:
        from matplotlib import rc_context

        with rc_context(SETTINGS):  # type: ignore[arg-type]
            return draw(report)

    return drawn


def largest(sites: Sequence[Decision]) -> list[Decision]:
    """The sites that one plot has room for: those that took longest dense, in the order of the model."""
    slowest = sorted(range(len(sites)), key=lambda i: -(sites[i].dense_ms or 0.0))[:MOST_ROWS]
    return [sites[i] for i in sorted(slowest)]


def label(axes: Axes, sites: Sequence[Decision]) -> None:
    """Name the rows after the sites."""
    names = [site.site if len(site.site) <= 40 else f"…{site.site[-39:]}" for site in sites]
    axes.set_yticks(range(len(sites)), names)


def axes_of(rows: int, inches: float) -> tuple[Figure, Axes]:
    """A figure for that many rows of that height, the first one on top."""
    figure, axes = plane(0.9 + inches * rows)
    axes.invert_yaxis()
    axes.margins(y=0.3 / max(rows, 1))
    return figure, axes


def plane(inches: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure of that height for curves and points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, inches), layout="constrained")
    return figure, figure.add_subplot()


def svg(figure: Figure, name: str) -> str:
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
