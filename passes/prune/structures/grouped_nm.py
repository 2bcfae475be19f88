"""Grouped n:m: n:m whose patterns come equally often, in an order that the kernel knows without indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import comb

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.errors import StructureError
from sparsify_compiler.passes.prune.structures._base import Structure

PATTERNS = 128  # the most patterns of n in m: a chunk has that many times `group` rows
AT_ONCE = 1 << 22  # pairs of a row and a pattern that are sorted together


@dataclass(frozen=True)
class GroupedNM(Structure):
    """n of every m inputs, and among C(m, n) * group rows each of the C(m, n) patterns `group` times (STen, arXiv:2304.07613).

    Rows and patterns are matched greedily, the pair that keeps the most score first, as STen does. `m` must divide the inputs; in a last chunk
    of fewer rows a pattern comes at most `group` times.
    """

    n: int
    m: int
    group: int = 4

    def __post_init__(self) -> None:
        if not (1 <= self.n < self.m and self.group >= 1):
            raise StructureError(f"grouped n:m needs 1 <= n < m and group >= 1, got {self.n}:{self.m} and {self.group}", where="GroupedNM")
        if comb(self.m, self.n) > PATTERNS:
            raise StructureError(f"{self.n}:{self.m} has {comb(self.m, self.n)} patterns; at most {PATTERNS} can be grouped", where="GroupedNM")

    def __str__(self) -> str:
        return f"GroupedNM(n={self.n}, m={self.m}, group={self.group})"

    @property
    def density(self) -> float | None:
        return self.n / self.m

    def formats(self) -> tuple[tuple[str, Mapping[str, int]], ...]:
        return (("nm", {"n": self.n, "m": self.m}), ("condensed", {}))

    def misfit(self, rows: int, columns: int) -> str | None:
        return f"{columns} inputs do not divide into groups of {self.m}" if columns % self.m else None

    def _keep(self, score: Tensor, density: float) -> Tensor:
        rows, columns = score.shape
        patterns = self._patterns(score.device)
        chunk = len(patterns) * self.group
        top = torch.finfo(score.dtype).max / (4 * self.m)  # so that sums stay finite
        finite = score.clamp(-top, top)
        long = pad(finite, (0, 0, 0, -rows % chunk), value=float(finite.min()) - 1)  # below every real row: what pads is matched last
        blocks = long.view(-1, chunk, columns // self.m, self.m).transpose(1, 2).reshape(-1, chunk, self.m)
        step = max(1, AT_ONCE // (chunk * len(patterns)))
        chosen = torch.cat([_match(part @ patterns.to(part.dtype).T, self.group) for part in torch.split(blocks, step)])
        return patterns[chosen].view(-1, columns // self.m, chunk, self.m).transpose(1, 2).reshape(-1, columns)[:rows]

    def _patterns(self, device: torch.device) -> Tensor:
        """bool [patterns, m]."""
        places = torch.tensor(list(combinations(range(self.m), self.n)), device=device)
        return torch.zeros(len(places), self.m, dtype=torch.bool, device=device).scatter(1, places, True)


def _match(kept: Tensor, group: int) -> Tensor:
    """int64 [blocks, rows]: a pattern for each row, each pattern `group` times, from the score kept [blocks, rows, patterns]. Greedy."""
    blocks, rows, patterns = kept.shape
    order = kept.reshape(blocks, -1).argsort(dim=1, descending=True, stable=True)
    chosen = torch.full((blocks, rows), -1, dtype=torch.long, device=kept.device)
    left = torch.full((blocks, patterns), group, dtype=torch.long, device=kept.device)
    every = torch.arange(blocks, device=kept.device)
    for pair in order.T:
        row, pattern = pair // patterns, pair % patterns
        take = (chosen[every, row] < 0) & (left[every, pattern] > 0)
        chosen[every, row] = torch.where(take, pattern, chosen[every, row])
        left[every, pattern] -= take.long()
    return chosen
