"""The family of kernels for FFNs on GPUs that select their neurons (select_ffn, predicted_ffn): one row of x reads those only, more run dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.codegen.cuda.gather import schedule_of
from sparsify_compiler.codegen.cuda.layer import DTYPES, CudaLayer, aligned, bias_of, device_of, lanes_of, name_of
from sparsify_compiler.codegen.cuda.neurons import CudaNeurons
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select, select_ffn
from sparsify_compiler.target import Target

NAME = "cuda_ffn"
LABELS = {"select_ffn": "gather by neuron", "predicted_ffn": "gather by prediction"}
WEIGHTS = ("gate", "up", "down")
NOT_ZERO = 1.4e-45      # the least number: what reaches it is not 0


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for rows of weights that begin where 16 bytes do."""
    if op not in LABELS or dtype not in DTYPES or (op == "select_ffn" and not {"up", "limit"} <= set(tensors)):
        return []
    gate, down, up = tensors["gate"], tensors["down"], tensors.get("up")
    whole = gate.dim() == down.dim() == 2 and gate.shape[0] == down.shape[0] and (up is None or up.shape == gate.shape) and min(gate.shape) > 0
    same = all(tensors[name].dtype is dtype for name in WEIGHTS if name in tensors)
    fits = whole and same and gate.shape[1] % 8 == 0 and down.shape[1] % lanes_of(dtype) == 0 and down.shape[1] > 0
    known = attributes["activation"] in ACTIVATIONS and attributes["activation"] in select_ffn.ACTIVATIONS
    return [(LABELS[op], {"dtype": name_of(dtype)})] if fits and known else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> CudaFfn:
    """The kernel with these weights. Raises KernelError."""
    if not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored weights do not fit this kernel", where=op, hint="save the model again")
    return CudaFfn(op, options, tensors, str(attributes["activation"]), bias, files)


class CudaFfn(CudaLayer):
    """An FFN bound to gate and up [H, K], down [H, N]: x [..., K] (, scores [..., H]) (, limit [..., 1]) -> y [..., N]."""

    def __init__(self, op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], activation: str, bias: Tensor | None,
                 files: Mapping[str, bytes]) -> None:
        gate, down = tensors["gate"], tensors["down"]
        super().__init__(LABELS[op], options, gate.dtype, device_of(tensors), (gate.shape[1], down.shape[1]), files)
        self._op, self._activation, self._bias = op, activation, None if bias is None else bias.detach()
        self._given = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        none = torch.zeros(1, dtype=torch.float32, device=self.device)
        made = {name: self._given[name].float().reshape(1, -1) if name in tensors else none.view(1, 1) for name in ("gate_bias", "up_bias")}
        made |= {"scale": self._given["scale"].float() if "scale" in tensors else none, "none": none, "not_zero": torch.full_like(none, NOT_ZERO)}
        made |= {"sums": bias_of(bias, self.out_features, self.device)}
        self._held = {**{name: self._given[name] for name in WEIGHTS if name in tensors}, **made}
        self._filler = gate.new_zeros((1, 1, 8))
        self._first = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._limit = self._given["limit"].float().reshape(1) if "limit" in tensors else None

    def __call__(self, x: Tensor, *given: Tensor) -> Tensor:
        """x [..., K] of the weights' dtype, any strides; scores float32 of a predicted_ffn; a limit where none is stored -> y. Raises InputError."""
        scores, rest = (given[0], given[1:]) if self._op == "predicted_ffn" else (None, given)
        matrix = self.matrix(x)
        if matrix.shape[0] != 1:
            return self._many(x, scores, rest[0] if rest else self._given["limit"])
        held, hidden = self._held, self.floats(1, self._given["gate"].shape[0])
        gated = "up" in held
        biased = ("gate_bias" in self._given, "up_bias" in self._given)
        schedule = CudaNeurons(name_of(self._dtype), self._activation, gated, biased, "gate" if scores is None else "scores", "scale" in self._given)
        limit = rest[0].detach().float().reshape(1) if rest else self._limit
        told = held["none"] if scores is None else aligned(scores.float().reshape(-1))
        self.kernels(schedule, matrix, self._first, held["gate"][None], held["up"][None] if gated else self._filler, held["gate_bias"],
                     held["up_bias"], limit, held["scale"], told, hidden)
        y = x.new_empty((1, self.out_features))
        down = schedule_of(self._dtype, 1, self.out_features, self.device, source="float32")
        self.kernels(down, hidden, held["not_zero"], held["none"], held["none"], held["down"], held["sums"], y)
        return y.view((*x.shape[:-1], self.out_features))

    def empty(self, x: Tensor, *given: Tensor) -> Tensor:  # type: ignore[override]
        return super().empty(x)

    def _many(self, x: Tensor, scores: Tensor | None, limit: Tensor) -> Tensor:
        given, activation = self._given, self._activation
        gates = linear(x, given["gate"], given.get("gate_bias"))
        ups = linear(x, given["up"], given.get("up_bias")) if "up" in given else None
        if scores is None:
            chosen = select.op(select_ffn.ACTIVATIONS[activation](gates), limit, given.get("scale"))
            hidden = chosen * select_ffn.raised(activation, ups)  # type: ignore[arg-type]
        else:
            hidden = select.op(select_ffn.hidden(activation, gates, ups), limit, scores=scores)
        return linear(hidden, given["down"].t(), self._bias)
