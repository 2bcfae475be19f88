"""Bitmap: one bit a place, then the kept values (Endor, arXiv:2406.11674, section 3). Any mask; smaller than CSR above a density of about 1/16.

values  [nnz] any float dtype, row by row
bits    [N, ceil(K / 8)] uint8: place k of a row is kept where bit k % 8 of byte k // 8 is set, the lowest bit first; bits past K are 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._base import Format, kept_entries


@dataclass(frozen=True, eq=False, kw_only=True)
class Bitmap(Format):
    """The mask itself, eight places a byte, beside the values of the kept ones."""

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "bits")

    bits: Tensor

    @classmethod
    def fits(cls, weight: Tensor, mask: Tensor, **attributes: int) -> str | None:
        return None

    @classmethod
    def _encode(cls, weight: Tensor, mask: Tensor, **attributes: int) -> Self:
        rows, columns = weight.shape
        places = pad(mask, (0, -columns % 8)).view(rows, -(-columns // 8), 8)
        bits = (places.to(torch.uint8) << _order(mask.device)).sum(-1, dtype=torch.uint8)
        return cls(values=kept_entries(weight, mask)[0], bits=bits, out_features=rows, in_features=columns)

    def mask(self) -> Tensor:
        return self._places()[:, : self.in_features].contiguous()

    def places(self) -> Tensor:
        return self.mask().reshape(-1).nonzero().squeeze(1)

    def check(self) -> None:
        shape = (self.out_features, -(-self.in_features // 8))
        self._require(tuple(self.bits.shape) == shape, f"bits must be {list(shape)}, got {list(self.bits.shape)}")
        self._require(self.bits.dtype == torch.uint8, f"bits must be {torch.uint8}, got {self.bits.dtype}")
        places = self._places()
        self._require(not bool(places[:, self.in_features :].any()), f"bits past input {self.in_features} must be 0")
        kept = int(places.sum())
        self._require(tuple(self.values.shape) == (kept,), f"values must be [{kept}], one for each set bit, got {list(self.values.shape)}")

    def _places(self) -> Tensor:
        """bool [N, ceil(K / 8) * 8]."""
        return ((self.bits[..., None] >> _order(self.bits.device)) & 1).bool().view(self.bits.shape[0], self.bits.shape[1] * 8)


def _order(device: torch.device) -> Tensor:
    """How far each of the eight places of a byte is shifted."""
    return torch.arange(8, dtype=torch.uint8, device=device)
