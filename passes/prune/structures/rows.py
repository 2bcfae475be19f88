"""Rows: whole outputs are kept or cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import ANY_MASK, Structure, keep_groups


@dataclass(frozen=True)
class Rows(Structure):
    """Runs of `size` output rows, chosen within the layer by their mean score: neurons, filters, or heads with size = head_dim.

    Masks only, nothing gets smaller; the last run may be shorter. ceil(density * runs) are kept.
    """

    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise StructureError(f"a run has at least one row, got {self.size}", where="Rows")

    def __str__(self) -> str:
        return f"Rows(size={self.size})" if self.size != 1 else "Rows()"

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return ANY_MASK

    def groups(self, rows: int, columns: int) -> Tensor:
        return (torch.arange(rows) // self.size)[:, None].expand(rows, columns)

    def _keep(self, score: Tensor, density: float) -> Tensor:
        return keep_groups(score.double().mean(1), self.size, density)[:, None].expand(score.shape).clone()
