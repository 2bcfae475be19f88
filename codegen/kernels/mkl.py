"""y = x Wᵀ + bias in float32, dense, with W packed once by MKL's sgemm: the other dense form that torch.compile freezes into a graph.

Some 10 % faster than oneDNN's packed form from tens of rows of x on (measured, Sapphire Rapids), and it computes nothing else besides: which of
the two wins is for the measurement of each layer to say. MKL packs for one number of rows of x; any other runs on the weight as it is, as torch
does without packing.

Bound by: the vector units from about 64 rows on, the bytes of W below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.linear import has_packed
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.target import Target

NAME, LABEL = "mkl", "dense packed by MKL"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the form; none where this build of torch has no MKL, for what MKL does not compute, and where the rows will change."""
    if op != "linear":
        return []
    weight = tensors["weight"]
    fits = weight.dim() == 2 and weight.dtype is dtype and min(*weight.shape, *rows) > 0 and not attributes
    return [(LABEL, {"rows": max(rows)})] if fits and _has_mkl(weight, target) else []


def _has_mkl(weight: Tensor, target: Target) -> bool:
    return has_packed(weight, target) and weight.dtype is torch.float32 and bool(torch._C.has_mkl)


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> MklLinear:
    """The layer with its weight packed. Raises KernelError."""
    weight, rows = tensors["weight"], int(options["rows"])
    if not _has_mkl(weight, target) or weight.dim() != 2 or weight.numel() == 0 or rows < 1:
        raise KernelError("torch has no MKL for this layer on this machine", where=op, hint="compile the model again here")
    return MklLinear(weight.detach().contiguous(), bias, options)


class MklLinear:
    """A dense layer bound to its packed weight: x [..., K] -> y [..., N], all float32.

    weight [N, K], bias [N] or None; options["rows"] is the number of rows of x that it is packed for.
    """

    name = LABEL

    def __init__(self, weight: Tensor, bias: Tensor | None, options: Mapping[str, Any]) -> None:
        self._weight, self._bias, self._rows = weight, None if bias is None else bias.detach(), int(options["rows"])
        with torch.no_grad():
            self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, self._rows)
        self._linear, self._features = torch.ops.mkl._mkl_linear.default, weight.shape[1]
        self.options = dict(options)
        # MKL asks for some 8 MB more than it writes to; memory that nobody has touched takes no room.
        self.resident_bytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self._features:  # MKL would read past the end
            raise InputError(f"expected [..., {self._features}], got {list(x.shape)}", where=self.name)
        return self._linear(x, self._packed, self._weight, self._bias, self._rows)  # type: ignore[no-any-return]

    def state(self) -> dict[str, Tensor]:
        """Nothing to store: the layer's own weight is packed again at load."""
        return {}

    def files(self) -> dict[str, bytes]:
        """Nothing to store: the machine code is MKL's."""
        return {}
