"""Blocks whose numbers differ in one bit (the flat block butterfly of Pixelated Butterfly, arXiv:2112.00029, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.attention.patterns._tables import Table


@dataclass(frozen=True)
class Butterfly(Table):
    """The own block, and the blocks whose number differs from it in one of the lowest `levels` bits (in any one, where None)."""

    levels: int | None = None
    block: int = 64

    def __post_init__(self) -> None:
        if self.block < 1 or (self.levels is not None and self.levels < 0):
            raise StructureError(f"there are no {self.levels} levels of blocks of {self.block}", where="Butterfly")

    def table(self, rows: Tensor, blocks: int, causal: bool) -> Tensor:
        apart = torch.bitwise_xor(rows[:, None], torch.arange(blocks))
        one_bit = (apart & (apart - 1)) == 0  # and the own block, which differs in none
        return one_bit if self.levels is None else one_bit & (apart < 1 << self.levels)
