"""The family of kernels for gated FFNs that select their neurons: one row of x reads those only, more rows run dense on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from sparsify_compiler.codegen.bound import as_matrix
from sparsify_compiler.codegen.kernels.ffn_rows import FfnRows
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.codegen.kernels.gather import ROUND, Gathering, columns_of, in_order, load_both
from sparsify_compiler.codegen.kernels.gather_rows import LANES
from sparsify_compiler.codegen.kernels.layout import DTYPES, padded_bias
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.pages import resident
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather_ffn", "select_ffn", "gather by neuron"
WEIGHTS = ("gate", "up", "down")


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for machines whose vectors can be compressed, and sizes that are whole vectors."""
    if op != OP or dtype not in DTYPES or not target.has("avx512f") or any(tensors[name].dtype is not dtype for name in WEIGHTS):
        return []
    hidden, inputs = tensors["gate"].shape
    step = LANES * (2 if dtype is torch.bfloat16 else 1)
    fits = hidden % LANES == 0 and inputs % step == 0 and min(hidden, inputs, tensors["down"].shape[1]) > 0
    known = attributes["activation"] in ACTIVATIONS and attributes["activation"] in select_ffn.ACTIVATIONS
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if fits and known and "limit" in tensors else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> GatherFfn:
    """The kernel with these weights. Raises KernelError."""
    gate, up, down = (tensors[name] for name in WEIGHTS)
    whole = gate.dim() == down.dim() == 2 and gate.shape == up.shape and down.shape[0] == gate.shape[0]
    if not whole or not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored weights do not fit this kernel", where=op, hint="save the model again")
    return GatherFfn(options, tensors, attributes, bias, files, target)


class GatherFfn(Gathering):
    """An FFN bound to its weights gate and up [H, K], down [H, N]: x [..., K] -> y [..., N]. Results do not depend on the number of threads."""

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
        schedule = FfnRows(str(options["dtype"]), self._activation, columns_of(width, target), "scale" in tensors, target.cores > 1)
        self._kernel, self._select = load_both(schedule, target, files)
        hidden = tensors["gate"].shape[0]
        biases = [self._tensors[name].float() if name in tensors else torch.zeros(hidden, dtype=torch.float32) for name in ("gate_bias", "up_bias")]
        total = padded_bias(self._bias, self.out_features, width)
        gate, up, down = (self._tensors[name] if self._dtype is torch.float32 else self._tensors[name].view(torch.int32) for name in WEIGHTS)
        scale = self._tensors["scale"].float() if "scale" in tensors else torch.zeros(1, dtype=torch.float32)
        self._held = [self._tensors["limit"].float().reshape(1), scale, gate, up, *biases, down, in_order(total, self._dtype)]
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

    def state(self) -> dict[str, Tensor]:
        return {**self._tensors, **({} if self._bias is None else {"bias": self._bias})}
