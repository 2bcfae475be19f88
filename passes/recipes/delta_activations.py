"""Delta Activation Layer."""

from __future__ import annotations

from sparsify_compiler.passes.activation.multiply_changes import MultiplyChanges
from sparsify_compiler.passes.train.penalise_activations import PenaliseActivations
from sparsify_compiler.pipeline import Pipeline


def delta_activations(step: float = 0.1, weight: float = 1e-3, targets: tuple[str, ...] = ("linear",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training on streams [batch, time, ...]: layers multiply only what changed since the time step before, and training makes that rarer.

    Values are rounded to multiples of `step`, and the mean magnitude of the changes, times `weight`, is a term of the loss. What did not change is
    skipped after training: `select_inputs(selector="nonzero")`. For linear layers; convolutions over frames are not covered.

    Paper      Training for temporal sparsity in deep neural networks, application in video processing, Yousefzadeh and Sifalakis, arXiv:2107.07305
    """
    return Pipeline((MultiplyChanges(step, targets, ignore), PenaliseActivations("l1", weight, of="inputs", targets=targets, ignore=ignore)))
