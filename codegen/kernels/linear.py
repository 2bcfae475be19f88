"""y = x Wᵀ + bias, dense, with W packed once into the blocks that oneDNN's matmul wants: the dense form that a sparse kernel has to beat.

torch packs W anew at every call of F.linear; with W packed ahead it is the form that torch.compile freezes into a graph. On the machines
seen so far it takes between 1 and 3 times less time than F.linear, most at a few rows of x.

Bound by: the matrix units from about 64 rows on, the bytes of W below.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...target import Target

NAME = "dense packed"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def available(dtype: torch.dtype) -> bool:
    """Does this build of torch have oneDNN with packed linears for this dtype, on this machine?"""
    if not torch.backends.mkldnn.is_available() or dtype not in DTYPES.values():
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear:
    """A dense layer bound to its packed weight: x [..., K] -> y [..., N].

    weight [N, K], bias [N] or None; rows is the number of rows of x to pack for. Any other number runs too.
    """

    name = NAME

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        with torch.no_grad():
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), rows)
        self._bias = None if bias is None else bias.detach()
        self.options = {"form": NAME, "rows": rows}
        self.resident_bytes = weight.numel() * weight.element_size()
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]

    def state(self) -> dict[str, Tensor]:
        """Nothing to store: the layer's own weight is packed again at load."""
        return {}

    def files(self) -> dict[str, bytes]:
        """Nothing to store: the machine code is oneDNN's."""
        return {}


def bind(tensors: Mapping[str, Tensor], bias: Tensor | None, rows: int, target: Target) -> PackedLinear | None:
    """The packed layer, or None where this torch or target has no such form."""
    weight = tensors["weight"]
    if target.arch != "x86_64" or weight.device.type != "cpu" or weight.dim() != 2 or not available(weight.dtype):
        return None
    return PackedLinear(weight, bias, rows)
