"""The family of kernels for sparse linear layers on GPUs: blocks and 2:4 for many rows of x, on tensor cores, any structure for a few."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.cuda import device as gpu
from sparsify_compiler.codegen.cuda import groups as g
from sparsify_compiler.codegen.cuda import layout
from sparsify_compiler.codegen.cuda import tiles as t
from sparsify_compiler.codegen.cuda.layer import DTYPES, SHORT, CudaLayer, bias_of, device_of, name_of
from sparsify_compiler.codegen.cuda.sparse24 import CudaSparse24
from sparsify_compiler.codegen.cuda.sparse24_group import DEPTH, CudaSparse24Group
from sparsify_compiler.codegen.cuda.sparse24_rows import CudaSparse24Rows
from sparsify_compiler.codegen.cuda.sparse_rows import WARPS, CudaSparseRows
from sparsify_compiler.codegen.cuda.strip_rows import CudaStripRows
from sparsify_compiler.codegen.cuda.strips import CudaStrips
from sparsify_compiler.codegen.cuda.strips_group import CudaStripsGroup
from sparsify_compiler.codegen.cuda.strips_wide import CudaStripsWide
from sparsify_compiler.codegen.cuda.turn import CudaTurn
from sparsify_compiler.codegen.kernels.finish import Finish, finish_of, needed_finish
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.target import Target

NAME = "cuda_linear"
FEW = (1, 2, 4)             # rows of x that kernels for a few hold
GROUP_ROWS, MANY = (128, 256), 1024     # rows of x of a block of groups of warps: of few, and of so many or more
SHARED = 96 * 1024          # bytes of shared memory that a block may ask for, on every GPU
STRIPS = (16, 32, 64, 128)  # outputs of a block row
LABELS = {"strips": "strips of blocks", "halves": "2:4 on sparse tensor cores", "eights": "lists of eights"}


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernels that can run this op, the best first."""
    if op not in layout.FORMATS or dtype not in DTYPES or tensors["values"].dtype is not dtype or finish_of(attributes) is None:
        return []
    outputs, inputs = int(attributes["out_features"]), int(attributes["in_features"])
    if min(outputs, inputs) < 1 or outputs % 8 or inputs % 8:
        return []
    kind = _kind(op, attributes, dtype, inputs)
    if kind == "eights" and (max(rows, default=1) > FEW[-1] or _capacity(inputs) * dtype.itemsize > SHARED):
        return []
    return [(LABELS[kind], {"dtype": name_of(dtype), "kind": kind})]


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> CudaLinear:
    """The kernels with this weight. Raises KernelError."""
    dtype = getattr(torch, str(options["dtype"]))
    if options["kind"] not in [one["kind"] for _, one in offer(op, tensors, attributes, dtype, (1,), target)]:
        raise KernelError("the stored weight does not fit this kernel", where=op, hint="save the model again")
    return CudaLinear(op, options, tensors, attributes, bias, needed_finish(op, attributes), files)


def _kind(op: str, attributes: Mapping[str, Any], dtype: torch.dtype, inputs: int) -> str:
    if op == "linear_bsr" and attributes["r"] in STRIPS:
        return "strips"
    if op == "linear_nm" and (attributes["n"], attributes["m"]) == (2, 4) and dtype in SHORT and inputs % 64 == 0:
        return "halves"
    return "eights"


def _capacity(inputs: int) -> int:
    """Inputs that shared memory has room for: a few sizes, so that layers share kernels."""
    return -(-inputs // 1024) * 1024


class CudaLinear(CudaLayer):
    """A sparse layer bound to its weight: x [..., K] -> y [..., N], bias included; + other [..., N], activation, where the epilogue says so."""

    def __init__(self, op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
                 finish: Finish, files: Mapping[str, bytes]) -> None:
        weight = layout.stored(op, tensors, attributes)
        device, self._kind, self._finish = device_of(tensors), str(options["kind"]), finish
        super().__init__(LABELS[self._kind], options, weight.values.dtype, device, (weight.in_features, weight.out_features), files)
        self._short, self._r = name_of(self._dtype), int(attributes.get("r", 0))
        self._eights = int(attributes.get("c", 1)) % t.CHUNK == 0   # blocks are whole eights of inputs
        make: Any = {"strips": layout.strips, "halves": layout.halves, "eights": layout.eights}[self._kind]
        self._held = make(weight)
        self._held["bias"] = bias_of(bias, self.out_features, device)

    def __call__(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x [..., K] and other [..., N] of the kernel's dtype, any strides -> a new y [..., N]. Raises InputError."""
        matrix, shape = self.matrix(x), (*x.shape[:-1], self.out_features)
        y = x.new_empty((matrix.shape[0], self.out_features))
        if self._finish.add and (other is None or other.shape != shape or other.dtype is not self._dtype or other.device != self.device):
            given = None if other is None else f"{other.dtype} {list(other.shape)} on {other.device}"
            raise InputError(f"expected another {self._dtype} {list(shape)} to add, got {given}", where=self.name)
        added = (other.detach().reshape(y.shape).contiguous(),) if self._finish.add and other is not None else ()
        if matrix.shape[0]:
            self._run(matrix, added, y)
        return y.view(shape)

    def _run(self, x: Tensor, added: tuple[Tensor, ...], y: Tensor) -> None:
        rows = x.shape[0]
        if rows <= FEW[-1]:
            return self._few(x, added, y)
        if self._kind == "eights":
            for start in range(0, rows, FEW[-1]):
                part = slice(start, start + FEW[-1])
                self._few(x[part], tuple(one[part] for one in added), y[part])
            return None
        held = self._held
        if self._kind == "strips":
            schedule = self._strips(rows)
            given = x if isinstance(schedule, CudaStripsGroup) and schedule.straight else self._turned(x)
            return self.kernels(schedule, given, held["values"], held["inputs"], held["pointers"], held["bias"], *added, y)
        return self.kernels(self._halves(rows), x, held["values"], held["places"], held["bias"], *added, y)

    def _strips(self, rows: int) -> CudaStripsWide | CudaStrips | CudaStripsGroup:
        """The kernel for strips and so many rows of x."""
        if self._dtype not in SHORT:
            return CudaStripsWide(self._r, self._finish)
        if self._r < g.HIGH or not self._by_groups(rows):
            return CudaStrips(self._short, self._r, 32 if rows <= 64 else 128, self._finish)
        return CudaStripsGroup(self._short, self._r, GROUP_ROWS[rows >= MANY], self._eights, self._finish)

    def _halves(self, rows: int) -> CudaSparse24 | CudaSparse24Group:
        """The kernel for 2:4 and so many rows of x."""
        if self.in_features % DEPTH or not self._by_groups(rows):
            return CudaSparse24(self._short, 32 if rows <= 32 else 64 if rows <= 64 else 128, self._finish)
        return CudaSparse24Group(self._short, GROUP_ROWS[rows >= MANY], self._finish)

    def _by_groups(self, rows: int) -> bool:
        """Do four warps multiply at once? Tiles of rows that would be half empty are not worth it."""
        return rows > GROUP_ROWS[0] // 2 and gpu.multiplies_by_groups(self.device)

    def _turned(self, x: Tensor) -> Tensor:
        """x transposed, [K, Mp]."""
        turned = x.new_empty((self.in_features, -(-x.shape[0] // 8) * 8))
        if x.element_size() == 2:
            self.kernels(CudaTurn(), x.view(torch.int16), turned.view(torch.int16))
        else:
            turned[:, : x.shape[0]].copy_(x.t())
        return turned

    def _few(self, x: Tensor, added: tuple[Tensor, ...], y: Tensor) -> None:
        most, held = next(size for size in FEW if size >= x.shape[0]), self._held
        if self._kind == "strips":
            schedule = CudaStripRows(self._short, self._r, most, self._finish)
            return self.kernels(schedule, x, held["values"], held["inputs"], held["pointers"], held["bias"], *added, y)
        if self._kind == "halves":
            return self.kernels(CudaSparse24Rows(self._short, most, finish=self._finish), x, held["values"], held["places"], held["bias"], *added, y)
        while most * _capacity(self.in_features) * x.element_size() > SHARED:
            most //= 2
        for start in range(0, x.shape[0], most):
            part = slice(start, start + most)
            self._listed(x[part], tuple(one[part] for one in added), y[part], most)
        return None

    def _listed(self, x: Tensor, added: tuple[Tensor, ...], y: Tensor, most: int) -> None:
        held, blocks = self._held, min(-(-self.out_features // WARPS), 4 * gpu.processors(self.device))
        schedule = CudaSparseRows(self._short, name_of(held["columns"].dtype), most, _capacity(self.in_features), self._finish)
        self.kernels(schedule, x, held["values"], held["columns"], held["pointers"], held["counts"], held["bias"], *added, y, blocks)
