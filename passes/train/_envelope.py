"""The proximal step of the group sparse envelope: the largest convex function below half the squares of what has at most k groups that are not 0."""

from __future__ import annotations

import torch
from torch import Tensor

HALVINGS = 50


def shrink_factors(norms: Tensor, kept: int, strength: float) -> Tensor:
    """What each group is multiplied with, in [0, 1 / (1 + strength)]: norms float64 [..., groups] >= 0, their Euclidean norms; kept >= 1 of the last.

    The envelope is the least of half the sum of |x_g|² / u_g over shares u_g in [0, 1] that add up to k. Minimising that times the strength, plus
    half of |x - v|², gives x_g = v_g u_g / (u_g + strength) with u_g = clip(a |v_g| - strength, 0, 1), where a is such that the shares add up to k.
    """
    if kept >= norms.shape[-1]:
        return torch.full_like(norms, 1 / (1 + strength))
    weakest = norms.topk(kept).values[..., -1:]  # of those that stay if all others go: k shares are above 0 at the least a, and 1 at the most
    enough = weakest.clamp_min(torch.finfo(norms.dtype).tiny)
    low, high = strength / enough, (1 + strength) / enough
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        less = (middle * norms - strength).clamp(0, 1).sum(-1, keepdim=True) < kept
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    shares = (high * norms - strength).clamp(0, 1)
    all_stay = (norms > 0).sum(-1, keepdim=True) <= kept
    return torch.where(all_stay, torch.full_like(norms, 1 / (1 + strength)), shares / (shares + strength))
