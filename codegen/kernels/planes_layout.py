"""How a sparse convolution lies in memory for kernels/planes.py: groups of r outputs that keep the same inputs, one group after the other.

values    [S * r] float32, the r of an input together
columns   [S] int32: input channel * taps + place in the kernel, over all channels of x; ascending within a visit
visits    [chunks * groups] int32: the group of each visit. Within a chunk and strip, groups come in order of how many columns they have there, so
          that the processor can tell when their loops end: at a dozen columns a visit, guessing wrong would take half of the time
pointers  [chunks * groups + 1] int32 into S: the columns of each visit
bias      [groups * r] float32, zeros where there is none
strips    [n + 1] int32: runs of neighbouring groups of about the same work
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.codegen.kernels.layout import Groups, padded_bias

STRIPS = 8  # at the most


@dataclass(frozen=True)
class Geometry:
    """Of a convolution: (height, width) each, and groups."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @staticmethod
    def of(attributes: Mapping[str, Any], kernel: Sequence[int]) -> Geometry:
        """From an op's attributes and the extents of its kernel."""
        pairs = [kernel, *(attributes[name] for name in ("stride", "padding", "dilation"))]
        return Geometry(*(tuple(int(n) for n in pair) for pair in pairs), int(attributes["groups"]))  # type: ignore[arg-type]

    @property
    def plain(self) -> bool:
        """x can be read as it lies."""
        return self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @cached_property
    def phases(self) -> list[tuple[int, int]]:
        """The (row, column) modulo the strides at which places of the kernel lie."""
        return sorted({(row % self.stride[0], column % self.stride[1]) for row, column in self.places})

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """(row, column) of each place of the kernel in x."""
        return [(y * self.dilation[0], x * self.dilation[1]) for y in range(self.kernel[0]) for x in range(self.kernel[1])]

    def extent(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of y for those of x; below 1 where the kernel does not fit."""
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1  # type: ignore[return-value]
                     for n, p, d, k, s in zip(size, self.padding, self.dilation, self.kernel, self.stride, strict=True))


@dataclass(frozen=True)
class PreparedPlanes:
    """A weight in this layout."""

    r: int
    values: Tensor
    columns: Tensor
    pointers: Tensor
    visits: Tensor
    bias: Tensor
    strips: Tensor
    out_channels: int
    in_channels: int
    chunks: int

    @property
    def resident_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.pointers, self.visits, self.bias, self.strips))


def prepare_planes(groups: Groups, geometry: Geometry, r: int, chunk: int, bias: Tensor | None, out_channels: int, inputs: int,
                   cores: int) -> PreparedPlanes:
    """Lay a weight out.

    groups   of the matrix [out_channels, inputs], inputs = channels of a group * taps; r divides its rows of a group, and the outputs of a group
    chunk    inputs of a chunk; one chunk where there are no more
    cores    processors that will compute it: each takes outputs of its own, which a depthwise convolution then finds in its caches
    """
    values, columns, owner = _rows(groups, r)
    count, chunks = -(-out_channels // r), max(1, -(-inputs // chunk))
    inside = owner < count  # a block row may hang over the last output
    values, columns, owner = values[inside], columns[inside], owner[inside]
    key = (columns // chunk if chunks > 1 else torch.zeros_like(columns)) * count + owner
    strips, counts = _strips(torch.bincount(owner, minlength=count), cores), torch.bincount(key, minlength=chunks * count)
    strip = torch.repeat_interleave(torch.arange(len(strips) - 1), strips.diff().long())
    place = torch.arange(chunks)[:, None] * len(strips) + strip
    visits = torch.argsort(place.reshape(-1) * (inputs + 1) + counts, stable=True)
    order = torch.argsort(torch.argsort(visits)[key] * inputs + columns)
    pointers = pad(counts[visits].cumsum(0), (1, 0))
    channels = inputs * geometry.groups // geometry.taps
    placed = columns + owner * r // max(1, out_channels // geometry.groups) * inputs
    full = padded_bias(bias, out_channels, count * r)
    return PreparedPlanes(r, values[order].float().reshape(-1).contiguous(), placed[order].int(), pointers.int(), (visits % count).int(), full,
                          strips, out_channels, channels, chunks)


def _rows(groups: Groups, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values [S, r], their columns and the number of their group of r outputs."""
    parts = groups.values.shape[1] // r
    owner = torch.repeat_interleave(torch.arange(len(groups.pointers) - 1), groups.pointers.diff())
    split = (owner[:, None] * parts + torch.arange(parts)).reshape(-1)
    return groups.values.detach().reshape(-1, r), groups.columns.repeat_interleave(parts), split


def _strips(counts: Tensor, cores: int) -> Tensor:
    """Cut the groups into a run for each of up to STRIPS cores; a group costs its columns, and something by itself."""
    work = (counts + 2).cumsum(0).double()
    number = min(STRIPS, cores, len(counts))
    cuts = torch.searchsorted(work, work[-1] * torch.arange(1, number) / number, right=False) + 1 if number > 1 else torch.zeros(0, dtype=torch.int64)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts.clamp(max=len(counts)), torch.tensor([len(counts)])])
    return ends.cummax(0).values.int()


def offsets_of(columns: Tensor, geometry: Geometry, size: Sequence[int], plane: int) -> tuple[Tensor, dict[str, int]]:
    """Where in one image of the copy (of x itself where the geometry is plain) each column begins, and the numbers of the copy for x of this size.

    plane  elements from one plane of x to the next
    """
    height, width = geometry.extent(size)
    if geometry.plain:
        return (columns.long() * plane).int(), {"pixels": size[0] * size[1], "pitch": size[1], "rows": size[0], "kinds": 1}
    kinds = {phase: number for number, phase in enumerate(geometry.phases)}
    (down, over), last = geometry.stride, geometry.places[-1]
    pitch, rows = width + last[1] // over, height + last[0] // down
    taps = torch.tensor([kinds[y % down, x % over] * rows * pitch + y // down * pitch + x // over for y, x in geometry.places])
    channel, tap = columns.long() // geometry.taps, columns.long() % geometry.taps
    offsets = channel * (len(kinds) * rows * pitch) + taps[tap]
    return offsets.int(), {"pixels": (height - 1) * pitch + width, "pitch": pitch, "rows": rows, "kinds": len(kinds)}
