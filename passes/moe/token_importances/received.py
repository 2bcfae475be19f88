"""Received: the attention that a token gets from all tokens of its text (LeMo, arXiv:2501.09767)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from sparsify_compiler.normal_form_edit import argument, aten, is_call, same_size, shape
from sparsify_compiler.ops.attend_blocks import scale_of
from sparsify_compiler.passes.moe._depth import Depth
from sparsify_compiler.passes.moe.token_importances._base import Asked
from sparsify_compiler.program import Region

LOWEST = -1e4  # of a mask of numbers: what is below is not seen


def received(region: Region, block: Depth) -> Asked | str:
    """The weights that a token has as a key, over all heads and queries; each over how many queries see it, so that early tokens of a causal text
    are not ahead."""
    found = [node for node in block.part.inside if is_call(node, aten.scaled_dot_product_attention.default)]
    if len(found) != 1:
        return f"it has {len(found)} attentions, and needs one to tell what its tokens receive"
    node = region.node(found[0].name)
    sizes, keys = block.part.start.meta["val"].shape, shape(argument(node, "key"))
    if keys is None or len(keys) != 4 or not same_size(keys[0], sizes[0]) or not same_size(keys[2], sizes[1]):
        return "the keys of its attention are not [texts, heads, tokens, width] of its own tokens"
    given = {name: value for name in ("query", "key", "attn_mask") if isinstance(value := argument(node, name), fx.Node)}
    return partial(weights, causal=bool(argument(node, "is_causal")), scale=argument(node, "scale")), given


def weights(query: Tensor, key: Tensor, attn_mask: Tensor | None = None, *, causal: bool, scale: float | None) -> Tensor:
    """query [B, H, Q, D], key [B, G, K, D] -> float32 [B, K, 1], K of a text's own tokens."""
    scores = query.float() @ key.float().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale_of(query, scale)
    seen = torch.ones_like(scores, dtype=torch.bool)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        scores, seen = scores + attn_mask.float(), seen & (attn_mask > LOWEST)
    if causal:
        seen = seen.tril()
    maps = scores.masked_fill(~seen, -1e9).softmax(-1) * seen
    return (maps.sum((1, 2)) / seen.sum((1, 2)).clamp_min(1))[..., None]
