"""Relative importance and activations (RIA: Plug-and-Play, Zhang et al., ICLR 2024, openreview Tr0lPx9woF, equation 3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.passes.prune.scores._base import along_inputs, share

STATISTICS: tuple[str, ...] = ("input_norm",)


def relative_importance(weight: Tensor, statistics: Mapping[str, Tensor], seed: int, *, power: float = 0.5) -> Tensor:
    """(|W[n, k]| / sum of |W[:, k]| + |W[n, k]| / sum of |W[n, :]|) * ||x[k]||^power, of the weight's shape; input_norm is [in].

    A weight's share of all that its input feeds, and of all that its output reads, so that no channel is cut off altogether.
    """
    return (share(weight, 0) + share(weight, 1)) * along_inputs(statistics["input_norm"] ** power, weight)
