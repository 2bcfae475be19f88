"""The family of kernels for FFNs of which every linear selects its inputs: few rows of x in one call, more linear by linear on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen.bound import BoundLayer, as_arguments, as_matrix, export_variants, load_variants
from sparsify_compiler.codegen.kernels import gather
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.codegen.kernels.gather import FEW, FEW_ROWS, MANY, GatherLayout, GatherLinear, columns_of, rounded
from sparsify_compiler.codegen.kernels.inputs_ffn_panels import InputsFfnPanels
from sparsify_compiler.codegen.kernels.inputs_ffn_rows import InputsFfnRows, Selection
from sparsify_compiler.codegen.kernels.layout import DTYPES
from sparsify_compiler.codegen.laid import Laid, PreparedTensors, Variants, without_torch
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather_inputs_ffn", "select_inputs_ffn", "gather by input, the FFN in one call"
LINEARS = ("gate", "up", "down")
BY = ("limit", "scale", "center")


@dataclass(frozen=True)
class PreparedInputsFfn(PreparedTensors):
    """The tensors of all linears, each its own way."""

    linears: Mapping[str, Laid]


def offer(op: str, tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], dtype: torch.dtype, rows: Sequence[int],
          target: Target) -> list[tuple[str, dict[str, Any]]]:
    """Name and options of the kernel, for limits that are stored."""
    if op != OP or dtype not in DTYPES:
        return []
    weights = [tensors[name] for name in LINEARS if name in tensors]
    fits = all(weight.dtype is dtype and weight.dim() == 2 and min(weight.shape) > 0 for weight in weights)
    fits = fits and all(f"{name}_limit" in tensors and tensors[f"{name}_limit"].numel() == 1 for name in LINEARS if name in tensors)
    known = attributes["activation"] in ACTIVATIONS and attributes["activation"] in select_ffn.ACTIVATIONS
    return [(LABEL, {"dtype": str(dtype).removeprefix("torch.")})] if fits and known else []


def lay(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
        target: Target, shared: list[Any]) -> Laid:
    """The weights gate and up [K, H], down [H, N], with what selects. Raises KernelError."""
    gate, down, dtype = tensors["gate"], tensors["down"], str(options["dtype"])
    whole = gate.dim() == down.dim() == 2 and tensors.get("up", gate).shape == gate.shape and down.shape[0] == gate.shape[1]
    if not whole or not offer(op, tensors, attributes, getattr(torch, dtype), (1,), target):
        raise KernelError("the stored weights do not fit this kernel", where=op, hint="save the model again")
    biases = {"gate": tensors.get("gate_bias"), "up": tensors.get("up_bias"), "down": bias}
    linears = {name: _linear(name, options, tensors, biases[name], target) for name in LINEARS if name in tensors}
    every = {f"{name}.{key}": tensor for name, linear in linears.items() for key, tensor in linear.prepared.arguments().items()}
    layout = GatherLayout(dtype, str(attributes["activation"]))
    prepared = PreparedInputsFfn(layout, every, {}, down.shape[1], gate.shape[0], linears)
    return Laid(LABEL, options, prepared, _variants(layout, tensors, target), target)


def _linear(name: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None, target: Target) -> Laid:
    given = {by: tensors[f"{name}_{by}"] for by in BY if f"{name}_{by}" in tensors}
    return gather.lay(gather.OP, options, {"weight": tensors[name], **given}, {}, bias, target, [])


def _variants(layout: GatherLayout, tensors: Mapping[str, Tensor], target: Target) -> Variants:
    """One kernel for few rows; another for many, where there is no torch."""
    kinds = [Selection(f"{name}_scale" in tensors, f"{name}_center" in tensors) if name in tensors else None for name in LINEARS]
    gate, up, down = kinds
    assert gate is not None
    assert down is not None
    hidden, columns = (columns_of(rounded(tensors[name].shape[1]), target) for name in ("gate", "down"))
    few = InputsFfnRows(layout.dtype, layout.activation, hidden, columns, gate, up, down, up is not None and all(_alike(tensors, by) for by in BY),
                        target.cores > 1, vectors_of(target))
    many = {MANY: InputsFfnPanels(layout.dtype, layout.activation, gate, up, down, target.cores, vectors_of(target))} if without_torch() else {}
    most = FEW_ROWS[getattr(torch, layout.dtype)]
    return Variants({FEW: few, **many}, lambda rows: FEW if rows <= most or not many else MANY)


class GatherInputsFfn(BoundLayer):
    """An FFN bound to its weights gate and up [K, H], down [H, N]: x [..., K] -> y [..., N]. Results do not depend on the number of threads."""

    def __init__(self, laid: Laid, files: Mapping[str, bytes] | None = None) -> None:
        self.laid, self.name, self.options, self.target, files = laid, laid.name, dict(laid.options), laid.target, files or {}
        prepared: Any = laid.prepared
        self._activation, self._few = prepared.layout.activation, FEW_ROWS[prepared.dtype]
        self._linears = {name: GatherLinear(one, _of(name, files)) for name, one in prepared.linears.items()}
        self._dtype, self.in_features, self.out_features = prepared.dtype, prepared.in_features, prepared.out_features
        self._kernels, self._arguments = load_variants(laid, files), as_arguments(prepared)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] of the weights' dtype, any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        if not 0 < rows <= self._few:
            return self.one_by_one(x)
        y = x.new_empty(shape)
        self._kernels[FEW].function(as_matrix(x, rows), *self._arguments, as_matrix(y, rows))
        return y

    def one_by_one(self, x: Tensor) -> Tensor:
        """The same, a kernel for each linear."""
        hidden = select_ffn.ACTIVATIONS[self._activation](self._linears["gate"](x))
        if "up" in self._linears:
            hidden = hidden * select_ffn.raised(self._activation, self._linears["up"](x))
        return self._linears["down"](hidden)

    def state(self) -> dict[str, Tensor]:
        return self.laid.prepared.arguments()

    def files(self) -> dict[str, bytes]:
        """IR, binary and description, for the artefact: of the whole and of each linear."""
        made = {f"{name}.{key}": data for name, linear in self._linears.items() for key, data in linear.files().items()}
        return export_variants(self._kernels) | made


def _of(part: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix(f"{part}."): data for name, data in files.items() if name.startswith(f"{part}.")}


def _alike(tensors: Mapping[str, Tensor], by: str) -> bool:
    """Do gate and up select by the same?"""
    one, other = tensors.get(f"gate_{by}"), tensors.get(f"up_{by}")
    return one is other or (one is not None and other is not None and torch.equal(one, other))


BOUND = GatherInputsFfn
