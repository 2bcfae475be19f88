"""The family of kernels for gated FFNs that select their neurons: one row of x reads those only, more rows run dense on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.codegen.bound import as_matrix
from sparsify_compiler.codegen.kernels.ffn_rows import FfnRows
from sparsify_compiler.codegen.kernels.gather import Gathering, columns_of, load_both
from sparsify_compiler.codegen.kernels.gathered_ffn import GatheredFfn, are_whole, takes
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather_ffn", "select_ffn", "gather by neuron"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for FFNs with a gate and a stored limit."""
    known = op == OP and {"up", "limit"} <= set(tensors) and takes(tensors, attributes, dtype)
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if known else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> GatherFfn:
    """The kernel with these weights. Raises KernelError."""
    if not are_whole(tensors) or not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored weights do not fit this kernel", where=op, hint="save the model again")
    return GatherFfn(options, tensors, attributes, bias, files, target)


class GatherFfn(GatheredFfn, Gathering):
    """An FFN bound to its weights: x [..., K] -> y [..., N]. Results do not depend on the number of threads."""

    name = LABEL

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
                 files: Mapping[str, bytes], target: Target) -> None:
        import tvm_ffi

        super().__init__(options, tensors, attributes, bias, target)
        schedule = FfnRows(str(options["dtype"]), self._activation, columns_of(self.width, target), "scale" in tensors, target.cores > 1,
                           vectors_of(target))
        self._kernel, self._select = load_both(schedule, target, files)
        scale = self._tensors["scale"].float() if "scale" in tensors else torch.zeros(1, dtype=torch.float32)
        self._held = [self._tensors["limit"].float().reshape(1), scale, *self._fixed()]
        self._arguments = tuple(tvm_ffi.from_dlpack(tensor) for tensor in self._held)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] of the weights' dtype, any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        if rows != 1:
            return self._many(x)
        y = x.new_empty(shape)
        self._kernel.function(as_matrix(x, 1), *self._arguments, as_matrix(y, 1))
        return y

    def _many(self, x: Tensor) -> Tensor:
        given = self._tensors
        gates = select_ffn.ACTIVATIONS[self._activation](linear(x, given["gate"], given.get("gate_bias"))).flatten(0, -2)
        if not gates.shape[0]:
            return x.new_empty((*x.shape[:-1], self.out_features))
        chosen = torch.empty_like(gates)
        limit, scale = self._arguments[:2]
        self._select.function(gates, limit, scale, scale, chosen)
        hidden = chosen.view((*x.shape[:-1], -1)) * select_ffn.raised(self._activation, linear(x, given["up"], given.get("up_bias")))
        return linear(hidden, self._down, self._bias)
