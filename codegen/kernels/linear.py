"""y = x Wᵀ + bias, dense, with W packed once into the blocks that oneDNN's matmul wants: the dense form that a sparse kernel has to beat.

torch packs W anew at every call of F.linear; with W packed ahead it is the form that torch.compile freezes into a graph. On the machines
seen so far it takes between 1 and 3 times less time than F.linear, most at a few rows of x.

Bound by: the matrix units from about 64 rows on, the bytes of W below.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsify_compiler.target import Target

OP, NAME = "linear", "dense packed"


def runs(tensors: Mapping[str, Tensor], dtype: torch.dtype, target: Target) -> bool:
    """Does this build of torch have packed linears for this weight and dtype of x, on this machine?"""
    weight = tensors["weight"]
    if target.arch != "x86_64" or weight.device.type != "cpu" or weight.dim() != 2 or weight.dtype is not dtype:
        return False
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
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
        self.options = {"rows": rows}
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
