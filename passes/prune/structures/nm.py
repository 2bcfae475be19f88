"""N:M: n weights kept in every m consecutive inputs of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import Structure, keep_top


@dataclass(frozen=True)
class NM(Structure):
    """n of every m consecutive inputs are kept, in every output row ("2:4": arXiv:2104.08378)."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m <= 256:
            raise StructureError(f"N:M needs 1 <= n < m <= 256, got {self.n}:{self.m}", where="NM")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float | None:
        return self.n / self.m

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return (("nm", {"n": self.n, "m": self.m}),)

    def misfit(self, rows: int, columns: int) -> str | None:
        return f"{columns} inputs do not divide into groups of {self.m}" if columns % self.m else None

    def _keep(self, score: Tensor, density: float) -> Tensor:
        return keep_top(score.reshape(-1, self.m), self.n).view(score.shape)
