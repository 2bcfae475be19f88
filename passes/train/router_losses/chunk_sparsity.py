"""Chunk sparsity: few experts for all tokens of a chunk together, who then share their weights (BlockFFN, arXiv:2507.08771, section 3.2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def chunk_sparsity(scores: Tensor, chosen: Tensor, *, chunk: int = 8) -> Tensor:
    """The mean over experts and chunks of 1 - product over the chunk's tokens of (1 - p), p = relu(scores) over their sum: the odds to be needed.

    Tokens are the last dimension but one; what is left over at a text's end is a chunk, too.
    """
    open_ = scores.relu()
    odds = open_ / open_.sum(-1, keepdim=True).clamp_min(1e-6)
    spared = (1 - odds).clamp_min(1e-6).log()
    spared = pad(spared, (0, 0, 0, -scores.shape[-2] % chunk)).unflatten(-2, (-1, chunk))  # type: ignore[no-untyped-call]
    found: Tensor = (1 - spared.sum(-2).exp()).mean()
    return found
