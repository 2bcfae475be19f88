"""Blocks: r outputs × c inputs are kept or cut together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import Structure, keep_top, kept


@dataclass(frozen=True)
class Block(Structure):
    """Blocks of `rows` outputs × `columns` inputs, chosen within the layer by the mean score of their weights.

    Block(16, 1) are column blocks, the processor's favourite: one input feeds a vector of outputs. `columns` must divide the inputs;
    `rows` need not divide the outputs, the last blocks are then lower. ceil(density * blocks) blocks are kept.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise StructureError(f"a block has at least one row and one column, got {self.rows}x{self.columns}", where="Block")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return (("bsr", {"r": self.rows, "c": self.columns}),)

    def misfit(self, rows: int, columns: int) -> str | None:
        return f"{columns} inputs do not divide into blocks of {self.columns}" if columns % self.columns else None

    def groups(self, rows: int, columns: int) -> Tensor:
        across = -(-columns // self.columns)
        return (torch.arange(rows) // self.rows)[:, None] * across + (torch.arange(columns) // self.columns)[None]

    def _keep(self, score: Tensor, density: float) -> Tensor:
        rows, columns = score.shape
        missing = -rows % self.rows
        cut = pad(score, (0, 0, 0, missing)).view(-1, self.rows, columns // self.columns, self.columns)
        sums = cut.sum((1, 3))
        if missing:
            sums[-1] *= self.rows / (self.rows - missing)  # the mean of a lower block counts as much
        blocks = keep_top(sums.view(1, -1), kept(sums.numel(), density)).view(sums.shape)
        return blocks.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)[:rows]
