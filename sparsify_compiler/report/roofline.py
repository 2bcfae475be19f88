"""The roofline: how far each site is from what the machine can compute and move, dense and now (Williams et al., Roofline, CACM 2009)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsify_compiler.decision import Decision
from sparsify_compiler.site_cost import intensity

from .drawing import DENSE, INK, SPARSE, plane, styled, svg
from .model import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Place = tuple[float, float]  # operations a byte, and billions of operations a second


@styled
def roofline(report: Report) -> str | None:
    """Every site before and after, a line between the two; the machine's roofs where they are known."""
    before = [place for site in report.sites if (place := _place(site.flops_before, site.moved_before, site.dense_ms))]
    if not before:
        return None
    figure, axes = plane(4.0)
    _logarithmic(axes)
    for site in report.sites:
        _draw(axes, site)
    _roofs(axes, report)
    axes.scatter([], [], s=18, color=DENSE, label="dense")
    axes.scatter([], [], s=18, color=SPARSE, label="now, sparse")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    axes.set_xlabel("operations for each byte that moves" + ("; roofs as the machine was measured once" if report.machine else ""))
    axes.set_ylabel("billions of operations a second")
    return svg(figure, "roofline")


def _logarithmic(axes: Axes) -> None:
    """Both axes, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", axis="both")


def _draw(axes: Axes, site: Decision) -> None:
    dense, now = _place(site.flops_before, site.moved_before, site.dense_ms), _place(site.flops, site.moved, site.compiled_ms)
    if dense is None:
        return
    if now is not None and site.format != "dense":
        axes.plot(*zip(dense, now, strict=True), color=SPARSE, linewidth=0.7, alpha=0.5)
        axes.scatter(*now, s=18, color=SPARSE, zorder=3, linewidths=0)
    axes.scatter(*dense, s=18, color=DENSE, zorder=2, linewidths=0)


def _place(flops: float | None, moved: float | None, ms: float | None) -> Place | None:
    x = intensity(flops, moved)
    return (x, flops / ms / 1e6) if x and flops and ms else None


def _roofs(axes: Axes, report: Report) -> None:
    """What memory and the arithmetic units allow at each intensity."""
    low, high = axes.get_xlim()
    for name, peak, bandwidth in roofs_of(report.machine, _dtype(report)):
        xs = [low, min(max(peak / bandwidth, low), high), high]
        ys = [min(x * bandwidth, peak) / 1e9 for x in xs]
        axes.plot(xs, ys, color=INK, linewidth=1, alpha=0.7)
        axes.annotate(name, (xs[0], ys[0]), (3, 3), textcoords="offset points", fontsize=7)
    axes.set_xlim(low, high)


def _dtype(report: Report) -> str:
    """The dtype of most sites."""
    names = [site.dtype for site in report.sites if site.dtype]
    return max(set(names), key=names.count, default="")


def roofs_of(machine: Mapping[str, Any] | None, dtype: str) -> list[tuple[str, float, float]]:
    """(name, operations a second, bytes a second) of the roofs that a machine's data (Machine.to_json) gives for a dtype, all cores together.

    What arithmetic allows is one roof, met from two sides: from memory, and from the fastest cache.
    """
    if machine is None or not machine.get("memory"):
        return []
    numbers, levels = machine["numbers"], machine["memory"]
    unit = "matrix" if dtype == "bfloat16" and "matrix" in numbers else "vector"
    peak = machine["cores"] * numbers[unit]["value"]
    return [("memory", peak, levels[-1]["all"]), ("first cache", peak, max(level["all"] for level in levels))]
