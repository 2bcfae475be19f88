"""The last tokens of every stretch of the text (the fixed head of Sparse Transformer, arXiv:1904.10509, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_pattern import Places
from sparsify_compiler.errors import StructureError


@dataclass(frozen=True)
class FixedColumns(Places):
    """k in the query's own stretch of `stride` tokens, or among the last `columns` of any stretch."""

    stride: int
    columns: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.columns <= self.stride:
            raise StructureError(f"columns lie between 1 and the stride {self.stride}, got {self.columns}", where="FixedColumns")

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return (q // self.stride == k // self.stride) | ((k % self.stride >= self.stride - self.columns) & (q == q))
