"""What the kernels of FFNs that read some of their neurons share: which weights they take, and how these lie in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.codegen.bound import as_matrix
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.codegen.kernels.gather import FEW, MANY, Gathering, GatherLayout, as_words, by_rows, rounded
from sparsify_compiler.codegen.kernels.gather_rows import LANES
from sparsify_compiler.codegen.kernels.layout import DTYPES, padded_bias
from sparsify_compiler.codegen.laid import Laid, PreparedTensors, Variants
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select_ffn

WEIGHTS, BIASES = ("gate", "up", "down"), ("gate_bias", "up_bias")


def takes(tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Are these weights of this dtype and of whole vectors, and the activation known?"""
    weights = [tensors[name] for name in WEIGHTS if name in tensors]
    if dtype not in DTYPES or any(weight.dtype is not dtype for weight in weights):
        return False
    hidden, inputs = tensors["gate"].shape
    step = LANES * (2 if dtype is torch.bfloat16 else 1)
    fits = hidden % LANES == 0 and inputs % step == 0 and min(hidden, inputs, tensors["down"].shape[1]) > 0
    return fits and attributes["activation"] in ACTIVATIONS and attributes["activation"] in select_ffn.ACTIVATIONS


def check(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: str) -> None:
    """Are these gate and up [H, K] and down [H, N]; or gate alone, without up? Raises KernelError."""
    gate, down = tensors["gate"], tensors["down"]
    whole = gate.dim() == down.dim() == 2 and tensors.get("up", gate).shape == gate.shape and down.shape[0] == gate.shape[0]
    if not whole or not takes(tensors, attributes, getattr(torch, dtype)):
        raise KernelError("the stored weights do not fit this kernel", where=op, hint="save the model again")


def prepare(tensors: Mapping[str, Tensor], bias: Tensor | None, layout: GatherLayout, stored: Mapping[str, Tensor]) -> PreparedTensors:
    """What is stored of what chooses, then gate, up, their biases, down and its bias; without up there is no number behind it."""
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()} | ({} if bias is None else {"bias": bias.detach()})
    (hidden, inputs), outputs = plain["gate"].shape, plain["down"].shape[1]
    rows = by_rows(plain["down"])
    plain["down"] = rows[:, :outputs].t()
    gate = as_words(plain["gate"])
    made = {"gate": gate, "up": as_words(plain["up"]) if "up" in plain else gate[:1]}
    made |= {name: padded_bias(plain.get(name), hidden, rounded(hidden)) for name in BIASES}
    made |= {"down": as_words(rows), "bias": padded_bias(bias, outputs, rows.shape[1])}
    return PreparedTensors(layout, {**stored, **made}, plain, outputs, inputs)


def variants(one: Any, many: Mapping[str, Any]) -> Variants:
    """A kernel for one row, and what is there for many."""
    return Variants({FEW: one, **many}, lambda rows: FEW if rows == 1 or MANY not in many else MANY)


class GatheredFfn(Gathering):
    """An FFN bound to its weights gate and up [H, K], down [H, N]; down is held in rows of whole cache lines."""

    def __init__(self, laid: Laid, files: Mapping[str, bytes] | None = None) -> None:
        super().__init__(laid, files)
        self._activation = laid.prepared.layout.activation

    def _one(self, x: Tensor, shape: tuple[int, ...], *arguments: Any) -> Tensor:
        y = x.new_empty(shape)
        self._kernels[FEW].function(as_matrix(x, 1), *arguments, as_matrix(y, 1))
        return y

    def _projected(self, x: Tensor, name: str) -> Tensor:
        return linear(x, self._plain[name], self._plain.get(f"{name}_bias"))

    def _down(self, neurons: Tensor) -> Tensor:
        return linear(neurons, self._plain["down"], self._plain.get("bias"))
