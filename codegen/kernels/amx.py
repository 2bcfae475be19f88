"""The family of kernels on AMX tiles (tiles.py): bfloat16, for blocks of at least 4 outputs, and for dense weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen import permission
from sparsify_compiler.codegen.kernels.finish import Finish, finish_of, needed_finish
from sparsify_compiler.codegen.kernels.layout import dense_groups, groups_of
from sparsify_compiler.codegen.kernels.tile_layout import DEPTH, SIZES, PreparedTiles, prepare_tiles, tile_rows
from sparsify_compiler.codegen.kernels.tiles import WIDTH, Tiles
from sparsify_compiler.codegen.laid import Laid, Variants, shared_layout, workers
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target, host

NAME = "amx"
DENSE = "linear"
FEATURES = ("amx-tile", "amx-bf16", "avx512bf16")
ALONE = 300         # products of tiles below which waking other threads costs more than they bring


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel where it can run this op."""
    weight = tensors.get("weight" if op == DENSE else "values")
    if weight is None or dtype is not torch.bfloat16 or weight.dtype is not dtype or not runs(target) or finish_of(attributes) is None:
        return []
    if op == DENSE:
        fits = weight.dim() == 2 and weight.shape[1] % DEPTH == 0 and weight.numel() > 0
        return [("dense amx", {})] if fits else []
    r = tile_rows(attributes.get("r", 1)) if op in catalog.names("kernel") else None
    return [] if r is None else [(f"{op.removeprefix('linear_')}_amx_r{r}", {})]


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weight laid out, or its layout with this very bias from `shared`. Raises KernelError."""
    if not runs(target):
        raise KernelError("this machine, or its operating system, does not give AMX tiles", where=op, hint="compile the model again here")
    finish = needed_finish(op, attributes, rough=True)

    def lay_out() -> PreparedTiles:
        if op == DENSE:
            return prepare_tiles(dense_groups(tensors["weight"].detach(), max(SIZES)), bias, *tensors["weight"].shape)
        groups, outputs, inputs = groups_of(op, tensors, attributes)
        return prepare_tiles(groups, bias, outputs, inputs)

    prepared = shared_layout(shared, bias, lay_out)
    name = "dense amx" if op == DENSE else f"{op.removeprefix('linear_')}_amx_r{prepared.layout.r}"
    return Laid(name, options, prepared, _variants(prepared, finish, workers(target)), target)


def runs(target: Target) -> bool:
    """Has it tiles, and does the operating system, where it is this machine, give them?"""
    return all(target.has(feature) for feature in FEATURES) and (not target.runs_on(host()) or permission.tiles())


def _variants(prepared: PreparedTiles, finish: Finish, threads: int) -> Variants:
    layout = prepared.layout
    products = prepared.values.numel() // (layout.rows * DEPTH)  # for each 16 rows of x
    found = {f"tiles{across}-{count}": Tiles(layout, across, count, finish) for across in (1, 2) for count in {1, threads}}

    def choose(rows: int) -> str:
        across = 1 if rows <= WIDTH else 2
        return f"tiles{across}-{1 if products * -(-rows // WIDTH) < ALONE else threads}"

    return Variants(found, choose, finish.add)
