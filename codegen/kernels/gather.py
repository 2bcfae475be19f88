"""The family of kernels for layers whose rows of x select their inputs: few rows read the selected weights only, many run dense on the same weight.

The weight stays as the op stores it, [K, N], one copy for both; it is copied only where N is no multiple of 64, into rows that are, and where it is
mapped from a file, into huge pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.bound import BoundLayer, as_matrix
from sparsify_compiler.codegen.kernels.gather_rows import LANES, GatherRows
from sparsify_compiler.codegen.kernels.layout import DTYPES, padded_bias
from sparsify_compiler.codegen.kernels.select_rows import SelectRows
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.pages import resident
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather", "select_linear", "gather by input"
ROUND = 64          # outputs: whole cache lines in both dtypes
WIDE = 2048         # outputs of a task, at the most: long runs of W, and their sums stay in L1
ALONE = 1 << 16     # weights below which waking other threads costs more than they bring
# Rows of x up to which reading the union of what they select beats the dense form at half of the inputs (measured, Sapphire Rapids).
FEW_ROWS = {torch.float32: 4, torch.bfloat16: 2}


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel."""
    if op != OP or dtype not in DTYPES or tensors["weight"].dtype is not dtype or min(tensors["weight"].shape) < 1:
        return []
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})]


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> GatherLinear:
    """The kernel with this weight, limit, scale and centre. Raises KernelError."""
    weight = tensors["weight"]
    if op != OP or weight.dim() != 2 or str(weight.dtype) != f"torch.{options['dtype']}" or min(weight.shape) < 1:
        raise KernelError("the stored weight does not fit this kernel", where=op, hint="save the model again")
    for name in ("scale", "center"):
        if name in tensors and tuple(tensors[name].shape) != (weight.shape[0],):
            raise KernelError(f"{name} has shape {list(tensors[name].shape)}, the weight {weight.shape[0]} inputs", where=op)
    return GatherLinear(options, tensors, bias, files, target)


def columns_of(width: int, target: Target) -> int:
    """Outputs of a task, of so many that are a multiple of ROUND: as many tasks as processors, or several times as many."""
    tasks = -(-width // (WIDE * target.cores)) * target.cores
    return -(-width // (ROUND * tasks)) * ROUND


def load_both(schedule: Any, target: Target, files: Mapping[str, bytes]) -> tuple[build.Kernel, build.Kernel]:
    """The kernel for few rows, and what selects for many rows before they are multiplied densely: from an artefact's files, where it has some."""
    many = SelectRows(schedule.dtype, schedule.scaled, getattr(schedule, "centered", False), schedule.parallel)
    made = []
    for name, one in (("few", schedule), ("many", many)):
        stored = {key.removeprefix(f"{name}."): data for key, data in files.items() if key.startswith(f"{name}.")}
        made.append(build.load_exported(stored, one, target) if stored else build.load(one, target))
    return made[0], made[1]


def in_order(total: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias in the order of the kernel's sums."""
    return total.view(-1, LANES, 2).transpose(1, 2).reshape(-1) if dtype is torch.bfloat16 else total.contiguous()


class Gathering(BoundLayer):
    """A layer bound to its weights: one kernel for few rows of x, and one that selects for many, before they are multiplied densely."""

    _kernel: build.Kernel
    _select: build.Kernel

    def files(self) -> dict[str, bytes]:
        """IR, binary and description, for the artefact, as load_both reads them."""
        made = (("few", self._kernel), ("many", self._select))
        return {f"{name}.{key}": data for name, kernel in made for key, data in build.export(kernel).items()}


class GatherLinear(Gathering):
    """A layer bound to its weight [K, N]: x [..., K] -> y [..., N], select(x) W + bias.

    Where the limit is not stored it comes with every call, [..., 1]. Results do not depend on the number of threads.
    """

    name = LABEL

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None, files: Mapping[str, bytes],
                 target: Target) -> None:
        self.options, self.target = dict(options), target
        weight = tensors["weight"].detach()
        self.in_features, self.out_features = weight.shape
        self.width = width = -(-self.out_features // ROUND) * ROUND  # outputs that the kernel computes
        self._rows = resident(weight if width == self.out_features else pad(weight, (0, width - self.out_features)))
        self._bias = None if bias is None else bias.detach()
        self._vectors = {name: tensors[name].detach() for name in ("limit", "scale", "center") if name in tensors}
        self._dtype, self._few = weight.dtype, FEW_ROWS[weight.dtype]
        schedule = GatherRows(str(options["dtype"]), columns_of(width, target), "scale" in tensors, "center" in tensors,
                              weight.numel() >= ALONE and target.cores > 1, vectors_of(target))
        self._kernel, self._select = load_both(schedule, target, files)
        self._prepare(width)

    def _prepare(self, width: int) -> None:
        """The fixed arguments of the kernel, as TVM's own tensors."""
        import tvm_ffi

        none, center = torch.zeros(1, dtype=torch.float32), self._vectors.get("center")
        total = padded_bias(self._bias, self.out_features, width)
        if center is not None:
            total = total + center.float() @ self._rows.float()
        words = self._rows
        if self._dtype is torch.bfloat16:
            words = self._rows.view(torch.int32)
        self._sums = in_order(total, self._dtype)
        fixed = [self._vectors.get(name, none).float().contiguous() for name in ("scale", "center")]
        self._held = [*fixed, words, self._sums]
        self._arguments = tuple(tvm_ffi.from_dlpack(tensor) for tensor in self._held)
        limit = self._vectors.get("limit")
        self._limit = None if limit is None else tvm_ffi.from_dlpack(limit.float().reshape(1))
        self._matrix = self._rows[:, : self.out_features]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Of a kernel that selects by a stored limit: limit, scale, center, weight, bias."""
        return (self._limit, *self._arguments)

    def __call__(self, x: Tensor, limit: Tensor | None = None) -> Tensor:
        """x [..., K] of the weight's dtype, any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        if not rows:
            return x.new_empty(shape)
        limits = self._limit if limit is None else torch.empty(rows, dtype=torch.float32).copy_(limit.detach().reshape(-1))
        if rows <= self._few:
            y = x.new_empty(shape)
            self._kernel.function(as_matrix(x, rows), limits, *self._arguments, as_matrix(y, rows))
            return y
        x = as_matrix(x, rows)
        chosen = torch.empty_like(x)
        self._select.function(x, limits, *self._arguments[:2], chosen)
        return (torch.mm(chosen, self._matrix) if self._bias is None else torch.addmm(self._bias, chosen, self._matrix)).view(shape)

    def state(self) -> dict[str, Tensor]:
        return {"weight": self._rows, "sums": self._sums, **self._vectors, **({} if self._bias is None else {"bias": self._bias})}
