"""All keys: dense attention (Vaswani et al., arXiv:1706.03762, section 3.2.1), as one choice among others for a head or a layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_pattern import three


@dataclass(frozen=True)
class Everything:
    """Every place counts."""

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return (q == q) & (k == k)

    def kinds(self, grid: Grid) -> Tensor:
        every = (grid.q[0] == grid.q[0]) & (grid.k[0] == grid.k[0])
        return three(every, every)
