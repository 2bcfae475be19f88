"""Straight through: a chosen expert's weight gets the gradient of a gate that opens where its score passes the limit (STE, arXiv:1308.3432)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.moe.weights._base import of_chosen
from sparsify_compiler.passes.train.router_gradients._base import shifted


def straight_through(scores: Tensor, chosen: Tensor, weights: Tensor | None, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """sigmoid((score - limit) / (temperature * deviation)): the limit lies between the lowest score that is chosen and the highest that is not.

    The deviation is that of the row's scores, so what a router gives may have any scale. Neither number has a gradient of its own.
    """
    with torch.no_grad():
        none = torch.zeros(*scores.shape[:-1], scores.shape[-1] + 1, dtype=torch.bool, device=scores.device)
        open_ = none.scatter_(-1, chosen.long() + 1, True)[..., 1:]
        lowest = scores.masked_fill(~open_, torch.inf).amin(-1, keepdim=True)
        highest = scores.masked_fill(open_, -torch.inf).amax(-1, keepdim=True)
        limit = torch.where(lowest.isinf(), highest, torch.where(highest.isinf(), lowest, (lowest + highest) / 2))
        width = temperature * (scores - scores.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    return chosen, shifted(weights, of_chosen(((scores - limit) / width).sigmoid(), chosen.long()))
