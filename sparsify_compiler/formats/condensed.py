"""Condensed: every output row keeps the same number F of inputs (constant fan-in, SRigL, arXiv:2305.02299).

values   [N, F] any float dtype
columns  [N, F] int16 (int32 above 32767 columns), ascending within a row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ._base import Format, index_dtype, kept_entries


@dataclass(frozen=True, eq=False, kw_only=True)
class Condensed(Format):
    """A dense [N, F] table of values beside one of columns."""

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "columns")

    columns: Tensor

    @classmethod
    def fits(cls, weight: Tensor, mask: Tensor, **attributes: int) -> str | None:
        counts = mask.sum(1)
        if mask.shape[0] == 0:
            return "no rows"
        low, high = (int(v) for v in counts.aminmax())
        return None if low == high else f"rows keep from {low} to {high} inputs; needs the same number in each"

    @classmethod
    def widened(cls, mask: Tensor, most: int, **attributes: int) -> Tensor | None:
        """Rows that keep fewer inputs than the fullest keep their first others too."""
        counts = mask.sum(1)
        if not mask.numel() or int(counts.max()) * len(counts) > most:
            return None
        missing = (counts.max() - counts)[:, None]
        return mask | (~mask & ((~mask).cumsum(1) <= missing))

    @classmethod
    def _encode(cls, weight: Tensor, mask: Tensor, **attributes: int) -> Self:
        rows, columns = weight.shape
        values, places = kept_entries(weight, mask)
        shape = (rows, values.shape[0] // rows)
        return cls(values=values.view(shape), columns=places.to(index_dtype(columns)).view(shape), out_features=rows, in_features=columns)

    def places(self) -> Tensor:
        rows = torch.arange(self.out_features, device=self.values.device)[:, None]
        return rows * self.in_features + self.columns.long()

    def check(self) -> None:
        shape = tuple(self.values.shape)
        self._require(len(shape) == 2 and shape[0] == self.out_features, f"values must be [{self.out_features}, F], got {list(shape)}")
        self._require_index("columns", shape, index_dtype(self.in_features), self.in_features)
        self._require_ascending("columns", "row", self.places())
