"""The family of kernels for mixtures of experts: one row reads the experts that it chose, many rows are multiplied expert by expert.

The experts' weights are read where the model holds them: views of one tensor for gate and up are not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.bound import SLAB, BoundLayer, as_arguments, as_matrix, export_variants, load_variants
from sparsify_compiler.codegen.kernels import amx
from sparsify_compiler.codegen.kernels.expert_panels import ExpertPanels
from sparsify_compiler.codegen.kernels.expert_rows import ExpertRows
from sparsify_compiler.codegen.kernels.experts_layout import BIASES, WEIGHTS, prepare_experts
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.codegen.kernels.layout import DTYPES
from sparsify_compiler.codegen.kernels.products import step_of
from sparsify_compiler.codegen.laid import Laid, Variants, workers
from sparsify_compiler.codegen.vectors import multiplies_pairs, vectors_of
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "experts_ffn", "experts_ffn", "chosen experts"
GIVEN = ("chosen", "weights")  # what the graph computes beside x
ROW, ROWS = "expert_rows", "expert_panels"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for widths of whole vectors."""
    if op != OP or dtype not in DTYPES or any(name in tensors for name in GIVEN):
        return []
    weights = [tensors[name] for name in WEIGHTS if name in tensors]
    step, wide = step_of(str(dtype).removeprefix("torch.")), dtype is torch.bfloat16
    fits = all(weight.dtype is dtype and weight.dim() == 3 and min(weight.shape) > 0 and weight.shape[2] % step == 0 for weight in weights)
    if wide:
        fits = fits and tensors["down"].shape[1] % step == 0
    known = attributes["activation"] in ACTIVATIONS and attributes["activation"] in select_ffn.ACTIVATIONS
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if fits and known else []


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The experts gate and up [E, H, K], down [E, N, H]. Raises KernelError."""
    gate, down = tensors["gate"], tensors["down"]
    whole = gate.dim() == down.dim() == 3 and tensors.get("up", gate).shape == gate.shape and (down.shape[0], down.shape[2]) == gate.shape[:2]
    if not whole or not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored experts do not fit this kernel", where=op, hint="save the model again")
    given = tensors if bias is None else {**tensors, "bias": bias}
    prepared = prepare_experts({name: given[name].detach() for name in (*WEIGHTS, *BIASES) if name in given}, str(attributes["activation"]))
    layout, cut_for = prepared.layout, vectors_of(target)
    core = "fma" if layout.dtype == "float32" else "tiles" if amx.runs(target) else "dots" if multiplies_pairs(target) else "fma"
    kernels = {ROW: ExpertRows(layout, target.cores > 1, cut_for, core == "dots"),    # with tiles nobody has measured those for one row
               ROWS: ExpertPanels(layout, workers(target), cut_for, core)}
    return Laid(LABEL, options, prepared, Variants(kernels, lambda rows: ROW if rows == 1 else ROWS), target, GIVEN)


class Experts(BoundLayer):
    """A mixture bound to its experts gate and up [E, H, K], down [E, N, H]: x [..., K], chosen [..., k], weights [..., k] or none -> y [..., N].

    An expert that there is not counts as none. Results do not depend on the number of threads.
    """

    def __init__(self, laid: Laid, files: Mapping[str, bytes] | None = None) -> None:
        self.laid, self.name, self.options, self.target, prepared = laid, laid.name, dict(laid.options), laid.target, laid.prepared
        self._dtype, self.in_features, self.out_features = prepared.dtype, prepared.in_features, prepared.out_features
        self._held: Mapping[str, Tensor] = prepared.plain  # type: ignore[attr-defined]
        self._widest = max(self._held["gate"].shape[1:])
        self._kernels, self._arguments = load_variants(laid, files or {}), as_arguments(prepared)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor | None = None) -> Tensor:
        """x of the weights' dtype, chosen int32 or int64, weights of any float dtype; any strides -> a new y. Raises InputError."""
        rows, shape = self._sizes(x)
        fits = chosen.shape[:-1] == x.shape[:-1] and (weights is None or weights.shape == chosen.shape)
        if not fits or chosen.dtype not in (torch.int32, torch.int64):
            given = None if weights is None else list(weights.shape)
            raise InputError(f"x {list(x.shape)} chose {chosen.dtype} {list(chosen.shape)} with weights {given}", where=self.name,
                             hint="chosen is int32 or int64 [..., k] for x [..., K], and weights are of its shape")
        if not rows or not chosen.shape[-1]:
            return x.new_zeros(shape)
        y = x.new_empty(shape)
        factors = torch.ones(chosen.shape, dtype=torch.float32) if weights is None else weights.float()
        whole = [as_matrix(x, rows), as_matrix(chosen, rows).view(torch.int32), as_matrix(factors, rows), as_matrix(y, rows)]
        if rows == 1:
            self._run(ROW, *whole)
        for start in range(0, rows if rows > 1 else 0, slab := max(1, SLAB // (chosen.shape[-1] * self._widest))):
            self._run(ROWS, *[matrix[start : start + slab] for matrix in whole])
        return y

    def _run(self, kernel: str, x: Tensor, chosen: Tensor, weights: Tensor, y: Tensor) -> None:
        self._kernels[kernel].function(x, chosen, weights, *self._arguments, y)

    def empty(self, x: Tensor, *given: Tensor) -> Tensor:  # type: ignore[override]
        """A y for this x, which may be fake. Raises InputError."""
        return super().empty(x)

    def state(self) -> dict[str, Tensor]:
        return {**self._held, **{f"prepared.{name}": tensor for name, tensor in self.laid.prepared.arguments().items()}}

    def files(self) -> dict[str, bytes]:
        """IR, binary and description of both kernels, for the artefact."""
        return export_variants(self._kernels)


BOUND = Experts
