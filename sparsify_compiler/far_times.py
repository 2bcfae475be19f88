"""Times of a whole model on a machine that is not here: those of its layers, as they were predicted or measured there, and a roofline of all else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .target import Target

if TYPE_CHECKING:
    from .estimates import Estimate
    from .program import Program

DENSE = "dense, predicted"  # name of the form that a model which is compiled for such a machine is compared with


def compiled_ms(estimate: Estimate, lowered: Program) -> float:
    """Milliseconds of the lowered model: those of the dense one, less what its layers save."""
    rows = [row for row in lowered.decisions.values() if row.dense_ms is not None and row.compiled_ms is not None and row.kind != "attention"]
    return max(estimate.ms - sum((row.dense_ms or 0.0) - (row.compiled_ms or 0.0) for row in rows), estimate.others.ms)


def says(target: Target, kernels: int) -> str:
    """What a report says of a model for a machine that is not here."""
    laid = f"{kernels} kernel{'' if kernels == 1 else 's'} laid out and built for {target.name}; on any other machine the model runs by reference"
    return f"no time was measured here, all are of {target.name}; {laid}"
