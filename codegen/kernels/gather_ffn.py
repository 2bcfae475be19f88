"""The family of kernels for gated FFNs that select their neurons: one row of x reads those only, more rows run dense on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.kernels.ffn_panels import FfnPanels
from sparsify_compiler.codegen.kernels.ffn_rows import FfnRows
from sparsify_compiler.codegen.kernels.gather import MANY, SELECT, GatherLayout, columns_of, rounded
from sparsify_compiler.codegen.kernels.gathered_ffn import GatheredFfn, check, prepare, takes, variants
from sparsify_compiler.codegen.kernels.select_rows import SelectRows
from sparsify_compiler.codegen.laid import Laid, without_torch
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather_ffn", "select_ffn", "gather by neuron"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for FFNs with a gate and a stored limit."""
    known = op == OP and {"up", "limit"} <= set(tensors) and takes(tensors, attributes, dtype)
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if known else []


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weights with what selects. Raises KernelError."""
    dtype, activation, scaled = str(options["dtype"]), str(attributes["activation"]), "scale" in tensors
    check(op, tensors, attributes, dtype)
    by = tensors["scale"].detach().float().contiguous() if scaled else torch.zeros(1, dtype=torch.float32)
    prepared = prepare(tensors, bias, GatherLayout(dtype, activation), {"by": by, "limit": tensors["limit"].detach().float().reshape(1)})
    cut_for, columns = vectors_of(target), columns_of(rounded(prepared.out_features), target)
    one = FfnRows(dtype, activation, columns, scaled, target.cores > 1, cut_for)
    many = ({MANY: FfnPanels(dtype, activation, "scaled" if scaled else "gate", True, target.cores, cut_for)} if without_torch()
            else {SELECT: SelectRows(dtype, scaled, False, target.cores > 1)})
    return Laid(LABEL, options, prepared, variants(one, many), target)


class GatherFfn(GatheredFfn):
    """An FFN bound to its weights: x [..., K] -> y [..., N]. Results do not depend on the number of threads."""

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] of the weights' dtype, any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        return self._one(x, shape, *self._arguments) if rows == 1 else self._many(x)

    def _many(self, x: Tensor) -> Tensor:
        gates = select_ffn.ACTIVATIONS[self._activation](self._projected(x, "gate")).flatten(0, -2)
        if not gates.shape[0]:
            return x.new_empty((*x.shape[:-1], self.out_features))
        chosen = torch.empty_like(gates)
        by, limit = self._arguments[:2]
        self._kernels[SELECT].function(gates, limit, by, by, chosen)
        return self._down(chosen.view((*x.shape[:-1], -1)) * select_ffn.raised(self._activation, self._projected(x, "up")))


BOUND = GatherFfn
