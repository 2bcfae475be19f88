"""One affine map behind another: what is exact at the borders, and the common kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsify_compiler.passes.reparam._affine import Affine, checked, flat_shift
from sparsify_compiler.passes.reparam._kernels import dilated, full_convolution, spread, windows
from sparsify_compiler.passes.reparam._lattice import Inexact, Lattice, compose_lattice, spacing


def compose(outer: Affine, inner: Affine, tolerance: float) -> Affine:
    """outer(inner(x)). Raises Inexact where a border forbids it; `tolerance` says when shifts count as equal."""
    beyond = _reads_beyond(outer, inner)
    lattices = tuple(compose_lattice(two, one) for two, one in zip(outer.lattices, inner.lattices, strict=True))
    first, width = _compose_windows(outer, inner)
    shift = _compose_shift(outer, inner, beyond, tolerance)

    def make() -> Tensor:
        return windows(*_kernel(outer, inner, lattices), made.begins(made.groups), made.channels // made.groups)

    made = checked(Affine(inner.channels, first, width, lattices, shift, make, inner.places))
    return made


def _kernel(outer: Affine, inner: Affine, lattices: tuple[Lattice, ...]) -> tuple[Tensor, Tensor]:
    """The rows of the common kernel, and the input channel at which each begins."""
    if bool((outer.width == 1).all()) and all(size == 1 for size in outer.taps):  # each output is a multiple of one of the inner map's
        factor = windows(outer.kernel, outer.begins(outer.groups), outer.first, 1).reshape(-1)
        return inner.kernel[outer.first] * spread(factor, inner.kernel.dim() - 1), inner.begins(inner.groups)[outer.first]
    if inner.diagonal:
        begins, taken = outer.begins(outer.groups), outer.channels // outer.groups
        factors = inner.kernel.reshape(-1)[begins[:, None] + torch.arange(taken)]
        return outer.kernel * factors.reshape(*factors.shape, *[1] * len(outer.lattices)), begins
    groups = math.gcd(outer.groups, inner.groups)
    steps = list(zip(lattices, inner.lattices, outer.lattices, strict=True))
    ours = dilated(inner.rows(groups), [spacing(new.step, one) for new, one, _ in steps])
    theirs = dilated(outer.rows(groups), [spacing(new.step, two, one.stride) for new, one, two in steps])
    common = full_convolution(theirs, ours, groups)
    return common, (torch.arange(outer.outputs) // (outer.outputs // groups)) * (inner.channels // groups)


def _reads_beyond(outer: Affine, inner: Affine) -> bool:
    """Does the outer map read outside of the inner one's outputs? There it finds zeros. Raises Inexact where the inner formula is not zero there."""
    beyond = False
    for two, one, places in zip(outer.lattices, inner.lattices, inner.places, strict=True):
        left, right = max(0, -two.start), max(0, two.pads[1])
        if places is not None:
            between = one.outputs(places)
            right = max(0, (two.outputs(between) - 1) * two.stride + two.end - (between - 1))
        if left and one.end - one.stride >= 0:
            raise Inexact(f"the border: {left} places before the first are read as zeros, where a kernel of {one.size} places gives other values")
        behind = one.reach + 1 + one.start if places is None else one.stride * one.outputs(places) + one.start - places
        if right and behind < 0:
            raise Inexact(f"the border: {right} places after the last are read as zeros, where a kernel of {one.size} places gives other values")
        beyond = beyond or bool(left or right)
    return beyond


def _compose_shift(outer: Affine, inner: Affine, beyond: bool, tolerance: float) -> Tensor:
    rank = len(outer.lattices)
    if not bool(inner.shift.any()):
        return outer.shift
    if not inner.spatial_shift and not beyond:
        constant = outer.kernel.flatten(2).sum(2) if rank else outer.kernel
        moved = torch.bmm(constant.reshape(outer.groups, -1, constant.shape[1]), inner.shift.reshape(outer.groups, -1, 1)).reshape(-1)
        return outer.shift + spread(moved, outer.shift.dim() - 1)
    places = [n for n in inner.output_places if n is not None]
    if len(places) < rank:
        raise Inexact("the border: a shift ends where zeros are padded, and with dynamic sizes its exact form cannot be stored")
    given = inner.shift if inner.spatial_shift else spread(inner.shift, rank).expand(-1, *places)
    return flat_shift(outer(given[None])[0], tolerance)


def _compose_windows(outer: Affine, inner: Affine) -> tuple[Tensor, Tensor]:
    """The input channels that each output of the composition reads."""
    if bool((outer.width == 1).all()):
        return inner.first[outer.first], inner.width[outer.first]
    pairs, which = torch.unique(torch.stack([outer.first, outer.width]), dim=1, return_inverse=True)
    low, high = [], []
    for begin, width in pairs.T.tolist():
        part = slice(begin, begin + width)
        kept = inner.width[part] > 0
        first, last = inner.first[part][kept], (inner.first + inner.width)[part][kept]
        low.append(int(first.min()) if first.numel() else 0)
        high.append(int(last.max()) if last.numel() else 0)
    first, last = torch.tensor(low)[which], torch.tensor(high)[which]
    return first, last - first
