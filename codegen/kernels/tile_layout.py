"""How a sparse bfloat16 weight lies in memory for the AMX kernel: groups of r outputs that keep the same inputs, in chunks of 32 inputs.

values    [chunks, r, 32] bfloat16: a chunk is one or two AMX tiles, rows are outputs
columns   [chunks * 32] int16, or int32 above 32766 columns; column K means "none": its weight is 0 and the packed x has a 0 there.
          Where every chunk is a run of 32 neighbours from a multiple of 32 on (`run`): [chunks], the first of them divided by 32
pointers  [groups + 1] int32, in chunks
bias      [groups * r] float32, zeros where there is none
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.layout import Arguments, Groups, index_dtype, padded_bias, padded_groups
from sparsify_compiler.codegen.laid import PreparedWeight
from sparsify_compiler.errors import KernelError

DEPTH = 32     # inputs of a chunk: the pairs of bfloat16 in 64 bytes of a tile's row, twice
SIZES = (32, 16, 8, 4)   # outputs of a group that the kernel takes


@dataclass(frozen=True)
class TileLayout:
    """Static facts of a prepared weight.

    r       outputs that share columns: 4, 8, 16 or 32
    index   of the columns: "int16" or "int32"
    run     every chunk is 32 neighbouring inputs
    """

    r: int
    index: str
    run: bool
    dtype = "bfloat16"

    @property
    def rows(self) -> int:
        """Outputs in one tile."""
        return min(self.r, 16)

    @property
    def tiles(self) -> int:
        """Tiles of one chunk."""
        return self.r // self.rows


@dataclass(frozen=True)
class PreparedTiles(PreparedWeight):
    """A weight in this layout."""

    layout: TileLayout
    values: Tensor
    columns: Tensor
    pointers: Tensor
    bias: Tensor
    out_features: int
    in_features: int


def tile_rows(r: int) -> int | None:
    """Outputs of a group for a structure whose blocks have r of them; None where the tiles would be too empty to pay."""
    return next((size for size in SIZES if r % size == 0), None)


def prepare_tiles(groups: Groups, bias: Tensor | None, out_features: int, in_features: int) -> PreparedTiles:
    """Lay a weight out for the AMX kernel. The last group may hang over out_features; what it computes there is not stored.

    Raises KernelError where the structure has no r for it.
    """
    r = tile_rows(groups.values.shape[1])
    if r is None:
        raise KernelError(f"needs blocks of a multiple of {SIZES[-1]} outputs, got {groups.values.shape[1]}")
    needed = -(-out_features // r)
    values, columns, ends = padded_groups(groups, r, needed, DEPTH, in_features)
    chunks = columns.view(-1, DEPTH)
    run = in_features % DEPTH == 0 and bool((chunks[:, 0] % DEPTH == 0).all()) and bool((chunks.diff(dim=1) == 1).all())
    layout = TileLayout(r, index_dtype(in_features), run)
    stored = chunks[:, 0] // DEPTH if run else columns
    return PreparedTiles(layout, values.to(torch.bfloat16).view(-1, DEPTH, r).transpose(1, 2).flatten(), stored.to(getattr(torch, layout.index)),
                         (ends // DEPTH).to(torch.int32), padded_bias(bias, out_features, needed * r), out_features, in_features)


def tile_arguments(layout: TileLayout, add: bool) -> Arguments:
    """Declare f(x [M, K], values, columns, pointers, bias, y [M, N]), other [M, N] before y where there is one."""
    from sparsify_compiler.codegen import emit as e

    M, N, K, S, P, B, V = (e.int32() for _ in range(7))
    x, values = e.argument((M, K), "bfloat16"), e.argument((V,), "bfloat16")
    columns, pointers = e.argument((S,), layout.index), e.argument((P,), "int32")
    bias = e.argument((B,), "float32")
    other = e.argument((M, N), "bfloat16") if add else None
    return Arguments(M, N, K, x, values, columns, pointers, bias, e.argument((M, N), "bfloat16"), other)
