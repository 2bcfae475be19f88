"""Sensitive inputs: select by what the loss feels of an input."""

from __future__ import annotations

from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline


def sensitive_inputs(density: float | None = None, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """Skip the inputs that the loss hardly feels, by the gradients of calibration, and share the density out over layers by the same measure.

    Paper      none: our own choice of scorer and budget in TEAL's frame (arXiv:2408.14690)
    """
    return Pipeline((SelectInputs("gradient", "threshold", "sensitivity(weighted=True)", density, targets=targets, ignore=ignore),))
