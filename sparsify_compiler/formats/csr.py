"""Compressed sparse rows: any mask.

values        [nnz] any float dtype, row by row
columns       [nnz] int16 (int32 above 32767 columns), ascending within a row
row_pointers  [N + 1] int32: row n holds entries row_pointers[n] to row_pointers[n + 1]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from ._base import Format, index_dtype, kept_entries, pointers_from_counts, rows_from_pointers


@dataclass(frozen=True, eq=False, kw_only=True)
class Csr(Format):
    """Values of the kept places, row by row, with their columns."""

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "columns", "row_pointers")

    columns: Tensor
    row_pointers: Tensor

    @classmethod
    def fits(cls, weight: Tensor, mask: Tensor, **attributes: int) -> str | None:
        return None if mask.numel() < 2**31 or int(mask.sum()) < 2**31 else "more than 2**31 kept places"

    @classmethod
    def _encode(cls, weight: Tensor, mask: Tensor, **attributes: int) -> Self:
        rows, columns = weight.shape
        values, places = kept_entries(weight, mask)
        return cls(values=values, columns=places.to(index_dtype(columns)), row_pointers=pointers_from_counts(mask.sum(1)),
                   out_features=rows, in_features=columns)

    def places(self) -> Tensor:
        rows = rows_from_pointers(self.row_pointers, self.values.shape[0])
        return rows * self.in_features + self.columns.long()

    def check(self) -> None:
        self._require(self.values.dim() == 1, f"values must be [nnz], got {list(self.values.shape)}")
        self._require_index("columns", (self.values.shape[0],), index_dtype(self.in_features), self.in_features)
        self._require_pointers("row_pointers", self.out_features, self.values.shape[0])
        self._require_ascending("columns", "row", self.places())
