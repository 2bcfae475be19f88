"""Predicted: each score alone tells whether it was chosen, so that a choice among all rows may become one by a limit (γ-MoD, arXiv:2410.13859)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

STATISTICS = ("depths",)


def predicted(scores: Tensor, chosen: Tensor) -> Tensor:
    """Cross entropy of sigmoid(scores) with 1 for what was chosen and 0 for the rest. Of tokens that were routed around blocks, too."""
    none = torch.zeros(*scores.shape[:-1], scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    return binary_cross_entropy_with_logits(scores, none.scatter(-1, chosen + 1, 1.0)[..., 1:])
