"""How far numbers are from those that they should be: of a kernel, of its variants, of a step by one library."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLICE = 4               # times as far may one row, or one output, be: one of a thousand is lost in the norm of all
STRETCH = 1 << 20       # numbers that are compared at a time
NEAR, NEAR_HALF = 1e-3, 3e-2    # distance from the right numbers that rounding alone does not reach, in float32 and in half precision


def near(dtype: torch.dtype) -> float:
    """The distance that is allowed of numbers of this dtype."""
    return NEAR if dtype is torch.float32 else NEAR_HALF


def distance(found: object, expected: object, slices: bool = True) -> float:
    """The norm of the difference over that of `expected`, 0 where both are 0; infinite where shapes differ, or one is no number, or another infinity.

    slices  a SLICE-th of that of each slice along each dimension (a row, an output) counts too: one that is wrong is lost in the norm of thousands

    A stretch at a time: what wide numbers need is little beside the outputs.
    """
    assert isinstance(found, Tensor)
    assert isinstance(expected, Tensor)
    if found.shape != expected.shape:
        return math.inf
    shape = [size for size in found.shape if size != 1] or [1]
    away, size = ([torch.zeros(extent, dtype=torch.float64) for extent in shape] for _ in range(2))
    rows = max(STRETCH * shape[0] // max(found.numel(), 1), 1)
    for begin in range(0, shape[0], rows):
        ours, right = (numbers.reshape(shape)[begin : begin + rows] for numbers in (found, expected))
        numbers = right.isfinite()
        if not (torch.equal(ours.isfinite(), numbers) and torch.equal(ours[~numbers].sign(), right[~numbers].sign())):
            return math.inf
        wide = torch.where(numbers, right, 0).double()
        _add(away, torch.where(numbers, ours, 0).double() - wide, begin)
        _add(size, wide, begin)
    return max(_ratio(away[0].sum(), size[0].sum()), *(_farthest(*sums) / SLICE if slices else 0.0 for sums in zip(away, size, strict=True)))


def _add(sums: list[Tensor], numbers: Tensor, begin: int) -> None:
    """The squares of numbers, of rows from `begin` on, to the sums of each dimension's slices."""
    squares = numbers.square()
    for dim, total in enumerate(sums):
        others = [other for other in range(squares.dim()) if other != dim]
        total[begin if dim == 0 else 0 :][: squares.shape[dim]] += squares.sum(others) if others else squares


def _ratio(away: Tensor, size: Tensor) -> float:
    """Of roots of sums of squares."""
    return math.sqrt(float(away) / float(size)) if size else 0.0 if not away else math.inf


def _farthest(away: Tensor, size: Tensor) -> float:
    """The largest ratio of a slice: over its own norm, or a quarter of the slices' (of one that is all but 0 rounding alone is a large part)."""
    if not size.numel():
        return 0.0
    return float(torch.where(away > 0, away / torch.maximum(size, size.mean() / 16), 0).max().sqrt())
