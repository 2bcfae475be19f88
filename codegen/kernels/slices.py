"""The family of kernels on slices of 16 outputs, each of which keeps inputs of its own (gemv.py, slice_panel.py): float32 and bfloat16.

Offered with AVX-512 only: where gathers and permutations are made of single loads, as on AVX2 and NEON, rows.py does without them, and computes 1.5
to 2 times as many numbers a cycle (NEON, modelled: benchmarks/arm_cycles.py). A weight that was laid out for AVX-512 runs there all the same.
Where gathers are slow for all that (Zen 4), inputs are coded as columns, which take a byte more a weight and are loaded one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.gemv import Gemv
from sparsify_compiler.codegen.kernels.layout import groups_of, takes
from sparsify_compiler.codegen.kernels.slice_layout import FURTHEST, LANES, PreparedSlices, places_fit, prepare_gaps, prepare_places
from sparsify_compiler.codegen.kernels.slice_panel import SlicePanel
from sparsify_compiler.codegen.laid import Laid, Variants, shared_layout
from sparsify_compiler.codegen.vectors import Vectors, vectors_of
from sparsify_compiler.target import Target, gathers_slowly

NAME = "slices"
MOST = 32           # rows of x to expect up to which these kernels are offered (at 16, up to 1.5 times the speed of strips on large weights)
FEW = {"gaps": 3, "columns": 3, "places": 14}             # up to so many rows each is computed by itself (measured, Sapphire Rapids)
ALONE = {"gaps": 1500, "columns": 1500, "places": 10_000}    # steps of gemv below which waking other threads costs more than they bring (about 4 µs)


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel where it can run this op and few rows are to be expected."""
    if not takes(op, tensors, dtype) or {"add", "activation"} & set(attributes):
        return []
    if attributes.get("r", 1) > 1 or not 0 < max(rows, default=0) <= MOST or not vectors_of(target).masked:
        return []
    coding = "places" if op == "linear_nm" and places_fit(attributes["n"], attributes["m"]) else coding_of(target, int(attributes["in_features"]))
    return [(_name(op, coding), {"dtype": str(dtype).removeprefix("torch."), "coding": coding})]


def coding_of(target: Target, inputs: int) -> str:
    """Of any mask of so many inputs."""
    return "columns" if gathers_slowly(target.features) and inputs <= FURTHEST else "gaps"


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weight laid out, or its layout with this very bias from `shared`. Raises KernelError."""
    coding = str(options["coding"])

    def lay_out() -> PreparedSlices:
        dtype = getattr(torch, str(options["dtype"]))
        if coding == "places":
            return prepare_places(tensors["values"], tensors["offsets"], attributes["n"], attributes["m"], dtype, bias, attributes["in_features"])
        groups, outputs, inputs = groups_of(op, tensors, attributes)
        return prepare_gaps(groups, dtype, bias, outputs, inputs, direct=coding == "columns")

    prepared = shared_layout(shared, bias, lay_out)
    return Laid(_name(op, coding), options, prepared, _variants(prepared, coding, vectors_of(target)), target)


def _variants(prepared: PreparedSlices, coding: str, cut_for: Vectors) -> Variants:
    layout, steps = prepared.layout, prepared.steps
    few, many = (1, 2) if cut_for.masked else (2, 4)    # registers of rows of x
    found: dict[str, Gemv | SlicePanel] = {"gemv-alone": Gemv(layout, False, cut_for), "gemv-together": Gemv(layout, True, cut_for),
                                           "panel1-together": SlicePanel(layout, few, cut_for), "panel2-together": SlicePanel(layout, many, cut_for)}

    def choose(rows: int) -> str:
        if rows <= FEW[coding]:
            return "gemv-alone" if rows * steps < ALONE[coding] else "gemv-together"
        return "panel1-together" if rows <= LANES else "panel2-together"

    return Variants(found, choose)


def _name(op: str, coding: str) -> str:
    return f"{op.removeprefix('linear_')}_{coding}"
