"""attend_blocks: attention that reads, for each block of query rows, the listed blocks of keys only."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._linear import LIBRARY

_modes, _wrapped = torch._C._len_torch_dispatch_stack, torch._C._functorch.is_functorch_wrapped_tensor
CHUNK = 1 << 24  # scores that the reference holds at once
Extent = tuple[int, int, int, int]      # of a table of blocks: rows and keys of one, keys below which attention is dense, the same for few queries
EXTENT = 4


@dataclass(frozen=True)
class _Chunk:
    """Query rows start ... stop of a call: scores and probabilities' mask, in the dtype that sums are taken in."""

    start: int
    stop: int
    scores: Tensor  # [B, H, rows, K]; -inf where a key does not count
    allowed: Tensor  # bool, broadcasts to scores


def scale_of(query: Tensor, scale: float | None) -> float:
    """What scores are multiplied with: 1 / sqrt(D) unless given."""
    return 1 / math.sqrt(max(query.shape[-1], 1)) if scale is None else scale


def below_diagonal(queries: int, keys: int, device: torch.device, rows: tuple[int, int] | None = None) -> Tensor:
    """bool [rows, K]: the keys that each query row, or those from rows[0] to rows[1], sees where both end at the same place."""
    row = torch.arange(*(rows or (0, queries)), device=device)
    return torch.arange(keys, device=device) <= row[:, None] + (keys - queries)


def allowed_places(rows: tuple[int, int], keys: int, queries: int, indices: Tensor, counts: Tensor, tile_of: Tensor | None, tiles: Tensor | None,
                   key_mask: Tensor | None, *, block_q: int, block_k: int, causal: bool) -> Tensor:
    """bool [B', H', rows, K]: which keys count for the blocks of query rows `rows` (first and last block, exclusive). See reference."""
    first, last = rows
    listed, known = indices[:, :, first:last], counts[:, :, first:last, None]
    wide = -(-keys // block_k)
    place = torch.arange(listed.shape[-1], device=indices.device)
    # 0: not listed, 1: whole, 2 + t: tile t. One more column takes what lies beyond the counts.
    kind = torch.ones_like(listed) if tile_of is None else tile_of[:, :, first:last] + 2
    target = torch.where(place < known, listed, wide).long()
    kinds = indices.new_zeros((*listed.shape[:-1], wide + 1)).scatter_(-1, target, kind)[..., :wide]
    fixed = torch.tensor([False, True], device=indices.device)[:, None, None].expand(2, block_q, block_k)
    table = fixed if tiles is None else torch.cat((fixed, tiles))
    seen = table[kinds.long()].transpose(-3, -2).flatten(-2).flatten(-3, -2)  # [B', H', blocks, block_q, NK, block_k] on two axes
    start, stop = first * block_q, min(last * block_q, queries)
    seen = seen[..., :stop - start, :keys]
    if causal:
        seen = seen & below_diagonal(queries, keys, indices.device, (start, stop))
    return seen if key_mask is None else seen & key_mask[:, None, None]


def reference(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, tile_of: Tensor | None = None, tiles: Tensor | None = None,
              key_mask: Tensor | None = None, bias: Tensor | None = None, *, block_q: int, block_k: int, causal: bool = False,
              scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(scale * query key^T + bias) value over the keys that count, and the log of the sum that it divided by.

    query [B, H, Q, D], key [B, G, K, D], value [B, G, K, E], any float dtype; G divides H, head h reads group h // (H // G).
    indices int32 [B', H', NQ, C], counts int32 [B', H', NQ]: the blocks of `block_k` keys that the NQ = ceil(Q / block_q) blocks of `block_q`
             query rows read, ascending, each once: the first counts[...] of C. B' is 1 or B; H' is 1, G or H
    tile_of  int32 like indices, or None: -1 where every place of the two blocks counts, else the tile that says which do
    tiles    bool [T, block_q, block_k] or None
    key_mask bool [B, K] or None: keys that count at all (padding, on either side)
    bias     float [1 or B, 1 or H, Q, K] or None
    causal   query row i stands at key i + K - Q, and later keys do not count
    scale    1 / sqrt(D) unless given
    Returns out [B, H, Q, E] of query's dtype and lse [B, H, Q], float32 (float64 for float64). A row without a key gives 0 and -inf. Sums are
    taken in at least float32. NaN of a place that counts propagates, of any other place never.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=dtype)
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    places = (indices, counts, tile_of, tiles, key_mask)
    wide = _per_head(value, query).to(dtype)
    finite = bool(torch.isfinite(wide).all())
    for chunk in _chunks(query, key, places, bias, block_q, block_k, causal, scale):
        total = torch.logsumexp(chunk.scores, -1) if chunk.scores.shape[-1] else chunk.scores.new_full(chunk.scores.shape[:-1], -math.inf)
        shares = torch.exp(chunk.scores - torch.where(total == -math.inf, 0, total)[..., None])
        rows = slice(chunk.start, chunk.stop)
        if finite:
            out[..., rows, :] = shares @ wide
        else:  # a share of 0 would turn an infinity that does not count into a NaN
            out[..., rows, :] = torch.where(chunk.allowed[..., None], shares[..., None] * wide[..., None, :, :], 0).sum(-2)
        lse[..., rows] = total
    return _token_major(out.to(query.dtype)), lse


def _chunks(query: Tensor, key: Tensor, places: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], bias: Tensor | None,
            block_q: int, block_k: int, causal: bool, scale: float | None) -> Iterator[_Chunk]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    (batch, heads, queries, _), keys, factor = query.shape, key.shape[2], scale_of(query, scale)
    wide = _per_head(key, query).to(dtype).transpose(-1, -2)
    blocks = max(1, CHUNK // max(batch * heads * block_q * keys, 1))
    total = -(-queries // block_q)
    for first in range(0, total, blocks):
        last = min(first + blocks, total)
        start, stop = first * block_q, min(last * block_q, queries)
        seen = allowed_places((first, last), keys, queries, *places, block_q=block_q, block_k=block_k, causal=causal)
        if seen.shape[1] not in (1, heads):
            seen = seen.repeat_interleave(heads // seen.shape[1], 1)
        scores = query[..., start:stop, :].to(dtype) @ wide * factor
        if bias is not None:
            scores = scores + bias[..., start:stop, :].to(dtype)
        yield _Chunk(start, stop, scores.masked_fill(~seen, -math.inf), seen)


def _per_head(tensor: Tensor, query: Tensor) -> Tensor:
    return tensor if tensor.shape[1] == query.shape[1] else tensor.repeat_interleave(query.shape[1] // max(tensor.shape[1], 1), 1)


def _token_major(out: Tensor) -> Tensor:
    """The same [B, H, Q, E] with the heads of a token beside each other in memory, as the projection after it reads them."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def check(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, tile_of: Tensor | None = None, tiles: Tensor | None = None,
          key_mask: Tensor | None = None, bias: Tensor | None = None, *, block_q: int, block_k: int) -> None:
    """Raises RuntimeError, with all shapes, where they do not fit together. Values of the indices are the caller's promise."""
    fits = query.dim() == key.dim() == value.dim() == indices.dim() == 4 and counts.dim() == 3 and block_q >= 1 and block_k >= 1
    if fits:
        (batch, heads, queries, width), (_, groups, keys, _) = query.shape, key.shape
        fits = key.shape == (batch, groups, keys, width) and value.shape[:3] == key.shape[:3] and (heads % max(groups, 1) == 0)
        fits = fits and indices.shape[0] in (1, batch) and indices.shape[1] in (1, groups, heads) and counts.shape == indices.shape[:3]
        fits = fits and indices.shape[2] == -(-queries // block_q) and (tile_of is None or (tile_of.shape == indices.shape and tiles is not None))
        fits = fits and (tiles is None or tuple(tiles.shape[1:]) == (block_q, block_k)) and (key_mask is None or key_mask.shape == (batch, keys))
        fits = fits and (bias is None or (bias.shape[0] in (1, batch) and bias.shape[1] in (1, heads) and bias.shape[2:] == (queries, keys)))

    def message() -> str:
        given = {"query": query, "key": key, "value": value, "indices": indices, "counts": counts, "tile_of": tile_of, "tiles": tiles,
                 "key_mask": key_mask, "bias": bias}
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in given.items() if tensor is not None)
        return f"attend_blocks: with blocks of {block_q} × {block_k}, these do not fit together: {shapes}"

    torch._check(fits, message)  # type: ignore[no-untyped-call]


def computed(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, tile_of: Tensor | None = None, tiles: Tensor | None = None,
             key_mask: Tensor | None = None, bias: Tensor | None = None, *, block_q: int, block_k: int, causal: bool = False,
             scale: float | None = None) -> tuple[Tensor, Tensor]:
    """What the op does: by the kernel that can run the call, or as the reference says."""
    attend = _kernels()
    call = attend.Call(query, key, value, indices, counts, tile_of, tiles, key_mask, bias, block_q, block_k, causal, scale)
    form = attend.form_of(call)
    plan = attend.PLANS.get(form)
    if plan is None:
        check(query, key, value, indices, counts, tile_of, tiles, key_mask, bias, block_q=block_q, block_k=block_k)
        if attend.refusal(query, key, value):
            return reference(*call[:9], block_q=block_q, block_k=block_k, causal=causal, scale=scale)
        plan = attend.plan(call, form)
    found: tuple[Tensor, Tensor] = plan.run(call)
    return found


@cache
def _kernels() -> Any:
    from sparsify_compiler.codegen import attend

    return attend


def unwatched(*tensors: Tensor | None) -> bool:
    """Is nobody to see the op's call: no gradient, trace or mode? Then `computed` is the same, without a tenth of a millisecond of dispatching."""
    if torch.compiler.is_compiling() or _modes():
        return False
    grad = torch.is_grad_enabled()
    return all(tensor is None or (type(tensor) is Tensor and not _wrapped(tensor) and not (grad and tensor.requires_grad)) for tensor in tensors)


def _fake(query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, tile_of: Tensor | None = None, tiles: Tensor | None = None,
          key_mask: Tensor | None = None, bias: Tensor | None = None, *, block_q: int, block_k: int, causal: bool = False,
          scale: float | None = None) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    out = query.new_empty((batch, queries, heads, value.shape[-1])).transpose(1, 2)
    return out, query.new_empty((batch, heads, queries), dtype=torch.promote_types(query.dtype, torch.float32))


def _setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.options = keyword_only_inputs


def _backward(ctx: Any, for_out: Tensor, for_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and bias, by computing the shares again a chunk at a time; the choice of blocks has none.

    With P the shares and S the scores: dV = P^T dO, dS = P * (dO V^T - sum(dO * O) + dlse).
    """
    query, key, value, *places, bias, out, lse = ctx.saved_tensors
    dtype = lse.dtype
    for_query, for_key, for_value = query.new_zeros(query.shape, dtype=dtype), *(_per_head(t, query).new_zeros(
        (*query.shape[:2], *t.shape[2:]), dtype=dtype) for t in (key, value))
    for_bias = None if bias is None or not ctx.needs_input_grad[8] else bias.new_zeros(bias.shape, dtype=dtype)
    keys, values = _per_head(key, query).to(dtype), _per_head(value, query).to(dtype)
    balance = (for_out * out).to(dtype).sum(-1) - for_lse
    scale = scale_of(query, ctx.options["scale"])
    for chunk in _chunks(query, key, tuple(places), bias, **ctx.options):
        rows = slice(chunk.start, chunk.stop)
        top, grad = lse[..., rows, None], for_out[..., rows, :].to(dtype)
        shares = torch.exp(chunk.scores - torch.where(top == -math.inf, 0, top))
        for_value += shares.transpose(-1, -2) @ grad
        of_scores = torch.where(chunk.allowed, shares * (grad @ values.transpose(-1, -2) - balance[..., rows, None]), 0)
        for_query[..., rows, :] = of_scores @ keys * scale
        for_key += of_scores.transpose(-1, -2) @ query[..., rows, :].to(dtype) * scale
        if for_bias is not None:
            for_bias[..., rows, :] = of_scores.sum_to_size(*bias.shape[:2], *of_scores.shape[2:])
    for_key, for_value = (_per_group(full, like) for full, like in ((for_key, key), (for_value, value)))
    return (for_query.to(query.dtype), for_key, for_value, None, None, None, None, None, None if for_bias is None else for_bias.to(bias.dtype))


def _per_group(full: Tensor, like: Tensor) -> Tensor:
    """The sum over the heads of each group, in the dtype of the tensor that it is the gradient of."""
    batch, heads, *rest = full.shape
    groups = max(like.shape[1], 1)
    return full.view(batch, groups, heads // groups, *rest).sum(2).to(like.dtype)


LIBRARY.define("attend_blocks(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor counts, Tensor? tile_of=None, Tensor? tiles=None, "
               "Tensor? key_mask=None, Tensor? bias=None, *, int block_q, int block_k, bool causal=False, float? scale=None) -> (Tensor, Tensor)",
               tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("attend_blocks", computed, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::attend_blocks", _fake, lib=LIBRARY)
torch.library.register_autograd("sparsify::attend_blocks", _backward, setup_context=_setup, lib=LIBRARY)
op = torch.ops.sparsify.attend_blocks.default
