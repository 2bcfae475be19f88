"""The family of kernels whose vectors run along rows of x (panel.py) or outputs of a group (rows.py): any structure, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen.kernels import strips
from sparsify_compiler.codegen.kernels.layout import LANES, OUTPUTS, Layout, Prepared, groups_of, prepare, takes
from sparsify_compiler.codegen.kernels.panel import Panel
from sparsify_compiler.codegen.kernels.rows import Rows
from sparsify_compiler.codegen.laid import Laid, Variants, shared_layout
from sparsify_compiler.codegen.vectors import AVX512, Vectors, multiplies_pairs, vectors_of
from sparsify_compiler.target import Target

NAME = "lanes"
FEW_ROWS = {1: 1, 2: 2, 4: 4, 8: 6, 16: 8}  # up to so many rows of x the row-wise kernel wins, by r (measured, Zen 4)
DOT_FROM = 4        # bfloat16 dot products pay from this r on: below, pairing the columns of x costs more than it saves
# Without AVX-512, by lanes of a register and r: registers of rows of x, and rows of a group, whose sums are in registers at a time.
TILES = {8: {16: (1, 8), 8: (1, 8), 4: (2, 4), 2: (4, 2), 1: (2, 1)}, 4: {16: (1, 16), 8: (2, 8), 4: (4, 4), 2: (8, 2), 1: (4, 1)}}
ALONE = 12_000      # vector FMAs below which waking other threads costs more than they bring (about 3 µs)


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of the kernels that can run this op, most promising first."""
    if not takes(op, tensors, dtype) or {"add", "activation"} & set(attributes):
        return []
    if dtype is torch.float32 and min(rows, default=0) > strips.MANY and strips.offer(op, tensors, attributes, dtype, rows, target):
        return []  # of 30 cells measured (Sapphire Rapids) up to 8 % faster than strips in four, else slower, up to 1.7 times: not worth timing
    schedules = catalog.get("kernel", op).SCHEDULES["cpu"]
    r = _vector_rows(attributes.get("r", 1))
    wide = max(rows, default=LANES) > LANES
    options = {"r": r, "dtype": str(dtype).removeprefix("torch.")}
    several = wide and vectors_of(target) == AVX512    # else one tile fits the registers
    return [(_name(op, r, vectors), {**options, "vectors": vectors}) for vectors in (schedules[r] if several else schedules[r][:1])]


def space(op: str, options: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """How else the same weight could be cut: smaller groups, other numbers of vectors. Which is the best is for tuning to find out."""
    groups = {int(options["r"]), max(int(options["r"]) // 2, 1)}
    return [(_name(op, r, vectors), {**options, "r": r, "vectors": vectors}) for r in sorted(groups) for vectors in (1, 2, 4)]


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weight laid out, or its layout with this very bias from `shared`. Raises KernelError."""
    r, vectors = int(options["r"]), int(options["vectors"])

    def lay_out() -> Prepared:
        groups, outputs, inputs = groups_of(op, tensors, attributes)
        return prepare(groups, getattr(torch, str(options["dtype"])), bias, outputs, inputs, r)

    prepared = shared_layout(shared, bias, lay_out, r)
    return Laid(_name(op, r, vectors), options, prepared, _variants(prepared, vectors, target), target)


def _variants(prepared: Prepared, vectors: int, target: Target) -> Variants:
    layout, columns, cut_for = prepared.layout, prepared.columns.numel(), vectors_of(target)
    dot = layout.dtype == "bfloat16" and layout.r >= DOT_FROM and multiplies_pairs(target)
    least, most = (1, OUTPUTS) if cut_for == AVX512 else tile_of(layout, cut_for)
    vectors = vectors if cut_for == AVX512 else least
    found: dict[str, Rows | Panel] = {}
    for word, parallel in (("alone", False), ("together", True)):
        found[f"rows-{word}"] = Rows(layout, parallel)
        found[f"panel{least}-{word}"] = Panel(layout, least, parallel, dot, cut_for, most)
    if vectors > least:
        found[f"panel{vectors}-together"] = Panel(layout, vectors, True, dot)

    def choose(rows: int) -> str:
        if rows <= FEW_ROWS[layout.r]:
            return "rows-alone" if rows * columns < ALONE else "rows-together"
        tiles = -(-rows // LANES)
        if vectors > least and (tiles % vectors == 0 or tiles >= 4 * vectors):
            return f"panel{vectors}-together"
        return f"panel{least}-alone" if tiles * layout.r * columns < ALONE else f"panel{least}-together"

    return Variants(found, choose)


def tile_of(layout: Layout, cut_for: Vectors) -> tuple[int, int]:
    """Registers of rows of x, and rows of a group, at a time. The more of x, the more products for each weight of bfloat16 that is converted."""
    wide = layout.r == OUTPUTS and layout.dtype == "bfloat16" and cut_for.by_element
    return TILES[cut_for.lanes][OUTPUTS // 2 if wide else layout.r]


def _name(op: str, r: int, vectors: int) -> str:
    return f"{op.removeprefix('linear_')}_r{r}v{vectors}"


def _vector_rows(r: int) -> int:
    return max(size for size in (1, 2, 4, 8, 16) if r % size == 0)
