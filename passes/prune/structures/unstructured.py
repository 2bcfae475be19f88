"""Unstructured: any weight may be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import ANY_MASK, Structure, keep_top, kept


@dataclass(frozen=True)
class Unstructured(Structure):
    """Any weight may be kept; scores are compared within the whole layer, each output row (Wanda, arXiv:2306.11695) or each input column (DaSS).

    To compare them across layers take the budget global_threshold.
    """

    scope: Literal["layer", "row", "column"] = "layer"

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "row", "column"):
            raise StructureError(f"scope is 'layer', 'row' or 'column', not {self.scope!r}", where="Unstructured")

    def __str__(self) -> str:
        return "unstructured" if self.scope == "layer" else self.scope

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return (("condensed", {}), *ANY_MASK) if self.scope == "row" else ANY_MASK

    def groups(self, rows: int, columns: int) -> Tensor:
        whole = torch.arange(rows * columns)
        return whole.view(columns, rows).T if self.scope == "column" else whole.view(rows, columns)

    def contests(self, rows: int, columns: int) -> int:
        return {"layer": 1, "row": rows, "column": columns}[self.scope]

    def share(self, mask: Tensor) -> float:
        return float(mask.double().mean())

    def _keep(self, score: Tensor, density: float) -> Tensor:
        if self.scope == "column":
            return keep_top(score.T.contiguous(), kept(score.shape[0], density)).T
        groups = score if self.scope == "row" else score.reshape(1, -1)
        return keep_top(groups, kept(groups.shape[1], density)).view(score.shape)
