"""open_texts: the texts of a batch that a block runs on, maybe none; take_part and put_part carry them there and back."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler import session

from ._linear import LIBRARY


def reference(open: Tensor) -> Tensor:
    """open [B], 0 for a text that is closed -> int64 [m], the places of the others. In a graph that is traced all of them: m depends on the data."""
    torch._check(open.dim() == 1, lambda: f"open_texts: open has shape {tuple(open.shape)}, needs [B]")  # type: ignore[no-untyped-call]
    if session.traced(open):
        return torch.arange(open.shape[0], device=open.device)
    return open.nonzero()[:, 0]


LIBRARY.define("open_texts(Tensor open) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("open_texts", reference, "CompositeImplicitAutograd")
op = torch.ops.sparsify.open_texts.default
