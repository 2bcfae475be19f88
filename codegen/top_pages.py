"""top_pages on this machine: the kernel that finds the blocks of a step of decoding, called by the op (engine's ops/top_pages.py)."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.attend import FAR
from sparsify_compiler.codegen.kernels.top_pages import TopPages
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.errors import TargetError
from sparsify_compiler.ops.top_pages import KINDS, Heads, Pages
from sparsify_compiler.target import host

DTYPES = (torch.float32, torch.bfloat16)
NO_MASK = torch.zeros(1, 1, dtype=torch.uint8)
NO_SHARE = torch.zeros(1, dtype=torch.float32)
NO_TILES = torch.zeros(1, 1, 1, dtype=torch.int32)


def refusal(query: Tensor, key: Tensor) -> str:
    """Why no kernel runs such a call; "" where one does."""
    if not query.is_cpu or query.dtype not in DTYPES or key.dtype is not query.dtype:
        return f"no kernel for {query.dtype} and {key.dtype} on {query.device}"
    if not min(*query.shape, *key.shape):
        return "nothing to compute"
    lanes = _lanes()
    if not lanes or query.shape[-1] % lanes:
        return f"a width of {query.shape[-1]} fills no vectors of this machine"
    if max(*query.stride(), *key.stride()) >= FAR or query.stride(-1) != 1 or key.stride(-1) != 1:
        return "queries and keys lie apart"
    return ""


@cache
def _lanes() -> int:
    """Of a vector of this machine; 0 where it is none that kernels are made for."""
    try:
        return vectors_of(host()).lanes
    except TargetError:
        return 0


def run(query: Tensor, key: Tensor, kept: tuple[Tensor, ...], key_mask: Tensor | None, own: Tensor | None, open_share: Tensor | None, heads: Heads,
        pages: Pages, block: int, scale: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the op's reference."""
    batch, total = query.shape[:2]
    blocks = -(-key.shape[2] // block)
    indices = torch.empty(batch, total, 1, blocks, dtype=torch.int32)
    counts = torch.empty(batch, total, 1, dtype=torch.int32)
    tile_of = None if heads.tiles is None else torch.empty(batch, total, 1, blocks, dtype=torch.int32)
    flags = (key_mask is not None) + 2 * (own is not None) + 4 * (open_share is not None) + 8 * (tile_of is not None)
    masks = [NO_MASK if mask is None else mask.contiguous().view(torch.uint8) for mask in (key_mask, own)]
    kernel = _kernel(query.dtype, pages.way, total > key.shape[1])
    kernel(query, key, kept[0], kept[-1], *masks, NO_SHARE if open_share is None else open_share, heads.kinds, NO_TILES if heads.tiles is None else
           heads.tiles, heads.shares, heads.least, _logs(pages.page), indices.view(batch, total, blocks), counts.view(batch, total),
           NO_TILES.expand(batch, total, 1).contiguous() if tile_of is None else tile_of.view(batch, total, blocks), pages.page, block // pages.page,
           flags, scale)
    return indices, counts, tile_of


@lru_cache(16)
def _logs(page: int) -> Tensor:
    return torch.arange(page + 1, dtype=torch.float32).log()


@cache
def _kernel(dtype: torch.dtype, way: str, many: bool) -> Any:
    assert way in KINDS
    return build.load(TopPages(str(dtype).removeprefix("torch."), way, 4 if many else 1, vectors_of(host())), host()).function
