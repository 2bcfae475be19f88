"""Convolutions of whole graphs by the kernels over planes (planes.py), for images of one size: all that depends on it is a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen import build, planes
from sparsify_compiler.codegen.kernels.depthwise import Depthwise
from sparsify_compiler.codegen.kernels.finish import needed_finish
from sparsify_compiler.codegen.kernels.layout import padded_bias
from sparsify_compiler.codegen.kernels.planes import NUMBERS, Planes
from sparsify_compiler.codegen.kernels.planes_layout import Geometry, offsets_of
from sparsify_compiler.codegen.vectors import AVX512, vectors_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target


@dataclass(frozen=True)
class LaidPlanes:
    """A convolution laid out for a target: a kernel f(*state, x [B, C, H, W], (other,) y), and its fixed arguments by name."""

    schedule: build.Schedule
    state: Mapping[str, Tensor]


def lay(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None, target: Target, size: Sequence[int],
        pads: Sequence[int], chosen: Mapping[str, Any] | None = None) -> LaidPlanes:
    """Lay a convolution out.

    op, tensors, attributes   as candidates() takes them (runtime.py), the epilogue's included
    size                      [C, H, W] of x
    pads                      zeros at the left, right, top and bottom of x beside the convolution's own padding
    chosen                    options of a kernel over planes (planes.py) that the same weight was bound to: it is cut in the same way
    Raises KernelError where it has no kernel.
    """
    geometry, (left, right, top, bottom) = planes._geometry(tensors, attributes), pads
    down, over = geometry.padding
    geometry = Geometry(geometry.kernel, geometry.stride, (down + top, over + left), geometry.dilation, geometry.groups)
    extent = (size[1] + bottom - top, size[2] + right - left)   # with the padding of the top and left at both sides as large as it is
    finish, parallel = needed_finish(op, attributes), bool(chosen["parallel"]) if chosen else target.cores > 1
    if min(geometry.extent(extent)) < 1:
        raise KernelError(f"images of {size[1]}x{size[2]} are smaller than the kernel", where=op, hint="give the sizes that the model was made for")
    if op == "conv2d" and tensors["weight"].shape[1] == 1 and geometry.groups > 1:
        return _depthwise(tensors["weight"], bias, geometry, finish, target, geometry.extent(extent)[0], parallel)
    chosen, cut_for = chosen or _chosen(op, tensors, attributes, geometry), vectors_of(target)
    vectors = int(chosen["vectors"]) if cut_for == AVX512 else planes.TILES_OF[cut_for.lanes][int(chosen["r"])]
    prepared = planes._prepare(op, chosen, tensors, attributes, bias, geometry, target.cores)
    offsets, numbers = offsets_of(prepared.columns, geometry, extent, size[1] * size[2])
    numbers |= {"groups": prepared.bias.numel() // prepared.r, "chunks": prepared.chunks}
    phases = (torch.tensor(geometry.phases) - torch.tensor(geometry.padding)).int().reshape(-1)
    schedule = Planes(prepared.r, vectors, prepared.chunks > 1, finish, parallel, None if geometry.plain else geometry.stride, cut_for)
    return LaidPlanes(schedule, {"values": prepared.values, "offsets": offsets, "pointers": prepared.pointers, "visits": prepared.visits,
                                 "bias": prepared.bias, "strips": prepared.strips, "phases": phases,
                                 "numbers": torch.tensor([numbers[name] for name in NUMBERS], dtype=torch.int32)})


def _depthwise(weight: Tensor, bias: Tensor | None, geometry: Geometry, finish: Any, target: Target, height: int, parallel: bool) -> LaidPlanes:
    schedule = Depthwise(geometry.kernel, geometry.stride, geometry.dilation, geometry.padding[1], finish, parallel, vectors_of(target))
    pieces = target.cores if height >= planes.FEWEST_ROWS * target.cores else 1
    return LaidPlanes(schedule, {"values": weight.detach().float().reshape(-1).contiguous(), "bias": padded_bias(bias, len(weight), len(weight)),
                                 "numbers": torch.tensor([geometry.padding[0], pieces], dtype=torch.int32)})


def _chosen(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], geometry: Geometry) -> dict[str, Any]:
    """Outputs that are computed together, registers of a tile, inputs of a chunk."""
    dense = op == "conv2d"
    outputs = int(attributes.get("out_features", len(tensors["weight"]) if dense else 0))
    inputs = tensors["weight"][0].numel() if dense else int(attributes["in_features"])
    together = planes.DENSE_ROWS if dense else int(attributes.get("r", 1))
    r = planes._shared_rows(together, outputs, geometry.groups)
    vectors = planes.TILES[r][0]
    chunk = planes.CHUNKS[0] // vectors if r == 1 and inputs >= planes.CHUNKED_FROM else inputs
    return {"layout": planes.LAYOUT, "r": r, "vectors": vectors, "chunk": max(1, chunk)}
