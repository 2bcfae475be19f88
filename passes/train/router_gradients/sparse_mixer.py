"""SparseMixer: experts are drawn by their probabilities, with a gradient for the draw (arXiv:2310.00811, its second version arXiv:2409.12136)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.passes.train.router_gradients._base import shifted


def sparse_mixer(scores: Tensor, chosen: Tensor, weights: Tensor | None, *, near: float = 0.0) -> tuple[Tensor, Tensor]:
    """As many experts as were chosen, drawn without replacement; the weight is the probability among those that were left.

    An expert that was not the most probable one counts a third of that in three of four rows, by Heun's third-order rule; the gradient is that of
    the whole. Weights of 1 stay 1. near: draw only among scores that lie that share of themselves below the highest at most; 0 for among all.
    """
    found, given, left = [], [], scores
    for _ in range(chosen.shape[-1]):
        open_ = _near(left, near)
        drawn = (open_ - torch.empty_like(open_).exponential_().log()).argmax(-1, keepdim=True)
        odds = open_.softmax(-1)
        first = drawn == odds.argmax(-1, keepdim=True)
        whole = odds.gather(-1, drawn)
        share = torch.where(first | (torch.rand_like(whole) > 0.75), 1.0, 1 / 3)
        found.append(drawn)
        given.append(shifted(None if weights is None else whole.detach() * share, whole))
        left = left.scatter(-1, drawn, -torch.inf)
    return torch.where(chosen < 0, -1, torch.cat(found, -1)), torch.cat(given, -1)


def _near(scores: Tensor, near: float) -> Tensor:
    with torch.no_grad():
        highest = scores.amax(-1, keepdim=True)
        far = (highest - scores) / torch.maximum(scores.abs(), highest) > near
    return scores.masked_fill(far, -torch.inf) if near > 0 else scores
