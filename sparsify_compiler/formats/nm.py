"""N:M packed: n inputs kept in every m consecutive ones of each output row (2:4 and its like).

values   [N, K / m * n] any float dtype
offsets  [N, K / m * n] uint8: place inside its group of m, ascending within the group
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from sparsify_compiler.errors import StructureError

from ._base import Format, kept_entries


@dataclass(frozen=True, eq=False, kw_only=True)
class Nm(Format):
    """The n kept values of each group of m, with one byte of place each."""

    TENSORS: ClassVar[tuple[str, ...]] = ("values", "offsets")
    ATTRIBUTES: ClassVar[tuple[str, ...]] = ("out_features", "in_features", "n", "m")

    offsets: Tensor
    n: int
    m: int

    @classmethod
    def fits(cls, weight: Tensor, mask: Tensor, **attributes: int) -> str | None:
        n, m = _sizes(attributes)
        rows, columns = mask.shape
        if columns % m:
            return f"{columns} inputs do not divide into groups of {m}"
        exact = bool((mask.reshape(rows, columns // m, m).sum(-1) == n).all())
        return None if exact else f"not every group of {m} inputs keeps exactly {n}"

    @classmethod
    def widened(cls, mask: Tensor, most: int, **attributes: int) -> Tensor | None:
        """Groups that keep fewer than n keep their first others too."""
        n, m = _sizes(attributes)
        if mask.shape[1] % m or mask.numel() // m * n > most:
            return None
        groups = mask.reshape(-1, m)
        counts = groups.sum(1)
        if bool((counts > n).any()):
            return None
        short = (counts < n).nonzero().squeeze(1)
        added = groups[short].byte().argsort(dim=1, descending=True, stable=True)[:, :n]
        return groups.index_copy(0, short, groups[short].scatter(1, added, True)).view(mask.shape)

    @classmethod
    def _encode(cls, weight: Tensor, mask: Tensor, **attributes: int) -> Self:
        n, m = _sizes(attributes)
        rows, columns = weight.shape
        values, places = kept_entries(weight, mask)
        shape = (rows, columns // m * n)
        return cls(values=values.view(shape), offsets=(places % m).to(torch.uint8).view(shape), out_features=rows, in_features=columns, n=n, m=m)

    def places(self) -> Tensor:
        rows = torch.arange(self.out_features, device=self.values.device)[:, None]
        groups = torch.arange(self.values.shape[1], device=self.values.device) // self.n
        return rows * self.in_features + groups * self.m + self.offsets.long()

    def check(self) -> None:
        self._require(self.n <= self.m <= 256 and self.in_features % self.m == 0,
                      f"{self.n}:{self.m} does not divide {self.in_features} inputs")
        shape = (self.out_features, self.in_features // self.m * self.n)
        self._require(tuple(self.values.shape) == shape, f"values must be {list(shape)}, got {list(self.values.shape)}")
        self._require_index("offsets", shape, torch.uint8, self.m)
        self._require_ascending("offsets", "group", self.places())


def _sizes(attributes: dict[str, int]) -> tuple[int, int]:
    n, m = attributes.get("n"), attributes.get("m")
    if n is None or m is None or not 1 <= n <= m <= 256:
        raise StructureError(f"needs 1 <= n <= m <= 256, got n={n}, m={m}", where="nm")
    return n, m
