"""First-order Taylor importance (Molchanov et al., arXiv:1906.10771, equation 8)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsify_compiler.passes.prune.scores._base import magnitudes

STATISTICS: tuple[str, ...] = ("gradient_square",)


def taylor(weight: Tensor, statistics: Mapping[str, Tensor], seed: int) -> Tensor:
    """(g * W)^2 summed over the batches, of the weight's shape: the squared change of the loss when a weight goes, to first order.

    Unlike the gradient of all batches together it does not vanish at the end of training.
    """
    return magnitudes(weight).square() * statistics["gradient_square"].to(weight.device)
