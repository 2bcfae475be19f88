"""The family of kernels for FFNs whose neurons are chosen beforehand: one row of x reads those only, more rows run dense on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.bound import as_matrix
from sparsify_compiler.codegen.kernels.ffn_panels import FfnPanels
from sparsify_compiler.codegen.kernels.gather import MANY, GatherLayout, columns_of, rounded
from sparsify_compiler.codegen.kernels.gathered_ffn import GatheredFfn, check, prepare, takes, variants
from sparsify_compiler.codegen.kernels.predicted_ffn_rows import PredictedFfnRows
from sparsify_compiler.codegen.laid import Laid, without_torch
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.ops import select, select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather_predicted_ffn", "predicted_ffn", "gather by prediction"


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel."""
    known = op == OP and takes(tensors, attributes, dtype)
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if known else []


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weights, and the limit where that is stored; else it is given with every call, [..., 1], as scores always are. Raises KernelError."""
    dtype, activation, gated = str(options["dtype"]), str(attributes["activation"]), "up" in tensors
    check(op, tensors, attributes, dtype)
    stored = {"limit": tensors["limit"].detach().float().reshape(1)} if "limit" in tensors else {}
    prepared = prepare(tensors, bias, GatherLayout(dtype, activation), stored)
    cut_for, columns = vectors_of(target), columns_of(rounded(prepared.out_features), target)
    one = PredictedFfnRows(dtype, activation, columns, gated, target.cores > 1, cut_for)
    many = {MANY: FfnPanels(dtype, activation, "scores", gated, target.cores, cut_for)} if without_torch() else {}
    given = ("scores",) if stored else ("scores", "limit")
    return Laid(LABEL, options, prepared, variants(one, many), target, given)


class GatherPredictedFfn(GatheredFfn):
    """An FFN bound to its weights: x [..., K], scores [..., H] -> y [..., N].

    Where the limit is not stored it comes with every call, [..., 1]. Results do not depend on the number of threads.
    """

    def __init__(self, laid: Laid, files: Mapping[str, bytes] | None = None) -> None:
        super().__init__(laid, files)
        stored = "limit" in self._prepared.tensors
        self._limit, self._weights = (self._arguments[0] if stored else None), self._arguments[int(stored):]

    def __call__(self, x: Tensor, scores: Tensor, limit: Tensor | None = None) -> Tensor:
        """x [..., K] of the weights' dtype and scores float32 [..., H], any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        if rows != 1:
            return self._many(x, scores, self._prepared.tensors["limit"].reshape(()) if limit is None else limit)
        return self._one(x, shape, as_matrix(scores, 1), self._limit if limit is None else limit.reshape(1), *self._weights)

    def empty(self, x: Tensor, *given: Tensor) -> Tensor:  # type: ignore[override]
        """A y for this x, which may be fake. Raises InputError."""
        return super().empty(x)

    def _many(self, x: Tensor, scores: Tensor, limit: Tensor) -> Tensor:
        ups = self._projected(x, "up") if "up" in self._plain else None
        hidden = select_ffn.hidden(self._activation, self._projected(x, "gate"), ups)
        return self._down(select.op(hidden, limit, scores=scores))


BOUND = GatherPredictedFfn
