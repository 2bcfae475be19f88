"""Columns: whole inputs are kept or cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import ANY_MASK, Structure, keep_groups


@dataclass(frozen=True)
class Columns(Structure):
    """Runs of `size` inputs, chosen within the layer by their mean score over all outputs. The last run may be shorter.

    Masks only, nothing gets smaller. ceil(density * runs) are kept.
    """

    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise StructureError(f"a run has at least one column, got {self.size}", where="Columns")

    def __str__(self) -> str:
        return f"Columns(size={self.size})" if self.size != 1 else "Columns()"

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return (("condensed", {}), *ANY_MASK)

    def groups(self, rows: int, columns: int) -> Tensor:
        return (torch.arange(columns) // self.size)[None].expand(rows, columns)

    def _keep(self, score: Tensor, density: float) -> Tensor:
        return keep_groups(score.double().mean(0), self.size, density)[None].expand(score.shape).clone()
