"""A sparse 1×1 convolution in bfloat16 as a linear layer over pixels: with channels last, a pixel is a row of x, and nothing is copied.

It runs on every family of kernels that sparse linear layers run on, AMX tiles among them. float32 has kernels over planes (planes.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.bound import BoundKernel
from sparsify_compiler.codegen.kernels import amx, lanes, strips
from sparsify_compiler.codegen.kernels.planes_layout import Geometry
from sparsify_compiler.errors import InputError, UnknownNameError, nearest
from sparsify_compiler.target import Target

NAME = "pixels"
FAMILIES = {family.NAME: family for family in (amx, strips, lanes)}


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Names and options of the kernels that can run this convolution; rows is the shape of x, [B, C, H, W]."""
    if not op.startswith("conv2d_") or dtype is not torch.bfloat16 or len(rows) != 4 or min(rows) < 1 or not _is_pointwise(attributes):
        return []
    pixels = (rows[0] * rows[2] * rows[3],)
    return [(f"{NAME} {name}", {"kind": family.NAME, **options}) for family in FAMILIES.values()
            for name, options in family.offer(_linear(op), tensors, attributes, dtype, pixels, target)]


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> BoundPixels:
    """The convolution bound to its weight. Raises KernelError."""
    kind = str(options["kind"])
    if kind not in FAMILIES or not _is_pointwise(attributes):
        raise UnknownNameError(f"there is no family {kind!r} for such a convolution", where=op, hint=nearest(kind, FAMILIES))
    layouts = next((made for name, made in shared if name == kind), None)
    if layouts is None:
        shared.append((kind, layouts := []))
    return BoundPixels(BoundKernel(FAMILIES[kind].lay(_linear(op), options, tensors, attributes, bias, target, layouts), files), options)


def _is_pointwise(attributes: Mapping[str, Any]) -> bool:
    geometry = Geometry.of(attributes, attributes["kernel_size"])
    return geometry.plain and geometry.groups == 1


def _linear(op: str) -> str:
    return f"linear_{op.removeprefix('conv2d_')}"


class BoundPixels:
    """A 1×1 convolution by a kernel of a linear layer: x [B, C, H, W] (, other of y's shape) -> y [B, O, H, W], channels last."""

    def __init__(self, kernel: Any, options: Mapping[str, Any]) -> None:
        self._kernel, self.name, self.options = kernel, f"{NAME} {kernel.name}", dict(options)
        self.resident_bytes: int = kernel.resident_bytes

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x of any strides; what is not channels last is copied. Raises InputError."""
        if x.dim() != 4:
            raise InputError(f"expected [B, C, H, W], got {list(x.shape)}", where=self.name)
        rows = x.permute(0, 2, 3, 1)
        y: Tensor = self._kernel(rows) if other is None else self._kernel(rows, other.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)

    def state(self) -> dict[str, Tensor]:
        """The kernel's."""
        return self._kernel.state()  # type: ignore[no-any-return]

    def files(self) -> dict[str, bytes]:
        """The kernel's."""
        return self._kernel.files()  # type: ignore[no-any-return]
