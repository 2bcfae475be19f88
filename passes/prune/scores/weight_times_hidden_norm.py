"""Weight times the norm of the hidden channel that it helps to make (DaSS, arXiv:2405.01943, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.passes.prune.scores._base import along_inputs, along_outputs, magnitudes

STATISTICS: tuple[str, ...] = ("input_norm", "hidden_norm")


def weight_times_hidden_norm(weight: Tensor, statistics: Mapping[str, Tensor], seed: int, *, power: float = 0.5) -> Tensor:
    """|W[n, k]| * ||h[n]||^power for the up and gate projections of an FFN, h being the input of its down projection; else |W[n, k]| * ||x[k]||.

    For up and gate the factor is one number a row: compare within columns, Unstructured("column") or NM(n, m, along="outputs").
    """
    hidden = statistics["hidden_norm"]
    if hidden.numel() == 0:
        return magnitudes(weight) * along_inputs(statistics["input_norm"], weight)
    return magnitudes(weight) * along_outputs(hidden**power, weight)
