"""Top-p: the fewest pairs of blocks of a row that hold a share of its mass, so that flat rows read more (Twilight, arXiv:2502.02770, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def top_p(scores: Tensor, read: Tensor, *, mass: float = 0.9, blocks: int = 1, rest: bool = False) -> Tensor:
    """The pairs to read. What must be read has no mass, as nobody knows it.

    mass     of a row's softmax over its scores
    blocks   as many at least
    rest     the softmax leaves out what is read anyway: the first tokens and the near ones would hide what else a head looks for
    """
    visible, must = scores > -torch.inf, scores == torch.inf
    shares = torch.softmax(scores.masked_fill(must | (read if rest else must), -torch.inf), -1).nan_to_num(0)
    order = (shares + 2.0 * (read & visible) + 4.0 * must).argsort(dim=-1, descending=True, stable=True)
    sorted_shares = shares.gather(-1, order)
    before = sorted_shares.cumsum(-1) - sorted_shares
    taken = (before < mass - 1e-6) | (torch.arange(scores.shape[-1], device=scores.device) < blocks)
    return visible & (torch.zeros_like(taken).scatter_(-1, order, taken) | must)
