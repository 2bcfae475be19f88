"""Tokens of an image or a video by windows: the regions of BiFormer (arXiv:2303.08810), the 1D, 2D and 3D blocks of VMoBA (arXiv:2506.23858)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_order import Order
from sparsify_compiler.errors import StructureError


def cuboids(query: Tensor, key: Tensor, key_mask: Tensor | None, grid: Grid, scale: float, *, shape: tuple[int, ...] = (8, 8),
            size: tuple[int, ...] = (4, 4)) -> Order:
    """The tokens of one window after those of another. Tokens before the image ([CLS], registers) come behind all of them.

    shape   tokens of the image, such as (height, width), or of the video, (frames, height, width)
    size    tokens of a window along each; a block, or several
    """
    before = grid.keys - math.prod(shape)
    fits = len(shape) == len(size) > 0 and min(*shape, *size) > 0 and not any(s % w for s, w in zip(shape, size, strict=True))
    if not fits or before < 0 or math.prod(size) % grid.block_k or math.prod(size) % grid.block_q:
        raise StructureError(f"windows of {size} in {shape}, with blocks of {grid.block_q} × {grid.block_k}, for {grid.keys} tokens", where="cuboids",
                             hint="windows divide the image, blocks divide windows, and the image has as many tokens as the attention, or fewer")
    order = _order(shape, size, before).to(key.device)
    return Order(order if grid.queries == grid.keys else None, order)


@lru_cache(64)
def _order(shape: tuple[int, ...], size: tuple[int, ...], before: int) -> Tensor:
    places = torch.arange(math.prod(shape)).view([part for s, w in zip(shape, size, strict=True) for part in (s // w, w)])
    axes = [*range(0, 2 * len(shape), 2), *range(1, 2 * len(shape), 2)]
    return torch.cat((places.permute(axes).flatten() + before, torch.arange(before)))[None, None]
