"""The family of kernels for layers on GPUs whose rows of x select their inputs: a few rows read the selected weights only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.cuda import device as gpu
from sparsify_compiler.codegen.cuda.gather_rows import CudaGatherRows
from sparsify_compiler.codegen.cuda.layer import DTYPES, CudaLayer, bias_of, device_of, lanes_of, name_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select
from sparsify_compiler.target import Target

NAME, OP, LABEL = "cuda_gather", "select_linear", "gather by input"
FEW = (1, 2, 4)     # rows of x that read the union of what they select
CLUSTERS, ALONE = ((2, 8), (8, 32)), (1, 8)     # blocks that share the inputs, and lanes of a row: for few outputs and many; without clusters
WARPS = (16, 8, 4)  # of a block; the least only where blocks share the outputs, too
THREADS = 1024      # of a processor, whose registers suffice for so many


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for rows of weights that begin where 16 bytes do."""
    if op != OP or dtype not in DTYPES:
        return []
    weight = tensors["weight"]
    fits = weight.dim() == 2 and weight.dtype is dtype and min(weight.shape) >= 1 and weight.shape[1] % lanes_of(dtype) == 0
    return [(LABEL, {"dtype": name_of(dtype)})] if fits else []


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> CudaGatherLinear:
    """The kernel with this weight, limit, scale and centre. Raises KernelError."""
    weight = tensors["weight"]
    if not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored weight does not fit this kernel", where=op, hint="save the model again")
    for name in ("scale", "center"):
        if name in tensors and tuple(tensors[name].shape) != (weight.shape[0],):
            raise KernelError(f"{name} has shape {list(tensors[name].shape)}, the weight {weight.shape[0]} inputs", where=op)
    return CudaGatherLinear(options, tensors, bias, files)


def schedule_of(dtype: torch.dtype, rows: int, outputs: int, device: torch.device, **options: Any) -> CudaGatherRows:
    """The kernel for so many rows and outputs: all its threads at work at once, on all processors."""
    most, all_of = next(size for size in FEW if size >= rows), gpu.processors(device)

    def blocks(cluster: int, across: int) -> int:
        return -(-outputs // (across * lanes_of(dtype))) * cluster

    cluster, across = next((one for one in CLUSTERS if blocks(*one) <= all_of), CLUSTERS[-1]) if gpu.has_clusters(device) else ALONE
    allowed = WARPS if cluster == CLUSTERS[-1][0] else WARPS[:-1]
    threads = THREADS // (1 if most == 1 else 2) * all_of // blocks(cluster, across)
    warps = next((size for size in allowed if size * 32 <= threads), allowed[-1])
    return CudaGatherRows(name_of(dtype), most, across=across, cluster=cluster, warps=warps, **options)


class CudaGatherLinear(CudaLayer):
    """A layer bound to its weight [K, N]: x [..., K] -> y [..., N], select(x) W + bias.

    Where the limit is not stored it comes with every call, [..., 1].
    """

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None, files: Mapping[str, bytes]) -> None:
        weight = tensors["weight"].detach().contiguous()
        super().__init__(LABEL, options, weight.dtype, device_of(tensors), (weight.shape[0], weight.shape[1]), files)
        self._bias = None if bias is None else bias.detach()
        none = torch.zeros(1, dtype=torch.float32, device=self.device)
        self._given = {name: tensors[name].detach() for name in ("limit", "scale", "center") if name in tensors}
        total = bias_of(bias, self.out_features, self.device)
        if "center" in tensors:
            total = total + self._given["center"].float() @ weight.float()
        wide = {name: self._given[name].float().contiguous() if name in self._given else none for name in ("scale", "center")}
        self._held = {"weight": weight, "sums": total, **wide}
        self._limit = self._given["limit"].float().reshape(1) if "limit" in self._given else None

    def __call__(self, x: Tensor, limit: Tensor | None = None) -> Tensor:
        """x [..., K] of the weight's dtype, any strides -> a new y [..., N]. Raises InputError."""
        matrix, shape = self.matrix(x), (*x.shape[:-1], self.out_features)
        rows, held = matrix.shape[0], self._held
        if rows > FEW[-1]:
            given = self._given
            chosen = select.op(x, given["limit"] if limit is None else limit, given.get("scale"), given.get("center"))
            return torch.nn.functional.linear(chosen, held["weight"].t(), self._bias)
        y = x.new_empty((rows, self.out_features))
        if rows:
            limits = self._limit if limit is None else limit.detach().float().reshape(-1).contiguous()
            schedule = schedule_of(self._dtype, rows, self.out_features, self.device, scaled="scale" in self._given,
                                   centered="center" in self._given)
            self.kernels(schedule, matrix, limits, held["scale"], held["center"], held["weight"], held["sums"], y)
        return y.view(shape)
