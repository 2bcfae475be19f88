"""Unstructured: any weight may be kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import Structure, keep_top, kept


@dataclass(frozen=True)
class Unstructured(Structure):
    """Any weight may be kept; scores are compared within the whole layer, or within each output row (Wanda, arXiv:2306.11695)."""

    scope: Literal["layer", "row"] = "layer"

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "row"):
            raise StructureError(f"scope is 'layer' or 'row', not {self.scope!r}", where="Unstructured")

    def __str__(self) -> str:
        return "row" if self.scope == "row" else "unstructured"

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return (("condensed", {}), ("csr", {})) if self.scope == "row" else (("csr", {}),)

    def _keep(self, score: Tensor, density: float) -> Tensor:
        groups = score if self.scope == "row" else score.reshape(1, -1)
        return keep_top(groups, kept(groups.shape[1], density)).view(score.shape)
