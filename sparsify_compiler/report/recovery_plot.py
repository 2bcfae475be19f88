"""How a model was brought towards its teacher: the loss, step by step, and the quality where it was measured."""

from __future__ import annotations

from .drawing import DENSE, MARK, SPARSE, plane, styled, svg
from .model import Report


@styled
def recovery(report: Report) -> str | None:
    """The loss on a logarithmic axis, the user's metric beside it, and the step that was handed back."""
    found = report.recovery
    if found is None or len(found.points) < 2:
        return None
    figure, axes = plane()
    axes.plot([point.step for point in found.points], [point.loss for point in found.points], color=DENSE, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel(f"step; {found.stopped}" if found.stopped else "step")
    axes.set_ylabel(" + ".join(found.losses) or "loss")
    measured = [(point.step, point.quality) for point in found.points if point.quality is not None]
    if measured:
        beside = axes.twinx()
        beside.plot(*zip(*measured, strict=True), "o-", color=SPARSE, markersize=3.5, linewidth=1.2)
        beside.set_ylabel("quality")
        beside.grid(False)
    if found.best_step is not None:
        axes.axvline(found.best_step, color=MARK, linewidth=1, linestyle="--")
    return svg(figure, "recovery")
