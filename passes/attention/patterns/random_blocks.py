"""Blocks at random (BigBird, arXiv:2007.14062, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.attention.patterns._tables import Table


@dataclass(frozen=True)
class RandomBlocks(Table):
    """`blocks` blocks of keys for each block of queries, drawn without repetition from those that it may read; the same for a seed, at any length."""

    blocks: int
    block: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.blocks < 0 or self.block < 1:
            raise StructureError(f"there are no {self.blocks} blocks of {self.block}", where="RandomBlocks")

    def table(self, rows: Tensor, blocks: int, causal: bool) -> Tensor:
        columns = torch.arange(blocks)
        drawn = _mixed(rows[:, None] * 1_000_003 + columns * 7919 + self.seed * 104_729)
        if causal:
            drawn = drawn.masked_fill(columns > rows[:, None], torch.iinfo(torch.int64).max)
        taken = torch.zeros(len(rows), blocks, dtype=torch.bool)
        taken.scatter_(1, drawn.argsort(1)[:, :self.blocks], torch.ones((), dtype=torch.bool).expand(len(rows), min(self.blocks, blocks)))
        return taken & (columns <= rows[:, None]) if causal else taken


def _mixed(number: Tensor) -> Tensor:
    """A fixed permutation of the numbers of 31 bits that leaves no pattern to see (xorshift and multiply, twice)."""
    number = number & 0x7FFFFFFF
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    return number ^ (number >> 16)
