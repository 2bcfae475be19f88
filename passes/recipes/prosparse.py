"""ProSparse."""

from __future__ import annotations

from sparsify_compiler.passes.activation.replace_activation import ReplaceActivation
from sparsify_compiler.passes.train.penalise_activations import PenaliseActivations
from sparsify_compiler.passes.train.schedule_threshold import ScheduleThreshold
from sparsify_compiler.pipeline import Pipeline


def prosparse(weight: float = 0.05, threshold: float = 0.01, ends: tuple[int, ...] = (100, 400, 1000), levels: tuple[float, ...] = (0.1, 0.4, 1.0),
              targets: tuple[str, ...] = ("ffn",), ignore: tuple[str, ...] = ()) -> Pipeline:
    """For training: ReLU, then an L1 term that grows along sine stages, and, when they end, a threshold below which activations are zero.

    Paper      ProSparse: Introducing and Enhancing Intrinsic Activation Sparsity within Large Language Models, Song et al., arXiv:2402.13516
    """
    sites = {"targets": targets, "ignore": ignore}
    grown = PenaliseActivations("l1", weight, f"sine_stages(ends={ends!r}, levels={levels!r})", "hidden", **sites)
    shifted = ScheduleThreshold(threshold, f"after(start={ends[-1]})", **sites)
    return Pipeline((ReplaceActivation("fatrelu(threshold=0.0)", **sites), grown, shifted))
