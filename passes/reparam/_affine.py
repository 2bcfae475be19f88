"""Affine shift-invariant maps: what a subgraph of convs, norms, sums, pools, pads, splits and concats computes, as one kernel and one shift.

    y[o, i] = shift[o] + sum over c, j of kernel[o, c, j] * x[c, stride * i + start + step * j],    x being zero outside of its places

Maps are composed, summed and stacked by algebra on kernels, in float64. Only the shapes are worked out at once; a kernel is computed when it is
asked for, so that a search can compare the costs of many maps and compute one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsify_compiler.passes.reparam._kernels import Ints, convolve, divisors, frame, spread, windows
from sparsify_compiler.passes.reparam._lattice import Inexact, Lattice

LARGEST = 1 << 27  # values of a kernel: a gigabyte in float64


@dataclass(frozen=True, eq=False)
class Affine:
    """A map from [batch, channels, *places] to [batch, outputs, *places'].

    first, width  int64 [outputs]: each output reads the `width` input channels from `first` on
    lattices      one for each spatial dimension; none for a linear layer
    shift         float64 [outputs], or [outputs, *places'] where it is another at the border
    make          computes the kernel, float64 [outputs, channels / groups, *taps]
    places        sizes of the input's spatial dimensions, None where dynamic
    """

    channels: int
    first: Tensor
    width: Tensor
    lattices: tuple[Lattice, ...]
    shift: Tensor
    make: Callable[[], Tensor]
    places: tuple[int | None, ...]

    @property
    def outputs(self) -> int:
        return self.first.numel()

    @property
    def taps(self) -> Ints:
        return tuple(one.size for one in self.lattices)

    @property
    def spatial_shift(self) -> bool:
        return self.shift.dim() > 1

    @property
    def output_places(self) -> tuple[int | None, ...]:
        return tuple(None if n is None else one.outputs(n) for n, one in zip(self.places, self.lattices, strict=True))

    @cached_property
    def groups(self) -> int:
        """The largest number of equal groups of channels that never mix."""
        for groups in divisors(math.gcd(self.outputs, self.channels)):
            begin = (torch.arange(self.outputs) // (self.outputs // groups)) * (self.channels // groups)
            inside = (self.first >= begin) & (self.first + self.width <= begin + self.channels // groups)
            if bool((inside | (self.width == 0)).all()):
                return groups
        return 1

    def begins(self, groups: int) -> Tensor:
        """The first input channel of each output's group, of that many groups."""
        return (torch.arange(self.outputs) // max(self.outputs // groups, 1)) * (self.channels // groups)

    @property
    def kernel_shape(self) -> Ints:
        return (self.outputs, self.channels // max(self.groups, 1), *self.taps)

    @cached_property
    def kernel(self) -> Tensor:
        return self.make()

    def rows(self, groups: int) -> Tensor:
        """The kernel for another number of groups: [outputs, channels / groups, *taps]."""
        return windows(self.kernel, self.begins(self.groups), self.begins(groups), self.channels // groups)

    @property
    def diagonal(self) -> bool:
        """Does each output only scale and shift its own channel, place by place?"""
        return self.outputs == self.channels == self.groups and all(one == Lattice() for one in self.lattices)

    def __call__(self, x: Tensor) -> Tensor:
        """y [batch, outputs, *places'] of x [batch, channels, *places], float64."""
        return self.linear(x) + spread(self.shift, len(self.lattices))

    def linear(self, x: Tensor) -> Tensor:
        """The map without its shift."""
        pads = [pad for one in reversed(self.lattices) for pad in one.pads]
        padded, kernel = F.pad(x, pads) if pads else x, self.kernel
        if not self.lattices:
            return convolve(padded[..., None], kernel[..., None], (1,), (1,), self.groups)[..., 0]
        return convolve(padded, kernel, tuple(one.stride for one in self.lattices), tuple(one.step for one in self.lattices), self.groups)


def identity(channels: int, places: Sequence[int | None]) -> Affine:
    """y = x."""
    return scale(torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64), places)


def scale(factor: Tensor, shift: Tensor, places: Sequence[int | None], lattices: Sequence[Lattice] | None = None) -> Affine:
    """y[c] = factor[c] * x[c] + shift[c]; with lattices, of places further on."""
    channels = factor.numel()
    taps = tuple(lattices) if lattices is not None else (Lattice(),) * len(places)
    return Affine(channels, torch.arange(channels), torch.ones(channels, dtype=torch.int64), taps, shift.double(),
                  lambda: factor.double().reshape(channels, *[1] * (1 + len(taps))), tuple(places))


def conv(shape: Sequence[int], weight: Callable[[], Tensor], bias: Tensor | None, groups: int, lattices: Sequence[Lattice],
         places: Sequence[int | None]) -> Affine:
    """A conv or, without lattices, a linear, from a weight [out, in / groups, *taps] of that shape that is only computed when it is needed."""
    outputs, taken = int(shape[0]), int(shape[1])
    first = (torch.arange(outputs) // max(outputs // groups, 1)) * taken
    shift = torch.zeros(outputs, dtype=torch.float64) if bias is None else bias.double()
    made = Affine(taken * groups, first, torch.full((outputs,), taken, dtype=torch.int64), tuple(lattices), shift,
                  lambda: windows(weight().double(), first, made.begins(made.groups), made.channels // made.groups), tuple(places))
    return made


def add(one: Affine, other: Affine, sign: float = 1.0) -> Affine:
    """one(x) + sign * other(x). Raises Inexact where they have no common lattice."""
    lattices = _common(one, other)
    first = torch.where(one.width == 0, other.first, torch.where(other.width == 0, one.first, torch.minimum(one.first, other.first)))
    last = torch.maximum(one.first + one.width, other.first + other.width)
    width = torch.where(one.width == 0, other.width, torch.where(other.width == 0, one.width, last - first))
    a, b = _same_shape(one.shift, other.shift)

    def make() -> Tensor:
        return _laid(one, made.lattices, made.groups) + sign * _laid(other, made.lattices, made.groups)

    made = checked(Affine(one.channels, first, width, lattices, a + sign * b, make, one.places))
    return made


def stack(parts: Sequence[Affine]) -> Affine:
    """The outputs of several maps of one input, behind each other. Raises Inexact where they have no common lattice."""
    lattices = parts[0].lattices
    for part in parts[1:]:
        lattices = _common(replace(parts[0], lattices=lattices), part)
    shifts = [part.shift for part in parts]
    if any(part.spatial_shift for part in parts):
        places = next(part.shift.shape[1:] for part in parts if part.spatial_shift)
        shifts = [s if s.dim() > 1 else spread(s, len(places)).expand(-1, *places) for s in shifts]

    def make() -> Tensor:
        begins, taken = torch.split(made.begins(made.groups), [part.outputs for part in parts]), made.channels // made.groups
        return torch.cat([frame(windows(part.kernel, part.begins(part.groups), begin, taken), part.lattices, made.lattices)
                          for part, begin in zip(parts, begins, strict=True)])

    made = checked(Affine(parts[0].channels, torch.cat([p.first for p in parts]), torch.cat([p.width for p in parts]), lattices,
                           torch.cat(shifts), make, parts[0].places))
    return made


def select(whole: Affine, rows: Tensor) -> Affine:
    """Some outputs of a map, by index; -1 for an output that is zero."""
    kept = rows.clamp(min=0)
    zero = rows < 0

    def make() -> Tensor:
        taken = windows(whole.kernel[kept], whole.begins(whole.groups)[kept], made.begins(made.groups), made.channels // made.groups)
        return taken.masked_fill(zero.reshape(-1, *[1] * (taken.dim() - 1)), 0.0)

    shift = whole.shift[kept].masked_fill(zero.reshape(-1, *[1] * (whole.shift.dim() - 1)), 0.0)
    made = checked(Affine(whole.channels, whole.first[kept], whole.width[kept].masked_fill(zero, 0), whole.lattices, shift, make, whole.places))
    return made


def with_shift(whole: Affine, shift: Tensor, tolerance: float) -> Affine:
    """The same map with another shift, written as a vector where it is the same at every place."""
    return replace(whole, shift=flat_shift(shift, tolerance))


def linear_part_is_zero(whole: Affine, dim: int, begin: int, end: int) -> bool:
    """Do the outputs at places begin to end of one dimension read nothing but the zeros outside?"""
    one, places = whole.lattices[dim], whole.places[dim]
    if places is None:
        return False
    return all(not 0 <= one.stride * i + one.start + one.step * j < places for i in range(begin, end) for j in range(one.size))


def flat_shift(shift: Tensor, tolerance: float) -> Tensor:
    """A shift as a vector, where it is the same at every place."""
    if shift.dim() == 1 or shift.numel() == 0:
        return shift
    flat = shift.flatten(1)
    low, high = flat.aminmax(dim=1)
    same = bool((high - low <= tolerance * flat.abs().amax().clamp(min=1e-300)).all())
    return flat.mean(1) if same else shift


def _common(one: Affine, other: Affine) -> tuple[Lattice, ...]:
    """The lattices of a sum."""
    if one.outputs != other.outputs and one.channels != other.channels:
        raise Inexact("the branches have other channels")
    found = []
    for a, b, places in zip(one.lattices, other.lattices, one.places, strict=True):
        if a.stride != b.stride:
            raise Inexact(f"the branches have strides {a.stride} and {b.stride}")
        if a.reach != b.reach and (places is None or a.outputs(places) != b.outputs(places)):
            raise Inexact("the branches have other sizes" if places is not None else "whether the branches' sizes agree depends on the dynamic size")
        found.append(a.hull(b))
    return tuple(found)


def checked(made: Affine) -> Affine:
    """Raises Inexact for a kernel too large to compute."""
    values = math.prod(made.kernel_shape)
    if values > LARGEST:
        raise Inexact(f"the kernel would have {values:.2g} values")
    return made


def _laid(part: Affine, lattices: tuple[Lattice, ...], groups: int) -> Tensor:
    return frame(part.rows(groups), part.lattices, lattices)


def _same_shape(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    rank = max(one.dim(), other.dim()) - 1
    return spread(one, rank) if one.dim() == 1 else one, spread(other, rank) if other.dim() == 1 else other
