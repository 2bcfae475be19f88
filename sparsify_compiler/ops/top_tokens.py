"""top_tokens: the tokens of each text that a block runs on, as many in every text; take_part and put_part carry them there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ._linear import LIBRARY


def reference(scores: Tensor, share: float) -> Tensor:
    """scores float [B, T] -> int64 [B, n], the places of the n highest of each row, ascending: n is share * T, rounded up, one at least."""
    torch._check(scores.dim() == 2 and 0 < share <= 1,
                 lambda: f"top_tokens: scores and share are {tuple(scores.shape)} and {share}, needs [B, T] and above 0 up to 1")  # type: ignore[no-untyped-call]
    kept = max(round(share * PARTS), 1)
    count = (scores.shape[1] * kept + PARTS - 1) // PARTS  # in whole numbers: T may be a size without a number
    return scores.topk(count, 1).indices.sort(1).values


PARTS = 10000
LIBRARY.define("top_tokens(Tensor scores, float share) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("top_tokens", reference, "CompositeImplicitAutograd")
op = torch.ops.sparsify.top_tokens.default
