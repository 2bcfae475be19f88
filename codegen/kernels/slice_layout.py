"""How a weight without blocks lies in memory for the kernels of slices: 16 outputs side by side, step by step.

SELL-C-σ (Kreutzer et al., arXiv:1307.6209, section 2) with C = 16. A slice is 16 outputs, one in each lane of a vector; a step has one kept
weight of each of them. Where an input is, is coded in one of three ways:

gaps     any mask: a byte for each weight, how far its input is behind that of the same lane before (the first: behind input 0). A byte above 127
         only moves on by that much and has no weight: it bridges long gaps, and fills up lanes that keep fewer inputs than their slice
columns  any mask of up to FURTHEST inputs: the input itself in 16 bits, as single loads want it; the first behind the last where there is no weight
places   n of every m inputs: place inside the group in 2 bits (m <= 4) or 4 (m <= 16), those of one lane packed into int32, the first lowest

values    float32 [S, 16]; or, bfloat16, int32 words of two steps each, [S / 2, 16], the first in the low half
codes     gaps: uint8 [S, 16]; columns: int16 [S, 16]; places: int32 [S * bits / 32, 16]
pointers  [slices + 1] int32, into the S steps
order     [slices * 16] int32: the output of each lane, N where there is none
shares    [SHARES + 1] int32, into the slices: parts of about as many bytes, for the threads to take
bias      [slices * 16] float32, by lane
Outputs are sorted by how many inputs they keep, within windows, where that spares steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.codegen.kernels.layout import Groups, padded_bias, split
from sparsify_compiler.codegen.laid import PreparedWeight
from sparsify_compiler.errors import KernelError

LANES = 16
WINDOW = 256        # outputs that may change places: lines of y are then written while they are in the cache
SHARES = 64
SKIP = 128          # the least code that has no weight
LONGEST = 255       # the most that one code moves on
FURTHEST = (1 << 15) - 1    # inputs that 16 bits with a sign can tell apart from none
WIDEST = 16         # inputs of a group that one vector of x holds


@dataclass(frozen=True)
class SliceLayout:
    """Static facts of a prepared weight.

    dtype    of x and y: "float32" or "bfloat16"
    stored   of the weights
    sorted   outputs have changed places
    n, m     of "places"; 0, 0 for others
    direct   inputs are coded as "columns"
    """

    dtype: str
    stored: str
    sorted: bool
    n: int = 0
    m: int = 0
    direct: bool = False

    @property
    def step(self) -> int:
        """Steps that one load of weights covers."""
        return 2 if self.stored == "bfloat16" else 1

    @property
    def bits(self) -> int:
        """Of a place."""
        return 2 if self.m <= 4 else 4

    @property
    def block(self) -> int:
        """Steps of a slice come in multiples of this: whole words of places, and whole groups of inputs."""
        return math.lcm(32 // self.bits, self.n) if self.n else 2


@dataclass(frozen=True)
class PreparedSlices(PreparedWeight):
    """A weight in this layout."""

    STATE: ClassVar[tuple[str, ...]] = ("values", "codes", "pointers", "order", "shares", "bias")

    layout: SliceLayout
    values: Tensor
    codes: Tensor
    pointers: Tensor
    order: Tensor
    shares: Tensor
    bias: Tensor
    out_features: int
    in_features: int

    @property
    def steps(self) -> int:
        """S: vectors of 16 weights, padding included."""
        return int(self.pointers[-1])


def places_fit(n: int, m: int) -> bool:
    """Can n:m be coded as places? The code of a block is unrolled, and those of other n are long."""
    return 1 <= n <= m <= WIDEST and n <= 8


def prepare_gaps(groups: Groups, dtype: torch.dtype, bias: Tensor | None, out_features: int, in_features: int,
                 direct: bool = False) -> PreparedSlices:
    """Lay out any weight whose groups have their columns in ascending order, as gaps or, `direct`, as columns. Raises KernelError."""
    if direct and in_features > FURTHEST:
        raise KernelError(f"{in_features} inputs do not fit into codes of 16 bits", hint="compile the model again here")
    values, codes, counts = (_single if direct else _gapped)(groups, out_features)
    order, ends, changed = _slices(counts, 2)
    lane = torch.empty_like(order[: len(counts)])
    lane[order[order < len(counts)]] = (order < len(counts)).nonzero().squeeze(1)
    begin = counts.cumsum(0) - counts
    first = ends[lane // LANES] * LANES + lane % LANES - begin * LANES   # where an output's first weight lies, less its place in `values`
    places = torch.repeat_interleave(first, counts) + torch.arange(len(values)) * LANES
    total = int(ends[-1]) * LANES
    full_values = values.new_zeros(total).index_copy_(0, places, values)
    none, kind = (in_features, torch.int16) if direct else (LONGEST, torch.uint8)
    full_codes = torch.full((total,), none, dtype=kind).index_copy_(0, places, codes.to(kind))
    layout = SliceLayout(str(dtype)[6:], _stored(values.dtype), changed, direct=direct)
    return _prepared(layout, full_values, full_codes, ends, order, bias, out_features, in_features)


def prepare_places(values: Tensor, offsets: Tensor, n: int, m: int, dtype: torch.dtype, bias: Tensor | None, in_features: int) -> PreparedSlices:
    """Lay out a weight that keeps n of every m inputs: values and offsets [N, K / m * n] (formats/nm.py)."""
    layout = SliceLayout(str(dtype)[6:], _stored(values.dtype), False, n, m)
    outputs, kept = values.shape
    slices, steps = -(-outputs // LANES), -(-kept // layout.block) * layout.block
    size = (0, steps - kept, 0, slices * LANES - outputs)
    full = pad(values.detach(), size).view(slices, LANES, steps).transpose(1, 2).reshape(-1)
    each = 32 // layout.bits
    wide = pad(offsets, size).view(slices, LANES, steps // each, each).transpose(1, 2)
    words = torch.zeros(slices, steps // each, LANES, dtype=torch.int32)
    for i in range(each):
        words |= wide[..., i].int() << (layout.bits * i)
    order = torch.arange(slices * LANES).clamp(max=outputs)
    return _prepared(layout, full, words.view(-1), torch.arange(slices + 1) * steps, order, bias, outputs, in_features)


def _prepared(layout: SliceLayout, values: Tensor, codes: Tensor, ends: Tensor, order: Tensor, bias: Tensor | None,
              outputs: int, inputs: int) -> PreparedSlices:
    values = values.to(getattr(torch, layout.stored))
    if layout.step == 2:
        values = values.view(-1, 2, LANES).transpose(1, 2).flatten().view(torch.int32)
    wanted = torch.arange(SHARES + 1, dtype=torch.float64) * (float(ends[-1]) / SHARES)
    shares = torch.searchsorted(ends.double(), wanted).clamp(max=len(ends) - 1)
    shares[0], shares[-1] = 0, len(ends) - 1
    by_lane = padded_bias(bias, outputs, outputs + 1)
    return PreparedSlices(layout, values, codes, ends.int(), order.int(), shares.int(), by_lane[order], outputs, inputs)


def _stored(dtype: torch.dtype) -> str:
    return "bfloat16" if dtype is torch.bfloat16 else "float32"


def _single(groups: Groups, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and columns output by output, and how many each output has; what hangs over the last output is left out."""
    values, columns, counts = split(groups, 1)
    kept = int(counts[:outputs].sum())
    return values.detach().reshape(-1)[:kept], columns[:kept], pad(counts[:outputs], (0, max(0, outputs - len(counts))))


def _gapped(groups: Groups, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and codes output by output, codes without weight among them; and how many each output has."""
    values, columns, counts = _single(groups, outputs)
    ends = pad(counts.cumsum(0), (1, 0))
    starts = ends[:-1][counts > 0]
    gaps = columns.diff(prepend=columns.new_zeros(1))
    gaps[starts] = columns[starts]
    skips = ((gaps - (SKIP - 1)).clamp(min=0) + LONGEST - 1) // LONGEST
    if not bool(skips.any()):
        return values, gaps.to(torch.uint8), counts
    moved = torch.maximum(skips * SKIP, gaps - (SKIP - 1)) * (skips > 0)     # by all skips of a gap together
    own = torch.repeat_interleave(torch.arange(len(gaps)), skips + 1)        # the weight that each code belongs to
    rank = torch.arange(len(own)) - ((skips + 1).cumsum(0) - (skips + 1))[own]
    each = moved // skips.clamp(min=1)
    last = rank == skips[own]
    codes = torch.where(last, (gaps - moved)[own], each[own] + (rank < (moved - each * skips)[own]))
    running = pad(skips.cumsum(0), (1, 0))
    return values[own] * last, codes.to(torch.uint8), counts + running[ends].diff()


def _slices(counts: Tensor, multiple: int) -> tuple[Tensor, Tensor, bool]:
    """The output of each lane (len(counts) for none), where slices begin and end in steps, and whether outputs have changed places."""
    outputs = len(counts)
    plain = torch.arange(-(-outputs // LANES) * LANES).clamp(max=outputs)
    windows = torch.arange(outputs) // WINDOW
    by_count = torch.argsort(windows * (int(counts.max()) + 1 if outputs else 1) - counts, stable=True)
    ordered = torch.cat([by_count, plain[outputs:]])

    def ends(order: Tensor) -> Tensor:
        longest = pad(counts, (0, 1))[order].view(-1, LANES).amax(1)
        return pad(((longest + multiple - 1) // multiple * multiple).cumsum(0), (1, 0))

    as_is, better = ends(plain), ends(ordered)
    changed = bool(better[-1] < as_is[-1] * 0.98)
    return (ordered, better, True) if changed else (plain, as_is, False)


@dataclass(frozen=True)
class Arguments:
    """The parameters of every kernel of this layout."""

    M: Any
    N: Any
    K: Any
    x: Any
    values: Any
    codes: Any
    pointers: Any
    order: Any
    shares: Any
    bias: Any
    y: Any


def arguments(layout: SliceLayout) -> Arguments:
    """Declare f(x [M, K], values, codes, pointers, order, shares, bias, y [M, N])."""
    from sparsify_compiler.codegen import emit as e

    M, N, K, P, B = (e.int32() for _ in range(5))
    x, values = e.argument((M, K), layout.dtype), e.argument((e.int32(),), "float32" if layout.step == 1 else "int32")
    codes, pointers = e.argument((e.int32(),), "int32" if layout.n else "int16" if layout.direct else "uint8"), e.argument((P,), "int32")
    order, shares = e.argument((B,), "int32"), e.argument((SHARES + 1,), "int32")
    bias, y = e.argument((e.int32(),), "float32"), e.argument((M, N), layout.dtype)
    return Arguments(M, N, K, x, values, codes, pointers, order, shares, bias, y)
