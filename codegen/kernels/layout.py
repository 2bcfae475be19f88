"""How a sparse weight lies in memory for our kernels, whatever format it came from: groups of r rows that keep the same columns.

values    [S * r] float32, the r of a column together; for bfloat16 [S / 2 * r] int32 words of two columns' weights, the first in the low half
columns   [S] int16, or int32 above 32766 columns; column K means "none": its weight is 0 and every packed x has a 0 there
pointers  [groups + 1] int32, into S; each group's count is a multiple of `unroll`
bias      [16 * strips] float32, zeros where there is none
The number of groups is a multiple of what a strip of 16 outputs needs, so that kernels never test for a missing group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen.laid import PreparedWeight

DTYPES = (torch.float32, torch.bfloat16)   # of x and y
LANES = 16      # numbers of a vector; LLVM splits it on machines with narrower registers
OUTPUTS = 16    # rows of W whose results are transposed and stored together


@dataclass(frozen=True)
class Layout:
    """Static facts of a prepared weight.

    r       rows that share columns, a power of two up to 16
    dtype   of x, y and the weights: "float32" or "bfloat16"
    index   of the columns: "int16" or "int32"
    """

    r: int
    dtype: str
    index: str

    @property
    def unroll(self) -> int:
        """Columns of a group come in multiples of this: enough independent sums to hide the latency of an FMA."""
        return 4 if self.r <= 2 else 2

    @property
    def step(self) -> int:
        """Columns that one load of weights covers."""
        return 2 if self.dtype == "bfloat16" else 1


@dataclass(frozen=True)
class Groups:
    """A sparse weight as groups of consecutive outputs that keep the same columns: what every format can be brought to.

    values [S, rows of a group], columns [S] int64, pointers [groups + 1] int64 into S.
    """

    values: Tensor
    columns: Tensor
    pointers: Tensor


def dense_groups(weight: Tensor, r: int) -> Groups:
    """All of a weight [N, K], in groups of r outputs; the last group is filled up with zeros."""
    outputs, inputs = weight.shape
    count = -(-outputs // r)
    values = torch.nn.functional.pad(weight, (0, 0, 0, -outputs % r)).view(count, r, inputs).transpose(1, 2).reshape(-1, r)
    return Groups(values, torch.arange(inputs).repeat(count), torch.arange(count + 1) * inputs)


@dataclass(frozen=True)
class Prepared(PreparedWeight):
    """A weight in this layout."""

    layout: Layout
    values: Tensor
    columns: Tensor
    pointers: Tensor
    bias: Tensor
    out_features: int
    in_features: int


def takes(op: str, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Is this a sparse linear for which a format's kernel file gives groups, its weights of the dtype of x or of bfloat16?"""
    return op in catalog.names("kernel") and dtype in DTYPES and "values" in tensors and tensors["values"].dtype in (dtype, torch.bfloat16)


def groups_of(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any]) -> tuple[Groups, int, int]:
    """A stored sparse weight as groups; its outputs and inputs."""
    return catalog.get("kernel", op).groups(tensors, attributes), int(attributes["out_features"]), int(attributes["in_features"])


def index_dtype(inputs: int) -> str:
    """Of columns, one of which, number `inputs`, means "none"."""
    return "int16" if inputs < 32767 else "int32"


def padded_bias(bias: Tensor | None, outputs: int, places: int) -> Tensor:
    """The bias in float32, with zeros behind it and where there is none."""
    full = torch.zeros(places, dtype=torch.float32)
    if bias is not None:
        full[:outputs] = bias.detach().float()
    return full


def prepare(groups: Groups, dtype: torch.dtype, bias: Tensor | None, out_features: int, in_features: int, most: int = OUTPUTS) -> Prepared:
    """Lay a weight out for the kernels of x in `dtype`, in groups of at most so many outputs.

    The last group may hang over out_features; what it computes there is not stored.
    """
    r = max(size for size in (1, 2, 4, 8, 16) if groups.values.shape[1] % size == 0 and size <= max(most, 1))
    layout = Layout(r, str(dtype).removeprefix("torch."), index_dtype(in_features))
    strips = -(-out_features // OUTPUTS)
    full_values, full_columns, ends = padded_groups(groups, r, strips * (OUTPUTS // r), layout.unroll, in_features)
    full_values = full_values.to(dtype)
    if dtype == torch.bfloat16:
        full_values = full_values.view(-1, 2, r).transpose(1, 2).flatten().view(torch.int32)
    return Prepared(layout, full_values.view(-1), full_columns.to(getattr(torch, layout.index)),
                    ends.to(torch.int32), padded_bias(bias, out_features, strips * OUTPUTS), out_features, in_features)


def padded_groups(groups: Groups, r: int, needed: int, multiple: int, none: int) -> tuple[Tensor, Tensor, Tensor]:
    """`needed` groups of r outputs, the columns of each filled up to a multiple with column `none` of weight 0.

    Returns values [S, r] in their dtype, columns [S] int64, and pointers [needed + 1] int64 into S.
    """
    values, columns, counts = split(groups, r)
    kept = int(counts[:needed].sum())  # a block row may hang over the last outputs
    values, columns, counts = values[:kept], columns[:kept], torch.nn.functional.pad(counts[:needed], (0, max(0, needed - len(counts))))
    padded = (counts + multiple - 1) // multiple * multiple
    ends = padded.cumsum(0)
    total = int(padded.sum())
    places = torch.arange(kept) + torch.repeat_interleave((ends - padded) - (counts.cumsum(0) - counts), counts)
    full_values = values.new_zeros(total, r).index_copy_(0, places, values)
    full_columns = torch.full((total,), none, dtype=torch.int64).index_copy_(0, places, columns)
    return full_values, full_columns, torch.nn.functional.pad(ends, (1, 0))


def split(groups: Groups, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each group into groups of r outputs with the same columns; counts instead of pointers."""
    counts, parts = groups.pointers.diff(), groups.values.shape[1] // r
    if parts == 1:
        return groups.values, groups.columns, counts
    group = torch.repeat_interleave(torch.arange(len(counts)), counts)
    owner = (group[:, None] * parts + torch.arange(parts)).reshape(-1)
    order = torch.argsort(owner, stable=True)
    return groups.values.reshape(-1, r)[order], groups.columns.repeat_interleave(parts)[order], counts.repeat_interleave(parts)


@dataclass(frozen=True)
class Arguments:
    """The parameters of every kernel of this layout."""

    M: Any
    N: Any
    K: Any
    x: Any
    values: Any
    columns: Any
    pointers: Any
    bias: Any
    y: Any
    other: Any = None       # what is added to y, where something is


def arguments(layout: Layout) -> Arguments:
    """Declare f(x [M, K], values, columns, pointers, bias, y [M, N])."""
    from sparsify_compiler.codegen import emit as e

    M, N, K, S, P, B = (e.int32() for _ in range(6))
    x = e.argument((M, K), layout.dtype)
    values = e.argument((e.int32(),), "float32" if layout.dtype == "float32" else "int32")
    columns, pointers = e.argument((S,), layout.index), e.argument((P,), "int32")
    bias, y = e.argument((B,), "float32"), e.argument((M, N), layout.dtype)
    return Arguments(M, N, K, x, values, columns, pointers, bias, y)


def weights_of(a: Arguments, layout: Layout, first: Any, ahead: int, row: Any, lanes: int = 1) -> Any:
    """float32 weight(s) of column number first + ahead of a group (first is even): of one row, or of `lanes` neighbours."""
    from sparsify_compiler.codegen import emit as e

    if layout.dtype == "float32":
        return e.load(a.values, (first + ahead) * layout.r + row, lanes=lanes)
    word = e.cast_to("uint32", e.load(a.values, (e.floordiv(first, 2) + ahead // 2) * layout.r + row, lanes=lanes), lanes)
    return (e.upcast_high if ahead % 2 else e.upcast_low)(word, lanes)


def factors(a: Arguments, layout: Layout, first: Any, count: int, part: Any, rows: int) -> Callable[[int, int], Any]:
    """Some rows' weights, from row `part` on, of `count` columns of a group from `first` on (even), in all lanes: weight(column, row)."""
    from sparsify_compiler.codegen import emit as e

    width, r, step = e.lanes(), layout.r, layout.step
    if not e.vectors().by_element:
        return lambda u, row: e.let(e.broadcast(weights_of(a, layout, first, u, row if isinstance(part, int) else part + row), width))
    at, apart = e.let((first if step == 1 else e.floordiv(first, 2)) * r + part), rows if rows == r else 0    # loads may go over several columns
    total = count // step * rows if apart else rows
    runs = [(column * r, i) for column in range(1 if apart else count // step) for i in range(0, total, width)]
    loaded = {}
    for begin, i in runs:
        lanes = min(width, total - i)
        word = e.let(e.load(a.values, at + begin + i, lanes=lanes))
        loaded[begin, i // width] = [(word, lanes)] if step == 1 else [(e.let(half), lanes) for half in e.upcast_pairs(word, lanes)]

    def weight(u: int, row: int) -> Any:
        vector, lane = divmod(u // step * apart + row, width)
        found, lanes = loaded[0 if apart else u // step * r, vector][u % step]
        return e.let(e.broadcast(e.lane(found, lane) if lanes > 1 else found, width))

    return weight


def pairs(a: Arguments, layout: Layout, first: Any, count: int, part: Any, rows: int) -> Callable[[int, int], Callable[[Any, Any], Any]]:
    """The same of bfloat16, two columns' weights in a word: weight(pair of columns, row)(sums, inputs) are the sums with what they give."""
    from sparsify_compiler.codegen import emit as e

    width, start, r = e.lanes(), e.let(e.floordiv(first, 2)), layout.r
    if not e.vectors().by_element:
        def spread(u: int, row: int) -> Callable[[Any, Any], Any]:
            word = e.let(e.broadcast(e.load(a.values, (start + u) * r + part + row), width))
            return lambda total, x: e.external(e.vector_type("float32", width), "dot_bf16", total, x, word)

        return spread
    loaded = {(u, row): e.let(e.load(a.values, (start + u) * r + part + row, lanes=width))
              for u in range(count // 2) for row in range(0, rows, width)}

    def lane(u: int, row: int) -> Callable[[Any, Any], Any]:
        return lambda total, x: e.external(e.vector_type("float32", width), f"dot_bf16_{row % width}", total, x, loaded[u, row - row % width])

    return lane


def pack_rows(a: Arguments, packed: Any, panels: Any, vectors: int, parallel: bool) -> None:
    """packed[panel][column][row] = x[row, column], as float32 or as the bits of bfloat16, and zeros in column K.

    Rows past the last repeat it: their sums are not stored.
    """
    from sparsify_compiler.codegen import emit as e

    def narrow(value: Any, lanes: int) -> Any:
        return e.upper_half(value, lanes) if str(packed.dtype) == "uint16" else value

    width = e.lanes()
    rows = vectors * width
    blocks = e.let(e.floordiv(a.K, width) + 1)
    with e.loop(panels * blocks, parallel=parallel) as task:
        panel, first = e.let(e.floordiv(task, blocks)), e.let(e.floormod(task, blocks) * width)
        with e.loop(vectors) as v:
            row = e.let(panel * rows + v * width)
            to = e.let((panel * (a.K + 1) + first) * rows + v * width)

            def whole(row: Any = row, to: Any = to, first: Any = first) -> None:
                lines = [e.let(e.read_float(a.x, e.minimum(row + i, a.M - 1), first, lanes=width)) for i in range(width)]
                for k, column in enumerate(e.transpose(lines)):
                    e.store(packed, narrow(column, width), to + k * rows, lanes=width)

            def part(row: Any = row, to: Any = to, first: Any = first) -> None:
                with e.loop(a.K - first) as k, e.loop(width) as i:
                    e.store(packed, narrow(e.read_float(a.x, e.minimum(row + i, a.M - 1), first + k), 1), to + k * rows + i)
                e.store(packed, narrow(e.broadcast(e.zero(), width), width), to + (a.K - first) * rows, lanes=width)

            e.choose(first + width <= a.K, whole, part)
