"""Formulas on kernels, as rewrites write them: one common frame of taps, fewer groups, one conv after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv_transpose1d, conv_transpose2d, conv_transpose3d, pad

from sparsify_compiler.passes.reparam._lattice import Lattice, compose_lattice, spacing
from sparsify_compiler.passes.reparam._norms import by_input, plus

Frame = tuple[Lattice, ...]
_TRANSPOSED = {1: conv_transpose1d, 2: conv_transpose2d, 3: conv_transpose3d}


@dataclass(frozen=True)
class Kernel:
    """A conv: weight [out, in / groups, ...], bias [out] or None, and where its taps lie along each dimension."""

    weight: Tensor
    bias: Tensor | None
    frame: Frame
    groups: int


def frame_of(size: Sequence[int], stride: Sequence[int], padding: Any, dilation: Sequence[int]) -> Frame:
    """The taps of a conv or pool with that kernel size; padding by name too."""
    lines = []
    for i, (taps, s, d) in enumerate(zip(size, stride, dilation, strict=True)):
        span = d * (taps - 1)
        left, right = {"same": (span // 2, span - span // 2), "valid": (0, 0)}[padding] if isinstance(padding, str) else (padding[i], padding[i])
        lines.append(Lattice(-left, d if taps > 1 else 1, taps, s, left + right - span - 1))
    return tuple(lines)


def common(one: Frame, other: Frame) -> Frame:
    """The smallest frame that holds the taps of both, whose outputs are as many; padded alike on both sides where they are."""
    lines = []
    for a, b in zip(one, other, strict=True):
        hull = a.hull(b)
        even = -hull.start - hull.end - 1  # between the two reaches the number of outputs is the same, since it is for both
        lines.append(replace(hull, reach=sorted((a.reach, even, b.reach))[1]))
    return tuple(lines)


def behind(one: Frame, two: Frame) -> Frame:
    """The taps of conv `two` behind conv `one`."""
    return tuple(compose_lattice(b, a) for a, b in zip(one, two, strict=True))


def border(one: Frame, biased: bool, two: Frame) -> str | None:
    """Why zeros padded between two convs are not what the first gives beyond its border; None where they are, or nothing is padded."""
    pads = tuple(max(line.pads) for line in two)
    if not any(p > 0 for p in pads):
        return None
    found = f"the second pads by {pads} zeros"
    if biased:
        return f"{found} where the first, at the border, gives its bias"
    if all(p <= 0 or min(line.pads) >= line.end - line.start for line, p in zip(one, pads, strict=True)):
        return None
    return f"{found} where the first, {size_of(one)} and padded by {tuple(max(line.pads) for line in one)}, still reaches its input"


def spelled(frame: Frame) -> tuple[Frame, Any]:
    """The frame as one conv can have it, and its padding: alike on both sides, or "same"; where neither fits, with zeros appended."""
    even = tuple(_even(line) for line in frame)
    if even != frame and all(line.stride == 1 and line.reach == -1 and -line.start == (line.end - line.start) // 2 for line in frame):
        return frame, "same"
    return even, tuple(-line.start for line in even)


def placed(kernel: Kernel, frame: Frame, groups: int) -> Tensor:
    """The weight in a frame that holds its taps, for a divisor of its groups."""
    w = regrouped(kernel.weight, kernel.groups, groups)
    for dim, (line, new) in enumerate(zip(kernel.frame, frame, strict=True), start=2):
        w = _dilated(w, dim, spacing(new.step, line))
        before = (line.start - new.start) // new.step
        after = new.size - before - w.shape[dim]
        w = pad(w, [0, 0] * (w.ndim - 1 - dim) + [before, after]) if before or after else w
    return w


def regrouped(w: Tensor, groups: int, fewer: int) -> Tensor:
    """The weight of a grouped conv for a divisor of its groups: the groups that become one are blocks on a diagonal."""
    each = groups // fewer
    if each == 1:
        return w
    eye = torch.eye(each, dtype=w.dtype, device=w.device).reshape([1, each, 1, each, 1, *[1] * (w.ndim - 2)])
    blocks = w.reshape([fewer, each, w.shape[0] // groups, 1, *w.shape[1:]]) * eye
    return blocks.reshape([w.shape[0], each * w.shape[1], *w.shape[2:]])


def composed(one: Kernel, two: Kernel) -> Kernel:
    """Conv `two` behind conv `one`, away from the border."""
    groups = gcd(one.groups, two.groups)
    v, w = regrouped(one.weight, one.groups, groups), regrouped(two.weight, two.groups, groups)
    frame = behind(one.frame, two.frame)
    # a transposed conv lays every tap of the second over the taps of the first that it reads
    rows = w.reshape([groups, w.shape[0] // groups, *w.shape[1:]]).transpose(0, 1).flatten(1, 2)
    apart = [spacing(line.step, b, a.stride) for a, b, line in zip(one.frame, two.frame, frame, strict=True)]
    dilation = [spacing(line.step, a) for a, line in zip(one.frame, frame, strict=True)]
    wide = _TRANSPOSED[len(frame)](rows, v, None, apart, 0, 0, groups, dilation)
    weight = wide.reshape([wide.shape[0], groups, v.shape[1], *wide.shape[2:]]).transpose(0, 1).flatten(0, 1)
    shift = None if one.bias is None else (two.weight * by_input(one.bias, two.weight, two.groups)).flatten(1).sum(1)
    return Kernel(weight, plus(shift, two.bias), frame, groups)


def size_of(frame: Frame) -> str:
    """A kernel's size to read: "3x3"."""
    return "x".join(str(line.size) for line in frame)


def _even(line: Lattice) -> Lattice:
    """Padded alike on both sides, with zeros appended to the kernel where it is not."""
    before, after = line.pads
    both = max(before, after)
    if before == after:
        return line
    step = gcd(line.step if line.size > 1 else 0, both - before, both - after)
    end = line.end + (both - after)
    return replace(line, start=-both, step=step, size=(end + both) // step + 1)


def _dilated(w: Tensor, dim: int, apart: int) -> Tensor:
    """Zeros between the taps."""
    if apart == 1:
        return w
    wide = pad(w.unsqueeze(dim + 1), [0, 0] * (w.ndim - 1 - dim) + [0, apart - 1])
    return wide.flatten(dim, dim + 1).narrow(dim, 0, (w.shape[dim] - 1) * apart + 1)
