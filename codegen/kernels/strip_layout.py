"""How a sparse weight lies in memory for kernels/strip_panel.py: slices of outputs that are computed together, block of columns by block of columns.

This is SELL-C-sigma (Kreutzer et al., arXiv:1307.6209) within blocks of columns, so that what a block reads of packed x stays in a cache. Outputs
come in groups of r that keep the same columns, groups in strips that a worker takes at a time; within a block and strip, groups are visited in order
of how many columns they have there, `lanes` of them at once: a slice has as many steps as its longest group, and the processor can tell when its loop
ends.

values    [S * lanes * r] float32 or bfloat16: by step, group of the slice, output of the group; 0 where a group has no more columns
columns   [S * lanes] uint8, or int16 for blocks of more than 255 columns: within the block; `block` means "none": every packed x has a 0 there
pointers  [slices + 1] int32 into the steps
visits    [slices * lanes] int32: the first output of each group of a slice, counted within its strip
starts    [strips * blocks + 1] int32 into the slices, blocks of a strip together. Every group is visited in block 0, elsewhere where it has columns
strips    [strips + 1] int32: the first output of each, a multiple of 16
bias      [outputs, up to a multiple of 16] float32, zeros where there is none

Of a 2:4 weight in bfloat16, where a machine multiplies pairs of it, the two that four inputs keep are one value, an int32 word, and the columns are
pairs of inputs: of every four the six that can be kept, one of which is. Packed x holds all six.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.codegen.kernels.layout import OUTPUTS, Groups, padded_bias, split
from sparsify_compiler.codegen.laid import PreparedWeight

TILES = {16: 4, 8: 3, 4: 6}  # registers of rows of x that are multiplied at a time, by lanes of a register
TILE = TILES[16]
SLICE = 4            # outputs that are computed together: TILE * SLICE sums in registers
HELD = 1024          # outputs of a strip, at most: the sums of two for a tile, 512 KiB, stay in L2 between two blocks
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))    # of four inputs
QUAD = 4             # inputs that have those pairs
PAIRED = 96          # columns of a block that are pairs: of 64 inputs
BLOCK = {1: 128, 2: 256, 4: 1024}  # columns of a block, by r: a tile of them fits L1 where each load of x is used r times only, else L2 (measured)
SMALL, WIDE = 3 << 19, 512          # bytes of L2 below which blocks of r = 4 have so many: beside the sums (measured, Zen 4 with 1 MiB)


@dataclass(frozen=True)
class StripLayout:
    """Static facts of a prepared weight.

    r         outputs that share columns: 1, 2 or 4
    weight    dtype of the values: "float32" or "bfloat16"; "int32" of pairs
    dtype     of x and y
    wide      columns of a block where they are not BLOCK's
    """

    r: int
    weight: str
    dtype: str
    wide: int = 0

    @property
    def lanes(self) -> int:
        """Groups of a slice."""
        return SLICE // self.r

    @property
    def paired(self) -> bool:
        """Are columns pairs of inputs?"""
        return self.weight == "int32"

    @property
    def block(self) -> int:
        """Columns of a block."""
        return PAIRED if self.paired else self.wide or BLOCK[self.r]

    @property
    def span(self) -> int:
        """Inputs of a block."""
        return self.block // len(PAIRS) * QUAD if self.paired else self.block

    @property
    def index(self) -> str:
        return "uint8" if self.block < 256 else "int16"


@dataclass(frozen=True)
class PreparedStrips(PreparedWeight):
    """A weight in this layout."""

    STATE: ClassVar[tuple[str, ...]] = ("values", "columns", "pointers", "visits", "starts", "strips", "bias")

    layout: StripLayout
    values: Tensor
    columns: Tensor
    pointers: Tensor
    visits: Tensor
    starts: Tensor
    strips: Tensor
    bias: Tensor
    out_features: int
    in_features: int


def blocks_of(inputs: int, layout: StripLayout) -> int:
    """Blocks of columns; one where there are no columns."""
    return max(1, -(-inputs // layout.span))


def pairs_of(groups: Groups) -> Groups:
    """A 2:4 weight, output by output, with a word for each two that are kept, and pairs of inputs as columns."""
    low, high = groups.columns.view(-1, 2).unbind(1)
    number = torch.zeros(QUAD, QUAD, dtype=torch.int64)
    for at, pair in enumerate(PAIRS):
        number[pair] = at
    words = groups.values.to(torch.bfloat16).view(-1, 2).view(torch.int32)
    return Groups(words, low // QUAD * len(PAIRS) + number[low % QUAD, high % QUAD], groups.pointers // 2)


def group_of(outputs: int) -> int:
    """Outputs of a group, where so many share their columns."""
    return max(size for size in BLOCK if outputs % size == 0)


def prepare_strips(groups: Groups, dtype: torch.dtype, bias: Tensor | None, outputs: int, inputs: int, cores: int, wide: int = 0) -> PreparedStrips:
    """Lay a weight out, or pairs_of() one, for kernels of x in `dtype`, on that many cores. The last group may hang over `outputs`."""
    r = group_of(groups.values.shape[1])
    layout = StripLayout(r, str(groups.values.dtype).removeprefix("torch."), str(dtype).removeprefix("torch."), wide if r == SLICE else 0)
    values, columns, counts = split(groups, r)
    needed, blocks, lanes = -(-outputs // OUTPUTS) * OUTPUTS // r, blocks_of(inputs, layout), layout.lanes
    kept = int(counts[:needed].sum())
    counts = pad(counts[:needed], (0, max(0, needed - len(counts))))
    values, columns, owner = values[:kept], columns[:kept], torch.repeat_interleave(torch.arange(needed), counts)
    strips = _strips(counts, r, cores)

    # Visits: (strip, block) after (strip, block), the longest group first; slices of none are left out, but for block 0, where sums begin.
    block = columns // layout.block
    each = torch.bincount(block * needed + owner, minlength=blocks * needed).view(blocks, needed)
    strip = torch.repeat_interleave(torch.arange(len(strips) - 1), strips.diff() // r)
    cell = strip * blocks + torch.arange(blocks)[:, None]
    order = torch.argsort((cell * (layout.block + 1) + (layout.block - each)).reshape(-1), stable=True)
    length = each.reshape(-1)[order].view(-1, lanes)[:, 0]
    cell_of = cell.reshape(-1)[order].view(-1, lanes)[:, 0]
    used = (length > 0) | (cell_of % blocks == 0)
    pointers = pad((length * used).cumsum(0), (1, 0))

    # Where the columns of each (block, group) go: steps of its slice, in its lane.
    visit = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    key = block * needed + owner
    by_key = torch.argsort(key, stable=True)
    key = key[by_key]
    first = pad(each.reshape(-1).cumsum(0), (1, 0))[:-1]
    rank = torch.arange(kept) - first[key]
    place = (pointers[visit[key] // lanes] + rank) * lanes + visit[key] % lanes
    total = int(pointers[-1]) * lanes
    full_values = values.new_zeros(total, r).index_copy_(0, place, values[by_key])
    full_columns = torch.full((total,), layout.block, dtype=torch.int64).index_copy_(0, place, columns[by_key] % layout.block)
    inside = (order % max(needed, 1)) * r - strips[strip[order % max(needed, 1)]]
    starts = pad(torch.bincount(cell_of[used], minlength=(len(strips) - 1) * blocks).cumsum(0), (1, 0))
    return PreparedStrips(
        layout, full_values.view(-1), full_columns.to(getattr(torch, layout.index)), pad(pointers[1:][used], (1, 0)).int(),
        inside.view(-1, lanes)[used].reshape(-1).int(), starts.int(), strips.int(), padded_bias(bias, outputs, needed * r), outputs, inputs)


def _strips(counts: Tensor, r: int, cores: int) -> Tensor:
    """Cut the groups into runs of about HELD outputs at most and the same work, for each core as many."""
    units = counts.view(-1, OUTPUTS // r).sum(1) + 1
    number = min(len(units), -(-max(1, -(-len(units) * OUTPUTS // HELD)) // cores) * cores)
    work = units.cumsum(0).double()
    cuts = torch.searchsorted(work, work[-1] * torch.arange(1, number) / number) + 1 if number > 1 else torch.zeros(0, dtype=torch.int64)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts.clamp(max=len(units)), torch.tensor([len(units)])]).cummax(0).values
    return ends * OUTPUTS
