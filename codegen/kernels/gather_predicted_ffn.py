"""The family of kernels for FFNs whose neurons are chosen beforehand: one row of x reads those only, more rows run dense on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.bound import as_matrix
from sparsify_compiler.codegen.kernels.gather import columns_of
from sparsify_compiler.codegen.kernels.gathered_ffn import GatheredFfn, are_whole, takes
from sparsify_compiler.codegen.kernels.predicted_ffn_rows import PredictedFfnRows
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select, select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather_predicted_ffn", "predicted_ffn", "gather by prediction"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel."""
    known = op == OP and takes(tensors, attributes, dtype)
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if known else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> GatherPredictedFfn:
    """The kernel with these weights. Raises KernelError."""
    if not are_whole(tensors) or not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored weights do not fit this kernel", where=op, hint="save the model again")
    return GatherPredictedFfn(options, tensors, attributes, bias, files, target)


class GatherPredictedFfn(GatheredFfn):
    """An FFN bound to its weights: x [..., K], scores [..., H] -> y [..., N].

    Where the limit is not stored it comes with every call, [..., 1]. Results do not depend on the number of threads.
    """

    name = LABEL

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
                 files: Mapping[str, bytes], target: Target) -> None:
        import tvm_ffi

        super().__init__(options, tensors, attributes, bias, target)
        schedule = PredictedFfnRows(str(options["dtype"]), self._activation, columns_of(self.width, target), "up" in tensors, target.cores > 1,
                                    vectors_of(target))
        self._kernel = build.load_exported(files, schedule, target) if files else build.load(schedule, target)
        self._limit = tensors["limit"].detach().float().reshape(1) if "limit" in tensors else None
        self._held = self._fixed()
        self._arguments = tuple(tvm_ffi.from_dlpack(tensor) for tensor in self._held)

    def __call__(self, x: Tensor, scores: Tensor, limit: Tensor | None = None) -> Tensor:
        """x [..., K] of the weights' dtype and scores float32 [..., H], any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        if rows != 1:
            return self._many(x, scores, self._tensors["limit"] if limit is None else limit)
        y = x.new_empty(shape)
        least = self._limit if limit is None else limit.reshape(1)
        self._kernel.function(as_matrix(x, 1), least, as_matrix(scores, 1), *self._arguments, as_matrix(y, 1))
        return y

    def empty(self, x: Tensor, *given: Tensor) -> Tensor:
        return super().empty(x)

    def _many(self, x: Tensor, scores: Tensor, limit: Tensor) -> Tensor:
        given = self._tensors
        ups = linear(x, given["up"], given.get("up_bias")) if "up" in given else None
        hidden = select_ffn.hidden(self._activation, linear(x, given["gate"], given.get("gate_bias")), ups)
        return linear(select.op(hidden, limit, scores=scores), self._down, self._bias)

    def files(self) -> dict[str, bytes]:
        """IR, binary and description, for the artefact."""
        return build.export(self._kernel)
