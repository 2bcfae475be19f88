"""top_pages: the blocks of keys that one block of query rows reads, by what is kept of the pages of each block; what a step of decoding asks for.

It is a scorer and a selector (passes/attention) in one: `pooled`, `gaussian` or `page_bounds`, and `top_k`. Their own files say it for any number of
query rows; this is the same for one block of them, where the keys themselves need not be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._linear import LIBRARY

NONE, SOME = 0, 1  # of a pattern and a block, as block_layout has it
KINDS = {"mean": ("sum",), "normal": ("sum", "squares"), "bounds": ("min", "max")}  # way -> what is kept of each page, as key_sums names it


@dataclass(frozen=True)
class Pages:
    """How a scorer scores a block by its pages.

    way    "mean": q · mean(k); "normal": and scale / 2 * q² · var(k); "bounds": the most that q · k can be
    page   keys of a page, a divisor of a block's
    """

    way: str
    page: int


@dataclass(frozen=True)
class Heads:
    """What each head reads.

    shares  float32 [H]: of the blocks with a key that counts, so many; the selector's, rounded up
    least   int32 [H]: as many blocks at least; -1 for heads that read the pattern alone
    kinds   int8 [1 or B, 1 or H, NK]: what of each block a pattern reads anyway: nothing, some, or all; those that are all count among the above
    tiles   int32 like kinds, or None: the tile of a block that is read in part
    """

    shares: Tensor
    least: Tensor
    kinds: Tensor
    tiles: Tensor | None


def reference(query: Tensor, key: Tensor, kept: tuple[Tensor, ...], key_mask: Tensor | None, own: Tensor | None, open_share: Tensor | None,
              heads: Heads, *, pages: Pages, block: int, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """The blocks to read, ascending.

    query [B, H, Q, D], the rows of one block, key [B, G, K, D], of one float dtype; G divides H
    kept        float32 [B, G, P, D] of each of KINDS[pages.way]: of the first P pages, which are whole; what is missing is found from the keys
    key_mask    bool [B, K] or None: keys that count
    own         bool [B, Q] or None: query rows that count
    open_share  float32 [NK] or None: log of the share of a block's places that lie at or below the diagonal
    Returns indices int32 [B, H, 1, NK], 0 behind the first counts int32 [B, H, 1], and tile_of like indices, -1 where a block is read whole, or None.
    A block without a key that counts has no score; one whose score is no number is read. Of equal scores the first blocks are taken.
    """
    scores = _scores(query, key, key_mask, own, open_share, pages, block, scale)
    visible = scores > -math.inf
    anyway = heads.kinds > SOME
    first = scores.masked_fill(anyway & visible, math.inf)
    wanted = ((visible.sum(-1) * heads.shares).sub(1e-6).ceil()).maximum(heads.least)[..., None]
    rank = first.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    chosen = visible & ((rank < wanted) | (first == math.inf)) & (heads.least >= 0)[:, None]
    read = chosen | (heads.kinds != NONE)
    order = (~read).to(torch.int8).argsort(dim=-1, stable=True)
    counts = read.sum(-1, dtype=torch.int32)
    behind = torch.arange(order.shape[-1], device=order.device) >= counts[..., None]
    tile_of = None
    if heads.tiles is not None:
        numbers = torch.where((heads.kinds == SOME) & ~chosen, heads.tiles, -1).expand_as(order)
        tile_of = numbers.gather(-1, order).masked_fill(behind, 0)[:, :, None].to(torch.int32)
    return order.masked_fill(behind, 0).to(torch.int32)[:, :, None], counts[..., None], tile_of


def _scores(query: Tensor, key: Tensor, key_mask: Tensor | None, own: Tensor | None, open_share: Tensor | None, pages: Pages, block: int,
            scale: float) -> Tensor:
    """float32 [B, H, NK], from every key: -inf where nothing counts, +inf where it is no number."""
    (batch, heads, rows, width), (_, groups, keys, _) = query.shape, key.shape
    counts = torch.ones(batch, keys, dtype=torch.bool) if key_mask is None else key_mask
    which = torch.ones(batch, rows, dtype=torch.bool) if own is None else own
    mean = query.float().masked_fill(~which[:, None, :, None], 0).sum(2) / which.sum(-1).clamp(min=1)[:, None, None] * scale
    mean = mean.view(batch, groups, heads // groups, 1, width)
    wide = -(-keys // block) * block
    padded = torch.nn.functional.pad(key.float(), (0, 0, 0, wide - keys)).view(batch, groups, 1, -1, pages.page, width)
    mask = torch.nn.functional.pad(counts, (0, wide - keys)).view(batch, 1, 1, -1, pages.page, 1)
    number = mask.sum((-2, -1))
    if pages.way == "bounds":
        low, high = padded.masked_fill(~mask, math.inf).amin(-2), padded.masked_fill(~mask, -math.inf).amax(-2)
        low, high = (side.masked_fill(number[..., None] == 0, 0) for side in (low, high))
        found = (mean.clamp(min=0) * high + mean.clamp(max=0) * low).sum(-1)
    else:
        padded = padded.masked_fill(~mask, 0)
        center = padded.sum(-2) / number[..., None].clamp(min=1)
        found = (mean * center).sum(-1)
        if pages.way == "normal":
            spread = (padded.square().sum(-2) / number[..., None].clamp(min=1) - center.square()).clamp(min=0)
            found = found + (mean.square() * spread).sum(-1) / 2
    found = (found + number.log()).view(batch, heads, -1, block // pages.page).logsumexp(-1)
    found = (found if open_share is None else found + open_share).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    return found.masked_fill((number.view(batch, 1, -1, block // pages.page) == 0).all(-1), -math.inf)


def computed(query: Tensor, key: Tensor, kept: tuple[Tensor, ...], key_mask: Tensor | None, own: Tensor | None, open_share: Tensor | None,
             heads: Heads, *, pages: Pages, block: int, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same by the kernel. Only where has_kernel() says so."""
    found: tuple[Tensor, Tensor, Tensor | None] = _kernels().run(query, key, kept, key_mask, own, open_share, heads, pages, block, scale)
    return found


def has_kernel(query: Tensor, key: Tensor) -> bool:
    """Is there a kernel for these tensors on this machine?"""
    return not _kernels().refusal(query, key)


@cache
def _kernels() -> Any:
    from sparsify_compiler.codegen import top_pages

    return top_pages


def _everywhere(query: Tensor, key: Tensor, kept: list[Tensor], key_mask: Tensor | None, own: Tensor | None, open_share: Tensor | None,
                shares: Tensor, least: Tensor, kinds: Tensor, tiles: Tensor | None, *, way: str, page: int, block: int,
                scale: float) -> tuple[Tensor, Tensor, Tensor]:
    run = computed if has_kernel(query, key) else reference
    indices, counts, tile_of = run(query, key, tuple(kept), key_mask, own, open_share, Heads(shares, least, kinds, tiles), pages=Pages(way, page),
                                   block=block, scale=scale)
    return indices, counts, indices.new_empty(0) if tile_of is None else tile_of


def _fake(query: Tensor, key: Tensor, kept: list[Tensor], key_mask: Tensor | None, own: Tensor | None, open_share: Tensor | None, shares: Tensor,
          least: Tensor, kinds: Tensor, tiles: Tensor | None, *, way: str, page: int, block: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    size = (*query.shape[:2], 1, -(-key.shape[2] // block))
    made = [query.new_empty(shape, dtype=torch.int32) for shape in (size, size[:3], (0,) if tiles is None else size)]
    return made[0], made[1], made[2]


LIBRARY.define("top_pages(Tensor query, Tensor key, Tensor[] kept, Tensor? key_mask, Tensor? own, Tensor? open_share, Tensor shares, Tensor least, "
               "Tensor kinds, Tensor? tiles, *, str way, int page, int block, float scale) -> (Tensor, Tensor, Tensor)",
               tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("top_pages", _everywhere, "CompositeExplicitAutograd")
torch.library.register_fake("sparsify::top_pages", _fake, lib=LIBRARY)
op = torch.ops.sparsify.top_pages.default
