"""The family of kernels for dense linear layers that tokens pass one at a time: few rows of x read W where it lies, more are torch's own.

W is copied once, into huge pages, where it is not in some: it comes a tenth to a fifth faster from there (pages.py). In bfloat16 it is the fastest
dense form of most layers of one token (decode.py); in float32 torch's own mostly is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.bound import BoundLayer, as_matrix
from sparsify_compiler.codegen.kernels.layout import DTYPES, padded_bias
from sparsify_compiler.codegen.kernels.products import TOGETHER, step_of
from sparsify_compiler.codegen.kernels.stream_rows import StreamRows
from sparsify_compiler.codegen.laid import Laid, PreparedTensors, Variants
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.pages import resident
from sparsify_compiler.target import Target

NAME, OP, LABEL = "streams", "linear", "dense by output"
FEW_ROWS = 2        # of x; more were not measured


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for few rows and for whole vectors of inputs."""
    fits = op == OP and set(attributes) <= {"any_rows"} and max(rows, default=0) <= FEW_ROWS
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if fits and _runs(tensors["weight"], dtype, target) else []


def _runs(weight: Tensor, dtype: torch.dtype, target: Target) -> bool:
    if dtype not in DTYPES or weight.dtype is not dtype or weight.dim() != 2 or min(weight.shape) < 1:
        return False
    return weight.shape[1] % step_of(str(dtype).removeprefix("torch.")) == 0


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> StreamLinear:
    """The kernel with this weight. Raises KernelError."""
    weight = tensors["weight"]
    if op != OP or not _runs(weight, getattr(torch, str(options["dtype"])), target):
        raise KernelError("the stored weight does not fit this kernel", where=op, hint="save the model again")
    return StreamLinear(options, weight, bias, files, target)


@dataclass(frozen=True)
class StreamLayout:
    """Static facts: the dtype of x, y and the weight."""

    dtype: str


def in_place(weight: Tensor, bias: Tensor | None, target: Target) -> Laid | None:
    """The weight where it lies, for graphs that share it with torch; None where it does not fit the kernel."""
    if not _runs(weight, weight.dtype, target) or not weight.is_contiguous():
        return None
    layout = StreamLayout(str(weight.dtype).removeprefix("torch."))
    tensors = {"weight": _as_words(weight.detach()), "sums": _sums(weight, bias)}
    schedule = StreamRows(layout.dtype, target.cores > 1, vectors_of(target))
    prepared = PreparedTensors(layout, tensors, {}, *weight.shape)
    return Laid(LABEL, {"dtype": layout.dtype}, prepared, Variants({NAME: schedule}, lambda rows: NAME), target)


def _as_words(weight: Tensor) -> Tensor:
    return weight.view(torch.int32) if weight.dtype is torch.bfloat16 else weight


def _sums(weight: Tensor, bias: Tensor | None) -> Tensor:
    """What sums begin with: the bias, to the end of the last run of outputs."""
    return padded_bias(bias, weight.shape[0], -(-weight.shape[0] // TOGETHER) * TOGETHER)


class StreamLinear(BoundLayer):
    """A dense layer bound to its weight [N, K], in huge pages: x [..., K] -> y [..., N], bias included."""

    name = LABEL

    def __init__(self, options: Mapping[str, Any], weight: Tensor, bias: Tensor | None, files: Mapping[str, bytes], target: Target) -> None:
        import tvm_ffi

        self.options, self.target = dict(options), target
        self._weight, self._bias = resident(weight), None if bias is None else bias.detach()
        self._dtype, (self.out_features, self.in_features) = weight.dtype, weight.shape
        schedule = StreamRows(str(options["dtype"]), target.cores > 1, vectors_of(target))
        self._kernel = build.load_exported(files, schedule, target) if files else build.load(schedule, target)
        self._sums = _sums(weight, bias)
        self._arguments = tuple(tvm_ffi.from_dlpack(tensor) for tensor in (_as_words(self._weight), self._sums))

    def __call__(self, x: Tensor) -> Tensor:
        """x of the weight's dtype, any strides. Raises InputError."""
        rows, shape = self._sizes(x)
        if not 0 < rows <= FEW_ROWS:
            return linear(x, self._weight, self._bias)
        y = x.new_empty(shape)
        self._kernel.function(as_matrix(x, rows), *self._arguments, as_matrix(y, rows))
        return y

    def state(self) -> dict[str, Tensor]:
        return {"weight": self._weight, "sums": self._sums}

    def files(self) -> dict[str, bytes]:
        """IR, binary and description, for the artefact."""
        return build.export(self._kernel)
