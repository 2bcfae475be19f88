"""Tokens that read all and are read by all (Longformer, arXiv:2004.05150, section 3.1; BigBird-ITC, arXiv:2007.14062, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_pattern import three
from sparsify_compiler.errors import StructureError


@dataclass(frozen=True)
class GlobalTokens:
    """k < tokens or q < tokens: the first tokens, a [CLS] or a question, in both directions."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise StructureError(f"there are no {self.tokens} tokens", where="GlobalTokens")

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return (k < self.tokens) | (q < self.tokens)

    def kinds(self, grid: Grid) -> Tensor:
        (q0, q1), (k0, k1) = grid.q, grid.k
        return three((k0 < self.tokens) | (q0 < self.tokens), (k1 < self.tokens) | (q1 < self.tokens))
