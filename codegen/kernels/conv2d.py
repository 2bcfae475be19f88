"""A convolution over one, two or three dimensions, dense, with its weight packed once into the blocks that oneDNN wants; x and y channels last.

torch packs the weight anew at every call and, for x in its usual layout, x and y too. With the weight packed ahead it is the form that
torch.compile freezes into a graph. The addition of a residual and an activation are computed before y is written where that is asked for.

Bound by: the matrix units where there are many channels; the bytes of x and y for a depthwise convolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.linear import LABEL, has_packed
from sparsify_compiler.codegen.kernels.pointwise import NONE, spell
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target

NAME = "conv2d"
OPS = ("conv1d", "conv2d", "conv3d")


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the packed form where this build of torch has it for this layer on this machine.

    rows  the shape of x to expect, [batch, channels, ...]
    """
    if op not in OPS or "layout" in attributes:  # of those, planes.py knows
        return []
    weight = tensors["weight"]
    fits = 3 <= weight.dim() <= 5 and len(rows) == weight.dim() and weight.dtype is dtype and min(*rows, *weight.shape) > 0
    return [(LABEL, {"input_size": list(rows)})] if fits and has_packed(weight, target) and takes(weight, attributes) else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> PackedConv:
    """The layer with its weight packed, or with the packed weight in `shared`. Raises KernelError."""
    weight, size = tensors["weight"], [int(n) for n in options["input_size"]]
    if not has_packed(weight, target) or not takes(weight, attributes) or len(size) != weight.dim() or min(size) < 1:
        raise KernelError("torch has no packed dense convolution for this dtype and machine", where=op, hint="compile the model again here")
    try:
        return PackedConv(weight, bias, attributes, size, options, shared)
    except RuntimeError as error:  # oneDNN's own, for sizes that do not go together
        raise KernelError(f"the weight cannot be packed for an input of {size}: {error}", where=op, hint="compile the model again here") from error


def takes(weight: Tensor, attributes: Mapping[str, Any]) -> bool:
    """Does torch let oneDNN compute this epilogue, after an addition none but relu, and does oneDNN survive the geometry?

    Where a whole window can lie in the padding it ends the process now and then (torch 2.13, brgemm; channels last, eager convolutions too).
    """
    fuses = spell(attributes) is not None and ("add" not in attributes or attributes.get("activation", "relu") == "relu")
    windows = zip(weight.shape[2:], attributes["padding"], attributes["dilation"], strict=True)
    return fuses and all(int(padding) <= (kernel - 1) * int(dilation) for kernel, padding, dilation in windows)


class PackedConv:
    """A convolution bound to its packed weight: x [N, C, ...], + other of y's shape where it adds -> y [N, O, ...], channels last.

    weight [O, C/groups, ...], bias [O] or None; attributes are stride, padding and dilation (a number a dimension), groups, and the epilogue's.
    size is the shape of x that the weight is packed for. Any other batch and extent run too.
    """

    name = LABEL

    def __init__(self, weight: Tensor, bias: Tensor | None, attributes: Mapping[str, Any], size: list[int], options: Mapping[str, Any],
                 shared: list[Any]) -> None:
        padding, stride, dilation = ([int(n) for n in attributes[name]] for name in ("padding", "stride", "dilation"))
        groups, self._flat = int(attributes["groups"]), weight.dim() == 3
        if self._flat:  # oneDNN packs for two dimensions and more: a line is a plane of height 1
            padding, stride, dilation = [0, *padding], [1, *stride], [1, *dilation]
        packed = shared[0] if shared else None
        if packed is None:
            with torch.no_grad():
                given = weight.detach().contiguous()
                given, size = (given.unsqueeze(2), [*size[:2], 1, size[2]]) if self._flat else (given, size)
                packed = torch.ops.mkldnn._reorder_convolution_weight(given, padding, stride, dilation, groups, size)
                shared.append(packed)
        self.options = dict(options)
        self.resident_bytes = int(torch.ops.mkldnn._nbytes(packed))
        bias = None if bias is None else bias.detach()
        activation, numbers, algorithm = spell(attributes) or NONE
        pointwise, fixed = torch.ops.mkldnn._convolution_pointwise, (packed, bias, padding, stride, dilation, groups)
        self._conv, self._alone = pointwise.default, (*fixed, activation, numbers, algorithm)
        unary = (None, [], None) if activation == "none" else (activation, numbers, algorithm)
        self._conv_add, self._added = pointwise.binary, (*fixed, "add", 1.0, *unary)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self._flat:
            return self._line(x, other)
        if other is not None:
            return self._conv_add(x, other, *self._added)  # type: ignore[no-any-return]
        return self._conv(x, *self._alone)  # type: ignore[no-any-return]

    def _line(self, x: Tensor, other: Tensor | None) -> Tensor:
        plane = x.unsqueeze(2)
        y: Tensor = self._conv(plane, *self._alone) if other is None else self._conv_add(plane, other.unsqueeze(2), *self._added)
        return y.squeeze(2)

    def state(self) -> dict[str, Tensor]:
        """Nothing to store: the layer's own weight is packed again at load."""
        return {}

    def files(self) -> dict[str, bytes]:
        """Nothing to store: the machine code is oneDNN's."""
        return {}
