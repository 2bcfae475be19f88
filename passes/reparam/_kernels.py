"""Arithmetic on conv kernels [outputs, channels, *taps]: other channels, other lattices, and the kernel of one conv after another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify_compiler.passes.reparam._lattice import Lattice

Ints = tuple[int, ...]


def windows(kernel: Tensor, begin: Tensor, wanted: Tensor, width: int) -> Tensor:
    """Rows that hold input channels begin[o] onwards, as rows of `width` channels from wanted[o] on: zeros where there was nothing."""
    if kernel.shape[1] == width and torch.equal(begin, wanted):
        return kernel
    index = wanted[:, None] + torch.arange(width) - begin[:, None]
    inside = (index >= 0) & (index < kernel.shape[1])
    rows = torch.arange(kernel.shape[0])[:, None]
    taken = kernel[rows, index.clamp(0, max(kernel.shape[1] - 1, 0))]
    return taken * inside.reshape(*inside.shape, *[1] * (kernel.dim() - 2))


def frame(kernel: Tensor, old: tuple[Lattice, ...], new: tuple[Lattice, ...]) -> Tensor:
    """A kernel on a lattice that has its taps among others."""
    if all(a.size == b.size and a.start == b.start for a, b in zip(old, new, strict=True)):
        return kernel
    framed = kernel.new_zeros([*kernel.shape[:2], *[one.size for one in new]])
    places = [b.places_of(a) for a, b in zip(old, new, strict=True)]
    index: Any = (slice(None), slice(None), *torch.meshgrid(*places, indexing="ij"))
    framed[index] = kernel
    return framed


def dilated(kernel: Tensor, spacing: Sequence[int]) -> Tensor:
    """Zeros between the taps."""
    if all(space == 1 for space in spacing):
        return kernel
    sizes = [(size - 1) * space + 1 for size, space in zip(kernel.shape[2:], spacing, strict=True)]
    wide = kernel.new_zeros([*kernel.shape[:2], *sizes])
    wide[(slice(None), slice(None), *[slice(None, None, space) for space in spacing])] = kernel
    return wide


def full_convolution(outer: Tensor, inner: Tensor, groups: int) -> Tensor:
    """The kernel of outer(inner(x)): [out, mid / groups, *b] and [mid, in / groups, *a] give [out, in / groups, *(a + b - 1)]."""
    rank = outer.dim() - 2
    if rank == 0:
        return torch.bmm(outer.reshape(groups, -1, outer.shape[1]), inner.reshape(groups, -1, inner.shape[1])).reshape(outer.shape[0], -1)
    flipped = outer.flip(tuple(range(2, 2 + rank)))
    padded = F.pad(inner.transpose(0, 1), [pad for size in reversed(outer.shape[2:]) for pad in (size - 1, size - 1)])
    return convolve(padded, flipped, (1,) * rank, (1,) * rank, groups).transpose(0, 1)


def convolve(x: Tensor, weight: Tensor, stride: Ints, dilation: Ints, groups: int) -> Tensor:
    """A conv of as many dimensions as stride has, without padding."""
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
    result: Tensor = run(x, weight, None, stride, 0, dilation, groups)
    return result


def spread(vector: Tensor, rank: int) -> Tensor:
    """A vector of channels, shaped to add to [channels, *places]; what has places already stays."""
    return vector.reshape(-1, *[1] * rank) if vector.dim() == 1 else vector


def divisors(number: int) -> list[int]:
    """All of them, the largest first."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)}, reverse=True)
