"""Compressed: attention to one key and value for each window of them, which a learned map makes (NSA, arXiv:2502.11089, section 3.3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_layout import BlockLayout, from_places
from sparsify_compiler.block_pattern import three
from sparsify_compiler.errors import ModelError
from sparsify_compiler.passes.attention.scorers._blocks import counted
from sparsify_compiler.passes.attention.scorers._windows import check_windows, unfolded, window_mask, windows

BLOCK = 64  # rows and windows that the kernel takes together


@dataclass(frozen=True)
class Compressed:
    """Windows of `length` keys and values, every `stride` of them one; a query attends to whole windows before it. Nothing where none is whole.

    A window is one linear map of its keys and what is learned of their places in it; the paper says MLP and leaves its form open.
    """

    length: int = 32
    stride: int = 16

    learned = ("compress_key", "place_key", "compress_value", "place_value")

    def __post_init__(self) -> None:
        check_windows(self.length, self.stride, "Compressed")

    def initial(self, heads: int, groups: int, width: int, value_width: int) -> dict[str, Tensor]:
        """The means: compress_... [G, length, D, D], place_... [G, length, D], by which windows start."""
        found = {}
        for name, size in (("key", width), ("value", value_width)):
            found[f"compress_{name}"] = (torch.eye(size, dtype=torch.float32) / self.length).repeat(groups, self.length, 1, 1)
            found[f"place_{name}"] = torch.zeros(groups, self.length, size, dtype=torch.float32)
        return found

    def branch(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, bias: Tensor | None, causal: bool, scale: float,
               weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See branches.Branch. Raises ModelError for a bias, which no window has."""
        if bias is not None:
            raise ModelError("something is added to the scores of this attention, which compressed keys cannot know", where="Compressed",
                             hint="name the attention in the pass's ignore")
        k, v = (compressed(rows, key_mask, weights[f"compress_{name}"], weights[f"place_{name}"], self.stride).to(query.dtype)
                for rows, name in ((key, "key"), (value, "value")))
        layout = _layout(self.length, self.stride, query.shape[2], key.shape[2], causal)
        return layout.attend(query, k, v, window_mask(key_mask, self.length, self.stride), None, scale)


def compressed(rows: Tensor, mask: Tensor | None, weight: Tensor, place: Tensor, stride: int) -> Tensor:
    """[B, G, K, D] -> [B, G, windows, D'], at least float32: weight [G, length, D, D'], place [G, length, D]; rows that do not count are 0."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    of_windows = unfolded(counted(rows, mask, dtype), weight.shape[1], stride) + place.to(dtype).transpose(-1, -2)[:, None]
    return torch.einsum("bgndl,glde->bgne", of_windows, weight.to(dtype))


@lru_cache(64)
def _layout(length: int, stride: int, queries: int, keys: int, causal: bool) -> BlockLayout:
    """Windows that end at or before a query's place."""
    grid = Grid(queries, windows(keys, length, stride), BLOCK, BLOCK, False)

    def end(window: Tensor) -> Tensor:
        return window * stride + length - 1

    def allows(q: Tensor, k: Tensor) -> Tensor:
        row = q - (grid.keys - grid.queries)
        return (end(k) <= row + (keys - queries)) | torch.tensor(not causal)

    first = torch.arange(0, queries, BLOCK)[:, None] + (keys - queries)
    last = first + BLOCK - 1
    kinds = three((end(grid.k[0]) <= last) | torch.tensor(not causal), (end(grid.k[1]) <= first) | torch.tensor(not causal))
    return from_places(kinds, allows, grid).layout()
