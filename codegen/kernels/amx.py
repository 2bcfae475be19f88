"""The family of kernels on AMX tiles (tiles.py): bfloat16, for blocks of at least 4 outputs, and for dense weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen import permission
from sparsify_compiler.codegen.bound import BoundKernel, Variants
from sparsify_compiler.codegen.kernels.finish import Finish, finish_of
from sparsify_compiler.codegen.kernels.layout import dense_groups
from sparsify_compiler.codegen.kernels.tile_layout import DEPTH, SIZES, PreparedTiles, prepare_tiles, tile_rows
from sparsify_compiler.codegen.kernels.tiles import WIDTH, Tiles
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target

NAME = "amx"
DENSE = "linear"
FEATURES = ("amx-tile", "amx-bf16", "avx512bf16")
ALONE = 300         # products of tiles below which waking other threads costs more than they bring


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel where it can run this op."""
    weight = tensors.get("weight" if op == DENSE else "values")
    if weight is None or dtype is not torch.bfloat16 or weight.dtype is not dtype or not _runs(target) or finish_of(attributes) is None:
        return []
    if op == DENSE:
        fits = weight.dim() == 2 and weight.shape[1] % DEPTH == 0 and weight.numel() > 0
        return [("dense amx", {})] if fits else []
    r = tile_rows(attributes.get("r", 1)) if op in catalog.names("kernel") else None
    return [] if r is None else [(f"{op.removeprefix('linear_')}_amx_r{r}", {})]


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> BoundKernel:
    """Lay the weight out, or take the layout with this very bias from `shared`; build or load the variants. Raises KernelError."""
    if not _runs(target):
        raise KernelError("this machine, or its operating system, does not give AMX tiles", where=op, hint="compile the model again here")
    prepared = next((made for held, made in shared if held is bias), None)
    if prepared is None:
        if op == DENSE:
            groups, (outputs, inputs) = dense_groups(tensors["weight"].detach(), max(SIZES)), tensors["weight"].shape
        else:
            groups = catalog.get("kernel", op).groups(tensors, attributes)
            outputs, inputs = attributes["out_features"], attributes["in_features"]
        prepared = prepare_tiles(groups, bias, outputs, inputs)
        shared.append((bias, prepared))
    name = "dense amx" if op == DENSE else f"{op.removeprefix('linear_')}_amx_r{prepared.layout.r}"
    finish = finish_of(attributes, rough=True)
    if finish is None:
        raise KernelError("no kernel has this activation", where=op, hint="compile the model again here")
    return BoundKernel(name, options, prepared, _variants(prepared, finish), target, files)


def _runs(target: Target) -> bool:
    return all(target.has(feature) for feature in FEATURES) and permission.tiles()


def _variants(prepared: PreparedTiles, finish: Finish) -> Variants:
    layout, threads = prepared.layout, torch.get_num_threads()
    products = prepared.values.numel() // (layout.rows * DEPTH)  # for each 16 rows of x
    found = {f"tiles{across}-{workers}": Tiles(layout, across, workers, finish) for across in (1, 2) for workers in {1, threads}}

    def choose(rows: int) -> str:
        across = 1 if rows <= WIDTH else 2
        return f"tiles{across}-{1 if products * -(-rows // WIDTH) < ALONE else threads}"

    return Variants(found, choose, finish.add)
