"""Constant fan-in: every output keeps the same number of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.passes.prune.structures._base import ANY_MASK, Structure, keep_top, kept
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured


@dataclass(frozen=True)
class FanIn(Structure):
    """Every output row keeps its own best ceil(density * in) inputs (SRigL, arXiv:2305.02299)."""

    def __str__(self) -> str:
        return "fan_in"

    @property
    def loose(self) -> Structure:
        return Unstructured()

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return (("condensed", {}), *ANY_MASK)

    def contests(self, rows: int, columns: int) -> int:
        return rows

    def _keep(self, score: Tensor, density: float) -> Tensor:
        return keep_top(score, kept(score.shape[1], density))
