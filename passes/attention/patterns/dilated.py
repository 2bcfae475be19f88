"""Every so many tokens (Longformer's dilated window, arXiv:2004.05150, section 3.1; Sparse Transformer's strided head, arXiv:1904.10509)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_pattern import three
from sparsify_compiler.errors import StructureError


@dataclass(frozen=True)
class Dilated:
    """q - k divides by step, and |q - k| < window * step: `window` tokens on a side, `step` apart; without a window, all of them (strided)."""

    step: int
    window: int | None = None

    def __post_init__(self) -> None:
        if self.step < 1 or (self.window is not None and self.window < 1):
            raise StructureError(f"step and window are at least 1, got {self.step} and {self.window}", where="Dilated")

    def allows(self, q: Tensor, k: Tensor, grid: Grid) -> Tensor:
        apart = q - k
        near = apart % self.step == 0
        return near if self.window is None else near & (apart.abs() < self.window * self.step)

    def kinds(self, grid: Grid) -> Tensor:
        (q0, q1), (k0, k1) = grid.q, grid.k
        low, high = q0 - k1, q1 - k0
        if self.window is not None:
            low, high = low.clamp(min=-self.window * self.step + 1), high.clamp(max=self.window * self.step - 1)
        far = 0 if self.window is None else (q1 - k0).maximum(k1 - q0) >= self.window * self.step
        return three(high // self.step * self.step >= low, ((low == high) & (low % self.step == 0) | (self.step == 1)) & (far == 0))
