"""Block sparse rows: blocks of r output rows × c inputs kept whole. Column blocks r×1, the CPU's favourite, have c = 1.

values              [nnzb, c, r] any float dtype; inside a block the r outputs of one input are contiguous
block_columns       [nnzb] int16 (int32 above 32767 columns): block kept starts at input block_columns * c; ascending within a block row
block_row_pointers  [ceil(N / r) + 1] int32
attributes r, c: r need not divide N (the last block row is padded with zeros); c divides K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.errors import StructureError

from ._base import Format, index_dtype, pointers_from_counts, rows_from_pointers


@dataclass(frozen=True, eq=False, kw_only=True)
class Bsr(Format):
    """Dense blocks, block row by block row, with their block columns."""

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "block_columns", "block_row_pointers")
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("out_features", "in_features", "r", "c")

    block_columns: Tensor
    block_row_pointers: Tensor
    r: int
    c: int

    @classmethod
    def fits(cls, weight: Tensor, mask: Tensor, **attributes: int) -> str | None:
        r, c = _sizes(attributes)
        if mask.shape[1] % c:
            return f"{mask.shape[1]} inputs do not divide into blocks of {c}"
        some, every = _blocks(mask, r, c, fill=False).any((1, 3)), _blocks(mask, r, c, fill=True).all((1, 3))
        return None if torch.equal(some, every) else f"some {r}x{c} blocks are kept in part"

    @classmethod
    def widened(cls, mask: Tensor, most: int, **attributes: int) -> Tensor | None:
        """Blocks that are kept in part are kept whole."""
        r, c = _sizes(attributes)
        if mask.shape[1] % c:
            return None
        some = _blocks(mask, r, c, fill=False).any((1, 3)).repeat_interleave(r, 0)[: mask.shape[0]]
        return some.repeat_interleave(c, 1) if int(some.sum()) * c <= most else None

    @classmethod
    def _encode(cls, weight: Tensor, mask: Tensor, **attributes: int) -> Self:
        r, c = _sizes(attributes)
        rows, columns = weight.shape
        kept = _blocks(mask, r, c, fill=False).any((1, 3))
        values = _blocks(weight, r, c, fill=0).permute(0, 2, 3, 1)[kept].contiguous()
        return cls(values=values, block_columns=kept.nonzero()[:, 1].to(index_dtype(columns)),
                   block_row_pointers=pointers_from_counts(kept.sum(1)), out_features=rows, in_features=columns, r=r, c=c)

    @property
    def padded_rows(self) -> int:
        return -(-self.out_features // self.r) * self.r

    def places(self) -> Tensor:
        device = self.values.device
        rows = rows_from_pointers(self.block_row_pointers, self.values.shape[0])[:, None, None] * self.r + torch.arange(self.r, device=device)
        columns = self.block_columns.long()[:, None, None] * self.c + torch.arange(self.c, device=device)[:, None]
        return rows * self.in_features + columns

    def check(self) -> None:
        self._require(self.in_features % self.c == 0, f"blocks of {self.c} do not divide {self.in_features} inputs")
        shape = tuple(self.values.shape)
        self._require(len(shape) == 3 and shape[1:] == (self.c, self.r), f"values must be [nnzb, {self.c}, {self.r}], got {list(shape)}")
        self._require_index("block_columns", (shape[0],), index_dtype(self.in_features), self.in_features // self.c)
        self._require_pointers("block_row_pointers", -(-self.out_features // self.r), shape[0])
        rows = rows_from_pointers(self.block_row_pointers, shape[0])
        self._require_ascending("block_columns", "block row", rows * self.in_features + self.block_columns.long())


def _blocks(tensor: Tensor, r: int, c: int, fill: float) -> Tensor:
    """[ceil(N / r), r, K / c, c]: the weight cut into blocks, its last rows filled up."""
    rows, columns = tensor.shape
    missing = -rows % r
    padded = pad(tensor, (0, 0, 0, missing), value=fill) if missing else tensor
    return padded.reshape((rows + missing) // r, r, columns // c, c)


def _sizes(attributes: dict[str, int]) -> tuple[int, int]:
    r, c = attributes.get("r"), attributes.get("c")
    if r is None or c is None or r < 1 or c < 1:
        raise StructureError(f"needs a block of at least 1x1, got r={r}, c={c}", where="bsr")
    return r, c
