"""attend: scaled_dot_product_attention that reads the blocks of keys which an indexer chooses; what a captured graph holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

from sparsify_compiler.block_layout import every_key
from sparsify_compiler.branches import Branches, parse
from sparsify_compiler.errors import InputError
from sparsify_compiler.indexer import Indexer

from . import attend_blocks
from ._linear import LIBRARY
from .attend_blocks import below_diagonal, scale_of

Learned = Sequence[Tensor] | None

def reference(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, learned: Learned = None, *, is_causal: bool = False,
              scale: float | None = None, indexer: str) -> Tensor:
    """Attention over the blocks that the indexer finds, and of those over what the mask lets through.

    query [B, H, Q, D], key [B, G, K, D], value [B, G, K, E] of one float dtype, G divides H; attn_mask broadcasts to [B, H, Q, K], bool (True
    counts) or added to the scores; is_causal aligns the ends: query row i stands at key i + K - Q; scale 1 / sqrt(D) unless given; indexer: text
    of an Indexer or of Branches; learned: the tensors that its `learned` names. Returns [B, H, Q, E] of query's dtype. Where the indexer says so it
    is dense attention.
    """
    return by_indexer(parse(indexer), query, key, value, attn_mask, learned, is_causal=is_causal, scale=scale)


def by_indexer(indexer: Indexer | Branches, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, learned: Learned = None,
               *, is_causal: bool = False, scale: float | None = None) -> Tensor:
    """The same for an Indexer in hand. Patterns begin at the first key that counts, so that padding on the left changes nothing."""
    if indexer.is_dense(query.shape[2], key.shape[2]):
        return dense(query, key, value, attn_mask, is_causal=is_causal, scale=scale, kernel_from=indexer.dense_kernel_from)
    factor = scale_of(query, scale)
    key_mask, bias, triangle = split_mask(attn_mask, query, key)
    if len(learned or ()) != len(indexer.learned):
        raise InputError(f"{len(learned or ())} learned tensors for {indexer}", where="attend",
                         hint=f"it needs {', '.join(indexer.learned) or 'none'}")
    weights = dict(zip(indexer.learned, learned or (), strict=True))
    return indexer.branch(query, key, value, key_mask, bias, is_causal or triangle, factor, weights)[0]


def dense(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *, is_causal: bool = False,
          scale: float | None = None, kernel_from: int | None = None) -> Tensor:
    """The same over all keys: by torch, or by the kernel of attend_blocks where there are at least `kernel_from` rows and keys.

    One row of each head: those of a group as rows of one head, so that their keys are read once for all of them.
    """
    if kernel_from is not None and min(query.shape[2], key.shape[2]) >= max(kernel_from, 1):
        found = _by_kernel(query, key, value, attn_mask, is_causal, scale)
        if found is not None:
            return found
    (_, heads, queries, _), (_, groups, keys, _) = query.shape, key.shape
    if is_causal and (attn_mask is not None or (queries != keys and queries != 1)):
        below = below_diagonal(queries, keys, query.device)
        attn_mask = below if attn_mask is None else attn_mask & below if attn_mask.dtype is torch.bool else attn_mask.masked_fill(~below, -math.inf)
    alone = is_causal and attn_mask is None and queries != 1
    if attn_mask is not None and attn_mask.dtype is not torch.bool:
        attn_mask = attn_mask.to(query.dtype)
    if queries == 1 and 0 < groups < heads:
        mask = attn_mask if attn_mask is None or attn_mask.dim() < 3 or attn_mask.shape[-3] == 1 else _packed(attn_mask, groups)
        return scaled_dot_product_attention(_packed(query, groups), key, value, mask, scale=scale).reshape(*query.shape[:3], value.shape[-1])
    return scaled_dot_product_attention(query, key, value, attn_mask, is_causal=alone, scale=scale, enable_gqa=heads != groups)


def has_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Is there a kernel of attend_blocks for these tensors on this machine?"""
    from sparsify_compiler.codegen import attend

    return not attend.refusal(query, key, value)


def _by_kernel(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor | None:
    """Attention over all keys by the kernel; None where there is none, where somebody watches, and where the mask is not one of keys."""
    if not attend_blocks.unwatched(query, key, value) or not has_kernel(query, key, value):
        return None
    found = mask_of_keys(attn_mask, query, key)
    if found is None:
        return None
    layout = every_key(query.shape[2], key.shape[2], is_causal or found[1])
    return layout.attend(query, key, value, found[0], None, scale)[0]


def _packed(rows: Tensor, groups: int) -> Tensor:
    """[..., H, 1, D] as [..., G, H // G, D]: the heads of a group as rows of one."""
    return rows.reshape(*rows.shape[:-3], groups, rows.shape[-3] // groups, rows.shape[-1])


def split_mask(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, Tensor | None, bool]:
    """A mask as (key_mask [B, K], bias [1 or B, 1 or H, Q, K], whether it is causal), each None where it says nothing.

    A bool mask that is the same for all heads is a key_mask where it is the same for all queries, or but for what comes after the diagonal.
    """
    found = mask_of_keys(attn_mask, query, key)
    if found is not None or attn_mask is None:
        return (None, None, False) if found is None else (found[0], None, found[1])
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -math.inf)
    return None, mask.expand(mask.shape[0], mask.shape[1], query.shape[2], key.shape[2]), False


def mask_of_keys(attn_mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Tensor | None, bool] | None:
    """A mask as (key_mask [B, K] or None, whether it is causal); None where it says more than that."""
    if attn_mask is None:
        return None, False
    batch, keys = query.shape[0], key.shape[2]
    mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if mask.dtype is torch.bool and mask.numel() and (mask.shape[1] == 1 or mask.stride(1) == 0):
        if mask.shape[2] == 1 or mask.stride(2) == 0:
            return mask[:, 0, 0].expand(batch, keys), False
        if mask.shape[2:] == (query.shape[2], keys) and _is_triangle(attn_mask, mask[:, 0]):
            return mask[:, 0, -1].expand(batch, keys), True
    return None


_TRIANGLES: Any = WeakIdKeyDictionary()  # masks that were looked at -> (their version, the answer): all layers of a model share one


def _is_triangle(given: Tensor, mask: Tensor) -> bool:
    """Whether a mask [B, Q, K] is its last row above a diagonal that ends in the last key; looked at once, as long as `given` is not written to."""
    version = 0 if given.is_inference() else given._version
    known: tuple[int, bool] | None = _TRIANGLES.get(given)
    if known is None or known[0] != version:
        known = (version, torch.equal(mask, mask[:, -1:] & below_diagonal(mask.shape[1], mask.shape[2], mask.device)))
        _TRIANGLES[given] = known
    return known[1]


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    fits = query.dim() == key.dim() == value.dim() == 4 and query.shape[-1] == key.shape[-1] and key.shape[:3] == value.shape[:3]
    fits = fits and query.shape[0] == key.shape[0] and query.shape[1] % max(key.shape[1], 1) == 0
    shapes = [tuple(t.shape) for t in (query, key, value)]
    torch._check(fits, lambda: f"attend: query, key, value have shapes {shapes}, needs [B, H, Q, D], [B, G, K, D], [B, G, K, E]")  # type: ignore[no-untyped-call]


def _everywhere(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, learned: Learned = None, *,
                is_causal: bool = False, scale: float | None = None, indexer: str) -> Tensor:
    _check(query, key, value)
    out = reference(query, key, value, attn_mask, learned, is_causal=is_causal, scale=scale, indexer=indexer)
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # as attend_blocks lays it out, whichever form ran


def _fake(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, learned: Learned = None, *, is_causal: bool = False,
          scale: float | None = None, indexer: str) -> Tensor:
    _check(query, key, value)
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    *given, learned = inputs
    ctx.save_for_backward(*given, *(learned or ()))
    ctx.options = keyword_only_inputs


def _gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, learned: Learned = None, *,
               is_causal: bool = False, scale: float | None = None, indexer: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of query, key, value, an additive mask (empty where there is none) and what is learned, through what was read: the choice has none.

    All is computed again, so that nothing of the forward is kept.
    """
    added = attn_mask is not None and attn_mask.is_floating_point()
    given = [t.detach().requires_grad_() for t in ((query, key, value, attn_mask) if added else (query, key, value))]  # type: ignore[union-attr]
    weights = [t.detach().requires_grad_(t.is_floating_point()) for t in learned or ()]
    with torch.enable_grad():
        out = reference(given[0], given[1], given[2], given[3] if added else attn_mask, weights, is_causal=is_causal, scale=scale, indexer=indexer)
    found = torch.autograd.grad(out, [*given, *(t for t in weights if t.requires_grad)], grad, allow_unused=True, materialize_grads=True)
    of_weights = iter(found[len(given):])
    of_mask = found[3] if added else query.new_empty(0)
    return found[0], found[1], found[2], of_mask, [next(of_weights) if t.requires_grad else torch.zeros_like(t) for t in weights]


def _fake_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, learned: Learned = None, *,
                    is_causal: bool = False, scale: float | None = None, indexer: str) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    added = attn_mask is not None and attn_mask.is_floating_point()
    of_mask = torch.empty_like(attn_mask) if added else query.new_empty(0)  # type: ignore[arg-type]
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_mask, [torch.empty_like(t) for t in learned or ()]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, mask, *learned = ctx.saved_tensors
    *found, of_mask, of_learned = torch.ops.sparsify.attend_gradients(grad, query, key, value, mask, learned, **ctx.options)
    given = len(ctx.needs_input_grad)  # the dispatcher drops what is None at the end
    return (*found, of_mask if of_mask.numel() else None, of_learned or None)[:given]


LIBRARY.define("attend(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, Tensor[]? learned=None, *, bool is_causal=False, "
               "float? scale=None, str indexer) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define("attend_gradients(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, Tensor[]? learned=None, *, "
               "bool is_causal=False, float? scale=None, str indexer) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
               tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attend_gradients", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::attend_gradients", _fake_gradients, lib=LIBRARY)
LIBRARY.impl("attend", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::attend", _fake, lib=LIBRARY)
torch.library.register_autograd("sparsify::attend", _backward, setup_context=_setup, lib=LIBRARY)
op = torch.ops.sparsify.attend.default
