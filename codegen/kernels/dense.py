"""The family of kernels for dense linear layers of graphs that run without torch, on panels of outputs (dense_panel.py): float32.

Beside torch there is oneDNN, which is no faster (benchmarks/whole_graph.py), so layers are not laid out and timed for nothing there. bfloat16 goes on
AMX tiles (amx.py) where there are some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.codegen.kernels.dense_panel import DensePanel, width_of
from sparsify_compiler.codegen.kernels.finish import Finish, finish_of, needed_finish
from sparsify_compiler.codegen.kernels.layout import padded_bias
from sparsify_compiler.codegen.laid import Laid, PreparedWeight, Variants, shared_layout, without_torch, workers
from sparsify_compiler.codegen.vectors import Vectors, vectors_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target

NAME, OP, LABEL = "dense", "linear", "dense by panel"
ALONE = 200_000     # multiply-adds below which waking other threads costs more than they bring (about 3 µs)


@dataclass(frozen=True)
class DenseLayout:
    """Static facts of a prepared weight: outputs of a panel; the dtype of x, y and the weight."""

    width: int
    dtype: str = "float32"


@dataclass(frozen=True)
class PreparedDense(PreparedWeight):
    """weight [panels, K, width], zeros behind the last output; bias float32 [panels * width]."""

    STATE: ClassVar[tuple[str, ...]] = ("weight", "bias")

    layout: DenseLayout
    weight: Tensor
    bias: Tensor
    out_features: int
    in_features: int


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for graphs without torch."""
    return [(LABEL, {})] if op == OP and without_torch() and _fits(tensors["weight"], dtype) and finish_of(attributes) is not None else []


def _fits(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dim() == 2 and weight.dtype is dtype is torch.float32 and weight.numel() > 0


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weight laid out, or its layout with this very bias from `shared`. Raises KernelError."""
    weight, finish, cut_for = tensors["weight"], needed_finish(op, attributes), vectors_of(target)
    if not _fits(weight, torch.float32):
        raise KernelError("the stored weight does not fit this kernel", where=op, hint="save the model again")

    def lay_out() -> PreparedDense:
        width, (outputs, inputs) = width_of(cut_for), weight.shape
        panels = pad(weight.detach(), (0, 0, 0, -outputs % width)).view(-1, width, inputs).transpose(1, 2).contiguous()
        return PreparedDense(DenseLayout(width), panels, padded_bias(bias, outputs, len(panels) * width), outputs, inputs)

    prepared = shared_layout(shared, bias, lay_out, cut_for)
    return Laid(LABEL, options, prepared, _variants(weight.numel(), finish, workers(target), cut_for), target)


def _variants(weights: int, finish: Finish, threads: int, cut_for: Vectors) -> Variants:
    found = {f"dense-{count}": DensePanel("panels", count, finish, cut_for=cut_for) for count in {1, threads}}
    return Variants(found, lambda rows: f"dense-{1 if rows * weights < ALONE else threads}", finish.add)
