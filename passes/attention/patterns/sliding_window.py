"""The tokens near by (Longformer, arXiv:2004.05150, section 3.1; Mistral, arXiv:2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.block_pattern import Grid, three
from sparsify_compiler.errors import StructureError


@dataclass(frozen=True)
class SlidingWindow:
    """|q - k| < window: a causal query reads itself and the window - 1 tokens before it."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise StructureError(f"a window holds at least one token, got {self.window}", where="SlidingWindow")

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return (q - k).abs() < self.window

    def kinds(self, grid: Grid) -> Tensor:
        (q0, q1), (k0, k1) = grid.q, grid.k
        nearest = ((k0 - q1).clamp(min=0)).maximum((q0 - k1).clamp(min=0))
        return three(nearest < self.window, (k1 - q0).maximum(q1 - k0) < self.window)
