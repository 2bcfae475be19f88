"""The family of kernels for FFNs of which every linear selects its inputs: few rows of x in one call, more linear by linear on the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.bound import BoundLayer, as_matrix
from sparsify_compiler.codegen.kernels import gather
from sparsify_compiler.codegen.kernels.finish import ACTIVATIONS
from sparsify_compiler.codegen.kernels.gather import FEW_ROWS, GatherLinear, columns_of
from sparsify_compiler.codegen.kernels.inputs_ffn_rows import InputsFfnRows, Selection
from sparsify_compiler.codegen.kernels.layout import DTYPES
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.errors import KernelError
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.target import Target

NAME, OP, LABEL = "gather_inputs_ffn", "select_inputs_ffn", "gather by input, the FFN in one call"
LINEARS = ("gate", "up", "down")
BY = ("limit", "scale", "center")


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


def bind(op: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
         files: Mapping[str, bytes], target: Target, shared: list[Any]) -> GatherInputsFfn:
    """The kernel with these weights. Raises KernelError."""
    gate, down = tensors["gate"], tensors["down"]
    whole = gate.dim() == down.dim() == 2 and tensors.get("up", gate).shape == gate.shape and down.shape[0] == gate.shape[1]
    if not whole or not offer(op, tensors, attributes, getattr(torch, str(options["dtype"])), (1,), target):
        raise KernelError("the stored weights do not fit this kernel", where=op, hint="save the model again")
    return GatherInputsFfn(options, tensors, attributes, bias, files, target)


class GatherInputsFfn(BoundLayer):
    """An FFN bound to its weights gate and up [K, H], down [H, N]: x [..., K] -> y [..., N]. Results do not depend on the number of threads."""

    name = LABEL

    def __init__(self, options: Mapping[str, Any], tensors: Mapping[str, Tensor], attributes: Mapping[str, Any], bias: Tensor | None,
                 files: Mapping[str, bytes], target: Target) -> None:
        self.options, self.target, self._activation = dict(options), target, str(attributes["activation"])
        biases = {"gate": tensors.get("gate_bias"), "up": tensors.get("up_bias"), "down": bias}
        self._linears = {name: _linear(name, options, tensors, biases[name], files, target) for name in LINEARS if name in tensors}
        gate, down = self._linears["gate"], self._linears["down"]
        self._dtype, self.in_features, self.out_features = tensors["gate"].dtype, gate.in_features, down.out_features
        self._few = FEW_ROWS[self._dtype]
        schedule = self._schedule(tensors)
        stored = _of("ffn", files)
        self._kernel = build.load_exported(stored, schedule, target) if stored else build.load(schedule, target)
        self._arguments = tuple(argument for linear in self._linears.values() for argument in linear.arguments)

    def _schedule(self, tensors: Mapping[str, Tensor]) -> InputsFfnRows:
        kinds = {name: Selection(f"{name}_scale" in tensors, f"{name}_center" in tensors) for name in self._linears}
        hidden, columns = (columns_of(linear.width, self.target) for linear in (self._linears["gate"], self._linears["down"]))
        return InputsFfnRows(str(self.options["dtype"]), self._activation, hidden, columns, kinds["gate"], kinds.get("up"), kinds["down"],
                             "up" in kinds and all(_alike(tensors, by) for by in BY), self.target.cores > 1, vectors_of(self.target))

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] of the weights' dtype, any strides -> a new y [..., N]. Raises InputError."""
        rows, shape = self._sizes(x)
        if not 0 < rows <= self._few:
            return self.one_by_one(x)
        y = x.new_empty(shape)
        self._kernel.function(as_matrix(x, rows), *self._arguments, as_matrix(y, rows))
        return y

    def one_by_one(self, x: Tensor) -> Tensor:
        """The same, a kernel for each linear."""
        hidden = select_ffn.ACTIVATIONS[self._activation](self._linears["gate"](x))
        if "up" in self._linears:
            hidden = hidden * select_ffn.raised(self._activation, self._linears["up"](x))
        return self._linears["down"](hidden)

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, linear in self._linears.items() for key, tensor in linear.state().items()}

    def files(self) -> dict[str, bytes]:
        """IR, binary and description, for the artefact: of the whole and of each linear."""
        made = {name: linear.files() for name, linear in self._linears.items()} | {"ffn": build.export(self._kernel)}
        return {f"{name}.{key}": data for name, files in made.items() for key, data in files.items()}


def _linear(name: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], bias: Tensor | None, files: Mapping[str, bytes],
            target: Target) -> GatherLinear:
    given = {by: tensors[f"{name}_{by}"] for by in BY if f"{name}_{by}" in tensors}
    return gather.bind(gather.OP, options, {"weight": tensors[name], **given}, {}, bias, _of(name, files), target, [])


def _of(part: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix(f"{part}."): data for name, data in files.items() if name.startswith(f"{part}.")}


def _alike(tensors: Mapping[str, Tensor], by: str) -> bool:
    """Do gate and up select by the same?"""
    one, other = tensors.get(f"gate_{by}"), tensors.get(f"up_{by}")
    return one is other or (one is not None and other is not None and torch.equal(one, other))
