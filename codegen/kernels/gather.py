"""The family of kernels for layers whose rows of x select their inputs: few rows read the selected weights only, many run dense on the same weight.

The weight stays as the op stores it, [K, N], one copy for both; it is copied only where N is no multiple of 64, into rows that are, and where it is
mapped from a file, into huge pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsify_compiler.codegen.bound import BoundLayer, as_arguments, as_matrix, export_variants, load_variants
from sparsify_compiler.codegen.kernels.gather_rows import GatherRows
from sparsify_compiler.codegen.kernels.layout import DTYPES, padded_bias
from sparsify_compiler.codegen.kernels.select_rows import SelectRows
from sparsify_compiler.codegen.kernels.selected_panels import SelectedPanels
from sparsify_compiler.codegen.laid import Laid, PreparedTensors, Variants, without_torch
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
FEW, SELECT, MANY = "few", "select", "many"     # variants: all for few rows; what torch multiplies for many; all for many, where there is no torch


@dataclass(frozen=True)
class GatherLayout:
    """Static facts: the dtype of x, y and the weights; of an FFN its activation."""

    dtype: str
    activation: str = ""


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel."""
    if op != OP or dtype not in DTYPES or tensors["weight"].dtype is not dtype or min(tensors["weight"].shape) < 1:
        return []
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})]


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weight with its limit, scale and centre. Where the limit is not stored it is given with every call, [..., 1]. Raises KernelError."""
    weight, dtype, parallel = tensors["weight"], str(options["dtype"]), target.cores > 1
    if op != OP or weight.dim() != 2 or str(weight.dtype) != f"torch.{dtype}" or min(weight.shape) < 1:
        raise KernelError("the stored weight does not fit this kernel", where=op, hint="save the model again")
    for name in ("scale", "center"):
        if name in tensors and tuple(tensors[name].shape) != (weight.shape[0],):
            raise KernelError(f"{name} has shape {list(tensors[name].shape)}, the weight {weight.shape[0]} inputs", where=op)
    prepared, kind, cut_for = _prepare(tensors, bias, dtype), ("scale" in tensors, "center" in tensors), vectors_of(target)
    width = columns_of(rounded(weight.shape[1]), target)
    few = GatherRows(dtype, width, *kind, weight.numel() >= ALONE and parallel, cut_for)
    many = {MANY: SelectedPanels(dtype, *kind, target.cores, cut_for=cut_for)} if without_torch() else {SELECT: SelectRows(dtype, *kind, parallel)}
    most, *other = FEW_ROWS[weight.dtype], *many
    variants = Variants({FEW: few, **many}, lambda rows: FEW if rows <= most else other[0])
    return Laid(LABEL, options, prepared, variants, target, () if "limit" in tensors else ("limit",))


def _prepare(tensors: Mapping[str, Tensor], bias: Tensor | None, dtype: str) -> PreparedTensors:
    """limit [1], scale and center [K] or anything, weight [K, W], bias [W] with what the centre itself gives."""
    weight = tensors["weight"].detach()
    rows, none = by_rows(weight), torch.zeros(1, dtype=torch.float32)
    total = padded_bias(bias, weight.shape[1], rows.shape[1])
    if "center" in tensors:
        total = total + tensors["center"].detach().float() @ rows.float()
    given = {"limit": tensors["limit"].detach().float().reshape(1)} if "limit" in tensors else {}
    given |= {name: tensors[name].detach().float().contiguous() if name in tensors else none for name in ("scale", "center")}
    plain = {"weight": rows[:, : weight.shape[1]], **({} if bias is None else {"bias": bias.detach()})}
    return PreparedTensors(GatherLayout(dtype), {**given, "weight": as_words(rows), "bias": total}, plain, weight.shape[1], weight.shape[0])


def rounded(width: int) -> int:
    """Outputs that kernels compute: whole cache lines."""
    return -(-width // ROUND) * ROUND


def by_rows(weight: Tensor) -> Tensor:
    """[K, N] in rows of whole cache lines, in huge pages."""
    width = rounded(weight.shape[1])
    return resident(weight if width == weight.shape[1] else pad(weight, (0, width - weight.shape[1])))


def as_words(weight: Tensor) -> Tensor:
    """A weight as kernels take it: bfloat16 in int32 words of two."""
    return weight.view(torch.int32) if weight.dtype is torch.bfloat16 else weight


def columns_of(width: int, target: Target) -> int:
    """Outputs of a task, of so many that are a multiple of ROUND: as many tasks as processors, or several times as many."""
    tasks = -(-width // (WIDE * target.cores)) * target.cores
    return -(-width // (ROUND * tasks)) * ROUND


class Gathering(BoundLayer):
    """A layer bound to its weights: one kernel for few rows of x, and torch for many."""

    def __init__(self, laid: Laid, files: Mapping[str, bytes] | None = None) -> None:
        self.laid, self.name, self.options, self.target = laid, laid.name, dict(laid.options), laid.target
        self._prepared: Any = laid.prepared
        self._dtype, self.in_features, self.out_features = self._prepared.dtype, self._prepared.in_features, self._prepared.out_features
        self._plain, self._kernels = self._prepared.plain, load_variants(laid, files or {})
        self._arguments = as_arguments(self._prepared)

    def state(self) -> dict[str, Tensor]:
        return self._prepared.arguments()

    def files(self) -> dict[str, bytes]:
        """IR, binary and description, for the artefact."""
        return export_variants(self._kernels)


class GatherLinear(Gathering):
    """A layer bound to its weight [K, N]: x [..., K] -> y [..., N], select(x) W + bias.

    Where the limit is not stored it comes with every call, [..., 1]. Results do not depend on the number of threads.
    """

    def __init__(self, laid: Laid, files: Mapping[str, bytes] | None = None) -> None:
        super().__init__(laid, files)
        self._few = FEW_ROWS[self._dtype]
        *self._limit, self._scale, self._center, self._weight, self._sums = self._arguments

    def __call__(self, x: Tensor, limit: Tensor | None = None) -> Tensor:
        """x [..., K] of the weight's dtype, any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        if not rows:
            return x.new_empty(shape)
        limits = self._limit[0] if limit is None else torch.empty(rows, dtype=torch.float32).copy_(limit.detach().reshape(-1))
        if rows <= self._few:
            y = x.new_empty(shape)
            self._kernels[FEW].function(as_matrix(x, rows), limits, self._scale, self._center, self._weight, self._sums, as_matrix(y, rows))
            return y
        x = as_matrix(x, rows)
        chosen = torch.empty_like(x)
        self._kernels[SELECT].function(x, limits, self._scale, self._center, chosen)
        bias, matrix = self._plain.get("bias"), self._plain["weight"]
        return (torch.mm(chosen, matrix) if bias is None else torch.addmm(bias, chosen, matrix)).view(shape)


BOUND = GatherLinear
