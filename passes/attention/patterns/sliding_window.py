"""The tokens near by (Longformer, arXiv:2004.05150, section 3.1; Mistral, arXiv:2310.06825)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_pattern import three
from sparsify_compiler.errors import StructureError


@dataclass(frozen=True)
class SlidingWindow:
    """|q - k| < window: a causal query reads itself and the window - 1 tokens before it.

    growth   tokens that the window is longer for each token before the query: window + growth * q (MoA's rule of length, arXiv:2406.14909,
             section 3.1, by the length that a query sees, so that decoding continues what the prompt began)
    """

    window: int
    growth: float = 0.0

    def __post_init__(self) -> None:
        if self.window < 1 or self.growth < 0:
            raise StructureError(f"a window holds at least one token and never shrinks, got {self.window} and {self.growth}", where="SlidingWindow")

    def _wide(self, q: Tensor) -> Tensor:
        return self.window + (q.clamp(min=0) * self.growth).floor()

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        return (q - k).abs() < self._wide(q)

    def kinds(self, grid: Grid) -> Tensor:
        (q0, q1), (k0, k1) = grid.q, grid.k
        nearest = ((k0 - q1).clamp(min=0)).maximum((q0 - k1).clamp(min=0))
        return three(nearest < self._wide(q1), (k1 - q0).maximum(q1 - k0) < self._wide(q0))
