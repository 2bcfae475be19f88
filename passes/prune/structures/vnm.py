"""V:N:M: v rows share which columns may be kept, and each keeps n of those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, islice
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import Structure, keep_top

EXACT = 2000  # choices of columns that are all tried; more are searched by swaps
SWAPS = 4  # rounds of them
AT_ONCE = 1 << 24  # scores looked at together, 64 MiB of float32


@dataclass(frozen=True)
class VNM(Structure):
    """Of every m inputs, v rows share the choice of `columns`, and each row keeps n of these (VENOM, arXiv:2310.02065).

    With columns=4 and n=2 what remains is 2:4, at any density n/m. The columns chosen are those with which the rows keep most score: of all
    choices where there are few (m <= 16), else the ones of highest score, improved by swaps. `m` must divide the inputs; the last rows may be fewer.
    """

    v: int
    n: int
    m: int
    columns: int = 4

    def __post_init__(self) -> None:
        if not (self.v >= 1 and 1 <= self.n <= self.columns <= self.m <= 256 and self.n < self.m):
            raise StructureError(f"V:N:M needs v >= 1, 1 <= n <= columns <= m <= 256 and n < m, got {self}", where="VNM")

    def __str__(self) -> str:
        more = f", columns={self.columns}" if self.columns != 4 else ""
        return f"VNM(v={self.v}, n={self.n}, m={self.m}{more})"

    @property
    def density(self) -> float | None:
        return self.n / self.m

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return (("nm", {"n": self.n, "m": self.m}), ("condensed", {}))

    def misfit(self, rows: int, columns: int) -> str | None:
        return f"{columns} inputs do not divide into groups of {self.m}" if columns % self.m else None

    def _keep(self, score: Tensor, density: float) -> Tensor:
        rows, columns = score.shape
        # [blocks, v, m]; rows that pad the last block score nothing and decide nothing
        long = pad(score, (0, 0, 0, -rows % self.v)).view(-1, self.v, columns // self.m, self.m).transpose(1, 2).reshape(-1, self.v, self.m)
        step = max(1, AT_ONCE // (self.v * self.m))
        masks = torch.cat([self._block_mask(part) for part in torch.split(long, step)])
        return masks.view(-1, columns // self.m, self.v, self.m).transpose(1, 2).reshape(-1, columns)[:rows]

    def _block_mask(self, score: Tensor) -> Tensor:
        """The mask of blocks [blocks, v, m]."""
        chosen = self._best_of_all(score) if comb(self.m, self.columns) <= EXACT else self._best_by_swaps(score)
        places = chosen[:, None].expand(-1, self.v, -1)
        within = keep_top(score.gather(2, places).reshape(-1, self.columns), self.n).view(places.shape)
        return torch.zeros_like(score, dtype=torch.bool).scatter(2, places, within)

    def _value(self, score: Tensor, chosen: Tensor) -> Tensor:
        """The score [blocks] that is kept when each block [v, m] may keep the columns `chosen` [blocks, columns]."""
        seen = score.gather(2, chosen[:, None].expand(-1, self.v, -1))
        return seen.topk(self.n, 2).values.sum((1, 2), dtype=torch.float64)

    def _best_of_all(self, score: Tensor) -> Tensor:
        best = torch.full(score.shape[:1], -torch.inf, dtype=torch.float64, device=score.device)
        chosen = torch.arange(self.columns, device=score.device).repeat(score.shape[0], 1)
        for choice in _choices(self.m, self.columns, score.device):
            here = choice.expand(score.shape[0], -1)
            value = self._value(score, here)
            better = value > best
            best, chosen = torch.where(better, value, best), torch.where(better[:, None], here, chosen)
        return chosen

    def _best_by_swaps(self, score: Tensor) -> Tensor:
        """Columns of highest sum, then: swap one that is in for one that is out wherever that keeps more."""
        inside = keep_top(score.sum(1), self.columns)
        for _ in range(SWAPS):
            before = inside
            for outgoing in range(self.columns):
                chosen = inside.nonzero()[:, 1].view(-1, self.columns)
                best, value = chosen, self._value(score, chosen)
                for incoming in range(self.m):
                    trial = chosen.clone()
                    trial[:, outgoing] = incoming
                    gain = torch.where(inside[:, incoming], -torch.inf, self._value(score, trial))
                    best, value = torch.where((gain > value)[:, None], trial, best), torch.maximum(value, gain)
                inside = torch.zeros_like(inside).scatter(1, best, True)
            if torch.equal(inside, before):
                break
        return inside.nonzero()[:, 1].view(-1, self.columns)


def _choices(m: int, columns: int, device: torch.device) -> Iterator[Tensor]:
    """Every choice of columns, ascending, int64 [columns]."""
    yield from torch.tensor(list(islice(combinations(range(m), columns), EXACT)), device=device)
