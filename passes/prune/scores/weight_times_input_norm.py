"""Weight times input norm (Wanda, arXiv:2306.11695, equation 1)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.passes.prune.scores._base import along_inputs

STATISTICS: tuple[str, ...] = ("input_norm",)


def weight_times_input_norm(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """|W[n, k]| * ||x[k]||, float32, of the weight's shape [out, in / groups, ...]; input_norm is [in]."""
    return weight.detach().abs().float() * along_inputs(statistics["input_norm"], weight)
