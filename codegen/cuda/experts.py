"""The family of kernels for mixtures of experts on GPUs: one row reads its experts, more go through tensor cores, all in one launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.cuda import device as gpu
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda.expert_order import order_of
from sparsify_compiler.codegen.cuda.grouped import CudaCombine, CudaGrouped
from sparsify_compiler.codegen.cuda.layer import DTYPES, SHORT, CudaLayer, device_of, name_of
from sparsify_compiler.codegen.cuda.neurons import CudaDownRows, CudaNeurons
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "cuda_experts", "experts_ffn", "chosen experts"
WEIGHTS, BIASES = ("gate", "up", "down"), ("gate_bias", "up_bias", "bias")
TALL = 32       # rows of an expert, on average, up to which tiles are short


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernels, for widths that are multiples of 8; more rows than one in 16 bits only."""
    if op != OP or dtype not in DTYPES or any(name in tensors for name in ("chosen", "weights")):
        return []
    gate, down = tensors["gate"], tensors["down"]
    whole = gate.dim() == down.dim() == 3 and tensors.get("up", gate).shape == gate.shape and (down.shape[0], down.shape[2]) == tuple(gate.shape[:2])
    same = all(tensors[name].dtype is dtype for name in WEIGHTS if name in tensors)
    fits = whole and same and min(*gate.shape, *down.shape) > 0 and all(size % 8 == 0 for size in (*gate.shape[1:], down.shape[1]))
    known = attributes["activation"] in ACTIVATIONS and attributes["activation"] in select_ffn.ACTIVATIONS
    return [(LABEL, {"dtype": name_of(dtype)})] if fits and known and (dtype in SHORT or max(rows, default=1) == 1) else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> CudaExperts:
    """The kernels with these experts. Raises KernelError."""
    if not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored experts do not fit this kernel", where=op, hint="save the model again")
    return CudaExperts(options, dict(tensors) if bias is None else {**tensors, "bias": bias}, str(attributes["activation"]), files)


class CudaExperts(CudaLayer):
    """A mixture bound to its experts gate and up [E, H, K], down [E, N, H]: x [..., K], chosen [..., k], weights [..., k] or none -> y [..., N].

    An expert that there is not counts as none.
    """

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], activation: str, files: Mapping[str, bytes]) -> None:
        gate, down = tensors["gate"], tensors["down"]
        super().__init__(LABEL, options, gate.dtype, device_of(tensors), (gate.shape[2], down.shape[1]), files)
        self._activation, self._given = activation, {name: tensors[name].detach() for name in (*WEIGHTS, *BIASES) if name in tensors}
        none = torch.zeros((1, 1), dtype=torch.float32, device=self.device)
        self._held = {name: self._given[name].contiguous() for name in WEIGHTS if name in tensors}
        self._held |= {name: self._given[name].float().contiguous() if name in tensors else none for name in BIASES}
        self._none, self._short, self._filler = none, name_of(self._dtype), gate.new_zeros((1, 1, 8))    # for a matrix that there is not

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
        """x of the weights' dtype, chosen int32 or int64, weights of any float dtype; any strides -> a new y. Raises InputError."""
        matrix, shape = self.matrix(x), (*x.shape[:-1], self.out_features)
        fits = chosen.shape[:-1] == x.shape[:-1] and (weights is None or weights.shape == chosen.shape)
        if not fits or chosen.dtype not in (torch.int32, torch.int64):
            given = None if weights is None else list(weights.shape)
            raise InputError(f"x {list(x.shape)} chose {chosen.dtype} {list(chosen.shape)} with weights {given}", where=self.name,
                             hint="chosen is int32 or int64 [..., k] for x [..., K], and weights are of its shape")
        rows, each = matrix.shape[0], chosen.shape[-1]
        if not rows or not each:
            return x.new_zeros(shape)
        if rows > 1 and self._dtype not in SHORT:
            raise InputError(f"{rows} rows of float32: this kernel has one, or 16 bits", where=self.name, hint="keep the layer as it is")
        y = x.new_empty((rows, self.out_features))
        flat = chosen.detach().reshape(rows, each).contiguous()
        factors = self.floats(rows * each).fill_(1.0) if weights is None else weights.detach().float().reshape(-1).contiguous()
        (self._one if rows == 1 else self._many)(matrix, flat, factors, y)
        return y.view(shape)

    def empty(self, x: Tensor, *given: Tensor) -> Tensor:  # type: ignore[override]
        """A y for this x, which may be fake. Raises InputError."""
        return super().empty(x)

    def _one(self, x: Tensor, chosen: Tensor, factors: Tensor, y: Tensor) -> None:
        held, which = self._held, chosen.int().reshape(-1)
        gated = "up" in held
        hidden = self.floats(which.shape[0], held["gate"].shape[1])
        biased = ("gate_bias" in self._given, "up_bias" in self._given)
        schedule = CudaNeurons(self._short, self._activation, gated, biased)
        nothing = self._none.view(1)
        self.kernels(schedule, x, which, held["gate"], held["up"] if gated else self._filler, held["gate_bias"], held["up_bias"], nothing, nothing,
                     nothing, hidden)
        self.kernels(CudaDownRows(self._short, "bias" in self._given), hidden, which, factors, held["down"], held["bias"], y)

    def _many(self, x: Tensor, chosen: Tensor, factors: Tensor, y: Tensor) -> None:
        held, experts, places = self._held, self._held["gate"].shape[0], chosen.numel()
        tall = 32 if places <= TALL * experts else 128
        order = order_of(chosen, experts, tall)
        gated, group = "up" in held, tall >= g.HIGH and gpu.multiplies_by_groups(self.device)
        hidden = x.new_empty((places, held["gate"].shape[1]))
        first = CudaGrouped(self._short, gated, self._activation, biased="gate_bias" in self._given, raised="up_bias" in self._given, tall=tall,
                            group=group)
        self.kernels(first, x, order.rows, order.ends, order.firsts, held["gate"], held["up"] if gated else self._filler, held["gate_bias"],
                     held["up_bias"], self._none.view(1), hidden, order.tiles)
        parts = self.floats(places, self.out_features)
        second = CudaGrouped(self._short, False, weighted=True, biased="bias" in self._given, result="float32", tall=tall, group=group)
        own = torch.arange(places, dtype=torch.int32, device=self.device)
        self.kernels(second, hidden, own, order.ends, order.firsts, held["down"], self._filler, held["bias"], self._none,
                     factors[order.sorted], parts, order.tiles)
        self.kernels(CudaCombine(self._short), parts, order.places, y)
