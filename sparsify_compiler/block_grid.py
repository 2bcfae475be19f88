"""Grid: the blocks of query rows and of keys that an attention of some lengths falls into, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """Blocks of query rows × blocks of keys. Query row i stands at key i + keys - queries; positions are counted from key `shift` on."""

    queries: int
    keys: int
    block_q: int
    block_k: int
    causal: bool
    shift: int = 0

    @property
    def rows(self) -> int:
        """Blocks of query rows, NQ; the last one may be cut."""
        return -(-self.queries // self.block_q)

    @property
    def columns(self) -> int:
        """Blocks of keys, NK; the last one may be cut."""
        return -(-self.keys // self.block_k)

    @cached_property
    def q(self) -> tuple[Tensor, Tensor]:
        """First and last position of each block of query rows, [NQ, 1]."""
        first = torch.arange(0, self.queries, self.block_q)[:, None]
        return first + self.offset, torch.clamp(first + self.block_q, max=self.queries) - 1 + self.offset

    @cached_property
    def k(self) -> tuple[Tensor, Tensor]:
        """First and last key of each block, [1, NK]."""
        first = torch.arange(0, self.keys, self.block_k)[None]
        return first - self.shift, torch.clamp(first + self.block_k, max=self.keys) - 1 - self.shift

    @property
    def offset(self) -> int:
        """Position of the first query row."""
        return self.keys - self.queries - self.shift

    def visible(self, device: Any = None) -> Tensor:
        """bool [NQ, NK]: pairs of blocks with a place that counts for dense attention: where causal, one at or below the diagonal."""
        if not self.causal:
            return torch.ones(self.rows, self.columns, dtype=torch.bool, device=device)
        return (self.k[0] <= self.q[1]).to(device)

    def visible_blocks(self) -> int:
        """How many pairs are visible."""
        return int(self.visible().sum())
