"""y = x Wᵀ + bias, dense, with W packed once into the blocks that oneDNN's matmul wants: the dense form that a sparse kernel has to beat.

torch packs W anew at every call of F.linear; with W packed ahead it is the form that torch.compile freezes into a graph. On the machines
seen so far it takes between 1 and 3 times less time than F.linear, most at a few rows of x. What follows the layer, an activation or the
addition of a residual, is computed before y is written where that is asked for.

Bound by: the matrix units from about 64 rows on, the bytes of W below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.pointwise import NONE, Spelled, spell
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target

NAME = "linear"
OPS, LABEL = ("linear",), "dense packed"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the packed form where this build of torch has it for this layer on this machine."""
    if op not in OPS:
        return []
    weight = tensors["weight"]
    fits = weight.dim() == 2 and min(weight.shape) > 0 and weight.dtype is dtype and ("add" not in attributes or "activation" not in attributes)
    return [(LABEL, {"rows": max(rows, default=1)})] if fits and has_packed(weight, target) and spell(attributes) is not None else []


def has_packed(weight: Tensor, target: Target) -> bool:
    """Does this build of torch compute with packed weights of this dtype on this machine?"""
    if target.arch != "x86_64" or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> PackedLinear:
    """The layer with its weight packed, or with the packed weight in `shared`. Raises KernelError."""
    spelled = spell(attributes)
    if not has_packed(tensors["weight"], target) or spelled is None:
        raise KernelError("torch has no packed dense linear for this dtype and machine", where=op, hint="compile the model again here")
    if not shared:
        with torch.no_grad():
            shared.append(torch.ops.mkldnn._reorder_linear_weight(tensors["weight"].detach().contiguous(), int(options["rows"])))
    return PackedLinear(shared[0], bias, options, spelled, "add" if attributes.get("add") else "")


class PackedLinear:
    """A dense layer bound to its packed weight: x [..., K] -> y [..., N], through the activation; or + other [..., N], where it adds.

    weight [N, K] as oneDNN packs it, bias [N] or None; options["rows"] is the number of rows of x that it was packed for. Any other number runs too.
    """

    name = LABEL

    def __init__(self, weight: Tensor, bias: Tensor | None, options: Mapping[str, Any], activation: Spelled = NONE, binary: str = "") -> None:
        self._weight = weight
        self._bias = None if bias is None else bias.detach()
        self.options = dict(options)
        self.resident_bytes = int(torch.ops.mkldnn._nbytes(weight))
        pointwise = torch.ops.mkldnn._linear_pointwise
        self._linear, self._linear_add = pointwise.default, pointwise.binary
        self._activation, self._binary = activation, binary

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if other is not None:
            return self._linear_add(x, other, self._weight, self._bias, self._binary)  # type: ignore[no-any-return]
        return self._linear(x, self._weight, self._bias, *self._activation)  # type: ignore[no-any-return]

    def state(self) -> dict[str, Tensor]:
        """Nothing to store: the layer's own weight is packed again at load."""
        return {}

    def files(self) -> dict[str, bytes]:
        """Nothing to store: the machine code is oneDNN's."""
        return {}
