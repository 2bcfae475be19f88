"""The family of kernels for many rows of x, on strips of slices (strip_panel.py): any structure, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.finish import Finish, finish_of, needed_finish
from sparsify_compiler.codegen.kernels.layout import LANES, groups_of, takes
from sparsify_compiler.codegen.kernels.strip_layout import QUAD, SLICE, SMALL, TILE, WIDE, PreparedStrips, group_of, pairs_of, prepare_strips
from sparsify_compiler.codegen.kernels.strip_panel import StripPanel
from sparsify_compiler.codegen.laid import Laid, Variants, shared_layout, workers
from sparsify_compiler.codegen.vectors import Vectors, vectors_of
from sparsify_compiler.target import Target, second_cache

NAME = "strips"
PAIRS_FROM = 4      # outputs that share columns from which bfloat16 is faster where two are multiplied at once (lanes.py, amx.py)
MANY = 8            # up to so many rows of x another family is faster
ALONE = 12_000      # vector FMAs below which waking other threads costs more than they bring (about 3 µs)


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel where it can run this op."""
    if not takes(op, tensors, dtype) or max(rows, default=LANES) <= MANY or finish_of(attributes) is None:
        return []
    if dtype is torch.bfloat16 and int(attributes.get("r", 1)) % PAIRS_FROM == 0 and target.has("avx512bf16"):
        return []
    name = str(dtype).removeprefix("torch.")
    if _by_pairs(op, attributes) and dtype is torch.bfloat16 and target.has("avx512bf16") and not target.has("amx-bf16"):
        return [(_name(op, "pairs"), {"dtype": name, "pairs": True})]
    narrow = group_of(int(attributes.get("r", 1))) == SLICE and second_cache(target) < SMALL
    return [(_name(op), {"dtype": name, **({"block": WIDE} if narrow else {})})]


def _by_pairs(op: str, attributes: Mapping[str, Any]) -> bool:
    """Is it 2:4?"""
    return op == "linear_nm" and (attributes["n"], attributes["m"]) == (2, QUAD)


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weight laid out, or its layout with this very bias from `shared`. Raises KernelError."""
    finish, wide = needed_finish(op, attributes), int(options.get("block", 0))

    def lay_out() -> PreparedStrips:
        groups, outputs, inputs = groups_of(op, tensors, attributes)
        groups = pairs_of(groups) if options.get("pairs") else groups
        return prepare_strips(groups, getattr(torch, str(options["dtype"])), bias, outputs, inputs, target.cores, wide)

    prepared, name = shared_layout(shared, bias, lay_out, wide), _name(op, "pairs" if options.get("pairs") else "strips")
    return Laid(name, options, prepared, _variants(prepared, finish, workers(target), vectors_of(target)), target)


def _variants(prepared: PreparedStrips, finish: Finish, threads: int, cut_for: Vectors) -> Variants:
    products = prepared.values.numel()
    found = {f"strips-{count}": StripPanel(prepared.layout, count, finish, cut_for) for count in {1, threads}}
    return Variants(found, lambda rows: f"strips-{1 if products * -(-rows // LANES) < ALONE else threads}", finish.add)


def _name(op: str, what: str = "strips") -> str:
    return f"{op.removeprefix('linear_')}_{what}{TILE}x{SLICE}"
