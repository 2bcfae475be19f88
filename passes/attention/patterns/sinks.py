"""The first tokens, which attention gathers on (StreamingLLM, arXiv:2309.17453, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_pattern import three
from sparsify_compiler.errors import StructureError


@dataclass(frozen=True)
class Sinks:
    """k < tokens: every query reads the first tokens."""

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise StructureError(f"there are no {self.tokens} tokens", where="Sinks")

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return (k < self.tokens) & (q == q)

    def kinds(self, grid: Grid) -> Tensor:
        (q0, _), (k0, k1) = grid.q, grid.k
        return three((k0 < self.tokens) & (q0 == q0), (k1 < self.tokens) & (q0 == q0))
