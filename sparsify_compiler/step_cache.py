"""The caches of generate() as buffers that a library writes into: nothing is copied from token to token.

A static cache is such a buffer itself; one that grows has room behind its keys (library_cache.py), and shows what is filled of it. Only places behind
that are ever written, so that nobody's tensors change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MOST = 1 << 31      # numbers in a buffer: kernels count them in 32 bits


@dataclass(frozen=True)
class Filled:
    """A cache before a call: how many tokens it holds, its buffers [B, G, capacity, D], and what is to be done when a token more is in them."""

    past: int
    buffers: Sequence[Tensor]
    done: Callable[[], None]


def filled(cache: Any, batch: int, sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> Filled | None:
    """A cache of transformers whose layers have these groups and widths, keys before values; None for other kinds, empty ones and full ones.

    Layers that grow become layers that append in place, as they do in our models anyhow.
    """
    from transformers.cache_utils import DynamicCache, StaticCache, StaticLayer

    from .library_cache import AppendingLayer, append_in_place

    if type(cache) is DynamicCache and not cache.offloading:
        append_in_place(cache)
        kind: Any = AppendingLayer
        found = _growing(cache.layers) if _are(cache.layers, kind) else None
    elif type(cache) is StaticCache and not cache.offloading and _are(cache.layers, StaticLayer):
        found = _static(cache.layers)
    else:
        return None
    return found if found is not None and _fit(found, batch, sizes, dtype) else None


def _are(layers: Sequence[Any], kind: Any) -> bool:
    return bool(layers) and all(type(layer) is kind and layer.is_initialized for layer in layers)


def _growing(layers: Sequence[Any]) -> Filled | None:
    past = layers[0].held()
    if not past or any(layer.held() != past for layer in layers):
        return None
    buffers = [one for layer in layers for one in layer.room_for(1)]

    def done() -> None:
        for layer in layers:
            layer.show(past + 1)

    return Filled(past, buffers, done)


def _static(layers: Sequence[Any]) -> Filled | None:
    past, buffers = int(layers[0].cumulative_length), [one for layer in layers for one in (layer.keys, layer.values)]
    if not 0 < past < buffers[0].shape[2] or not all(one.is_contiguous() for one in buffers):
        return None

    def done() -> None:
        for layer in layers:
            layer.cumulative_length.add_(1)

    return Filled(past, buffers, done)


def _fit(found: Filled, batch: int, sizes: Sequence[tuple[int, int]], dtype: torch.dtype) -> bool:
    capacity = found.buffers[0].shape[2]
    return len(found.buffers) == len(sizes) and all(
        one.shape == (batch, groups, capacity, width) and one.dtype is dtype and one.is_cpu and one.numel() < MOST
        for one, (groups, width) in zip(found.buffers, sizes, strict=True))
