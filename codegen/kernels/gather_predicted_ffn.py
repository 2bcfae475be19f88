"""The family of kernels for FFNs whose neurons are chosen beforehand: one row of x reads those only, more rows run dense on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.bound import BoundLayer, as_matrix
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.codegen.kernels.gather import ROUND, columns_of, in_order
from sparsify_compiler.codegen.kernels.gather_rows import LANES
from sparsify_compiler.codegen.kernels.layout import DTYPES, padded_bias
from sparsify_compiler.codegen.kernels.predicted_ffn_rows import PredictedFfnRows
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select, select_ffn
from sparsify_compiler.pages import resident
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather_predicted_ffn", "predicted_ffn", "gather by prediction"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for machines whose vectors can be compressed, and sizes that are whole vectors."""
    if op != OP or dtype not in DTYPES or not target.has("avx512f") or any(t.dtype is not dtype for t in _weights(tensors).values()):
        return []
    hidden, inputs = tensors["gate"].shape
    step = LANES * (2 if dtype is torch.bfloat16 else 1)
    fits = hidden % LANES == 0 and inputs % step == 0 and min(hidden, inputs, tensors["down"].shape[1]) > 0
    known = attributes["activation"] in ACTIVATIONS and attributes["activation"] in select_ffn.ACTIVATIONS
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if fits and known else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> GatherPredictedFfn:
    """The kernel with these weights. Raises KernelError."""
    gate, down = tensors["gate"], tensors["down"]
    whole = gate.dim() == down.dim() == 2 and tensors.get("up", gate).shape == gate.shape and down.shape[0] == gate.shape[0]
    if not whole or not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored weights do not fit this kernel", where=op, hint="save the model again")
    return GatherPredictedFfn(options, tensors, attributes, bias, files, target)


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in ("gate", "up", "down") if name in tensors}


class GatherPredictedFfn(BoundLayer):
    """An FFN bound to its weights gate and up [H, K], down [H, N]: x [..., K], scores [..., H] -> y [..., N].

    Where the limit is not stored it comes with every call, [..., 1]. Results do not depend on the number of threads.
    """

    name = LABEL

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
                 files: Mapping[str, bytes], target: Target) -> None:
        import tvm_ffi

        self.options, self.target, self._activation = dict(options), target, str(attributes["activation"])
        self._tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        self._bias = None if bias is None else bias.detach()
        self._dtype, self.in_features, self.out_features = tensors["gate"].dtype, tensors["gate"].shape[1], tensors["down"].shape[1]
        width = -(-self.out_features // ROUND) * ROUND
        down = self._tensors["down"]
        self._tensors["down"] = resident(down if width == self.out_features else pad(down, (0, width - self.out_features)))
        self._down = self._tensors["down"][:, : self.out_features].t()
        schedule = PredictedFfnRows(str(options["dtype"]), self._activation, columns_of(width, target), "up" in tensors, target.cores > 1)
        self._kernel = build.load_exported(files, schedule, target) if files else build.load(schedule, target)
        self._limit = tensors["limit"].detach().float().reshape(1) if "limit" in tensors else None
        self._held = self._fixed(padded_bias(self._bias, self.out_features, width))
        self._arguments = tuple(tvm_ffi.from_dlpack(tensor) for tensor in self._held)

    def _fixed(self, total: Tensor) -> list[Tensor]:
        """The kernel's arguments between the scores and y."""
        given, hidden = self._tensors, self._tensors["gate"].shape[0]
        words = {name: weight if self._dtype is torch.float32 else weight.view(torch.int32) for name, weight in _weights(given).items()}
        up = words.get("up", words["gate"][:1])
        biases = [given[name].float() if name in given else torch.zeros(hidden, dtype=torch.float32) for name in ("gate_bias", "up_bias")]
        return [words["gate"], up, *biases, words["down"], in_order(total, self._dtype)]

    def __call__(self, x: Tensor, scores: Tensor, limit: Tensor | None = None) -> Tensor:
        """x [..., K] of the weights' dtype and scores float32 [..., H], any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        if rows != 1:
            return self._many(x, scores, self._tensors["limit"] if limit is None else limit)
        y = x.new_empty(shape)
        least = self._limit if limit is None else limit.reshape(1)
        self._kernel.function(as_matrix(x, 1), as_matrix(scores, 1), least, *self._arguments, as_matrix(y, 1))
        return y

    def empty(self, x: Tensor, *given: Tensor) -> Tensor:
        return super().empty(x)

    def _many(self, x: Tensor, scores: Tensor, limit: Tensor) -> Tensor:
        given = self._tensors
        ups = linear(x, given["up"], given.get("up_bias")) if "up" in given else None
        hidden = select_ffn.hidden(self._activation, linear(x, given["gate"], given.get("gate_bias")), ups)
        return linear(select.op(hidden, limit, scores=scores), self._down, self._bias)

    def state(self) -> dict[str, Tensor]:
        return {**self._tensors, **({} if self._bias is None else {"bias": self._bias})}

    def files(self) -> dict[str, bytes]:
        """IR, binary and description, for the artefact."""
        return build.export(self._kernel)
