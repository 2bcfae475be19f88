"""A linear layer over a weight in a storage format that trains: its kept values are the parameter, and nothing dense is made of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from . import catalog
from .errors import KernelError
from .formats._base import Format
from .operands import PACKED, operands, operator_of, packed_operator
from .program import Program, Region
from .target import host

INDEXED = 1 << 30   # numbers of x or y that kernels count in 32 bits, with room for what panels are filled up with


class Packed(nn.Module):
    """Stands in a graph for sparsify.linear_<format>: parameter `values` and index buffers under the format's own names; kept places may move.

    On a CPU in float32 (to which x in 16 bits is brought) forward and backward run by kernels over the kept places; elsewhere, and where an export
    looks, it is the op.

    wanted  keep the gradient of the dense weight, the sum over the backward passes since take()
    """

    values: nn.Parameter

    def __init__(self, operator: str, kind: type[Format], tensors: Mapping[str, Tensor], attributes: Mapping[str, int], trained: bool) -> None:
        super().__init__()
        self._operator, self._kind, self._attributes = operator, kind, dict(attributes)
        self.wanted, self.smoothed = False, None
        self._sum: Tensor | None = None
        self._bound: tuple[list[tuple[Tensor, int]], Any] | None = None
        self.values = nn.Parameter(tensors["values"].detach(), trained)
        for name in kind.TENSORS:
            if name != "values":
                self.register_buffer(name, tensors[name])
        self.register_load_state_dict_pre_hook(_make_room)  # type: ignore[no-untyped-call]

    @property
    def stored(self) -> Format:
        """The weight as it is now, without gradients; it stays what it is when the kept places move."""
        fields: dict[str, Any] = self._tensors() | self._attributes | {"values": self.values.detach()}
        return self._kind(**fields)

    @property
    def index_bytes(self) -> int:
        """Of what kernels keep beside this module's tensors, once they have run."""
        return 0 if self._bound is None or self._bound[1] is None else int(self._bound[1].index_bytes)

    def put(self, form: Format) -> None:
        """Take another weight of the same format, whose kept places may be others. The parameter stays the same object; its gradient is dropped."""
        for name in self._kind.TENSORS:
            if name != "values":
                setattr(self, name, getattr(form, name))
        _reshape(self.values, form.values)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features] of its dtype."""
        kernels = self._kernels(x, bias)
        if kernels is None:
            y: Tensor = catalog.get("op", self._operator).op(x, **self._tensors(), bias=bias, **self._attributes)
        else:
            y = _Product.apply(x, self.values, bias, kernels)  # type: ignore[no-untyped-call]
        if self.wanted and type(x) is Tensor and y.requires_grad:
            y.register_hook(partial(self._add, x.detach()))  # type: ignore[no-untyped-call]
        return y

    def take(self) -> Tensor | None:
        """The sum of the dense gradients, [out_features, in_features]; None where none has come. It starts again at none."""
        found, self._sum = self._sum, None
        return found

    def _add(self, x: Tensor, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).to(self.values.dtype)
        dense = rows.T @ x.reshape(-1, x.shape[-1]).to(self.values.dtype)
        self._sum = dense if self._sum is None else self._sum + dense

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._kind.TENSORS}

    def _kernels(self, x: Tensor, bias: Tensor | None) -> Any:
        """Those of the kept places as they are; None where there are none for such a call."""
        floats = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and (bias is None or bias.dtype == torch.float32)
        plain = type(x) is Tensor and type(self.values) is nn.Parameter and x.device.type == self.values.device.type == "cpu"
        if not plain or not floats or self.values.dtype != torch.float32 or torch.compiler.is_compiling():
            return None
        rows = x.numel() // max(1, x.shape[-1]) if x.dim() else 0
        largest = rows * max(self._attributes.values())
        if min(rows, self.values.numel()) == 0 or largest >= INDEXED or x.shape[-1] != self._attributes["in_features"]:
            return None
        index = [tensor for name, tensor in self._tensors().items() if name != "values"]
        if self._bound is None or any(a is not b or a._version != version for a, (b, version) in zip(index, self._bound[0], strict=True)):
            self._bound = [(tensor, tensor._version) for tensor in index], self._bind()
        return self._bound[1]

    def _bind(self) -> Any:
        if host().arch not in importlib.import_module(".codegen.runtime", __package__).ARCHITECTURES:
            return None
        trained = importlib.import_module(".codegen.trained", __package__)
        try:
            return trained.TrainedLinear(self._operator, {name: tensor.detach() for name, tensor in self._tensors().items()}, self._attributes)
        except KernelError:
            return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sum": None, "_bound": None}


class _Product(torch.autograd.Function):
    """x Wᵀ + bias and its gradients by kernels. What is kept for the backward pass of x is its packed copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, kernels: Any) -> Tensor:
        matrix = x.reshape(-1, x.shape[-1]).float().contiguous()
        packed = kernels.pack(matrix)
        ctx.kernels, ctx.shape, ctx.dtype = kernels, x.shape, x.dtype
        ctx.save_for_backward(packed if ctx.needs_input_grad[1] else None, values)
        y: Tensor = kernels.product(packed, matrix.shape[0], values, bias)
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        packed, values = ctx.saved_tensors
        rows = gradients[0].reshape(-1, gradients[0].shape[-1]).float().contiguous()
        for_x = for_values = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            turned = ctx.kernels.pack_gradient(rows)
        if ctx.needs_input_grad[0]:
            for_x = ctx.kernels.input_gradient(turned, rows.shape[0], values).to(ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            for_values = ctx.kernels.value_gradient(turned, packed, values)
        return for_x, for_values, rows.sum(0) if ctx.needs_input_grad[2] else None, None


def put_packed(program: Program, trained: Mapping[tuple[str, str], bool]) -> dict[fx.Node, Packed]:
    """Let a Packed take the place of every packed linear of a Program's graphs: by the node that now calls it.

    trained  (path of the region, name of a weight) -> does it train?
    """
    made: dict[fx.Node, Packed] = {}
    for region, node in program.nodes():
        if packed_operator(node) == "linear":
            name = str(node.kwargs["values"].target).removesuffix(".values")  # type: ignore[union-attr]
            call, module = _call(region, node, name, trained.get((region.path, name.removesuffix("_packed")), True))
            made[call] = module
    return made


def _call(region: Region, node: fx.Node, name: str, trained: bool) -> tuple[fx.Node, Packed]:
    owner, _, last = name.rpartition(".")
    parent = region.module.get_submodule(owner)
    module = parent._modules[last]
    if not isinstance(module, Packed):
        tensors, attributes, _ = operands(region, node)
        kind = catalog.get("format", PACKED.fullmatch(str(node.target))[2])  # type: ignore[index]
        module = Packed(operator_of(node), kind, tensors, attributes, trained)
        parent.add_module(last, module)
    with region.graph.inserting_before(node):
        call = region.graph.call_module(name, (node.kwargs["x"], node.kwargs.get("bias")))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    region.graph.erase_node(node)
    return call, module


def _reshape(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values, of another shape maybe. Who has been told of its old shape, a graph that is not yet freed, forgets it."""
    trained, dtype = parameter.requires_grad, torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.grad = None
    parameter.data = torch.empty(0, dtype=dtype)  # torch makes a new accumulator of gradients where the dtype changes, and only there
    parameter.data = values.detach()
    parameter.requires_grad_(trained)


def _make_room(module: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Before a state is loaded whose kept places are of another number."""
    assert isinstance(module, Packed)
    for name, tensor in module._tensors().items():
        given = state.get(prefix + name)
        if isinstance(given, Tensor) and given.shape != tensor.shape and given.dim() == tensor.dim():
            fresh = torch.empty(given.shape, dtype=tensor.dtype, device=tensor.device)
            if name == "values":
                _reshape(module.values, fresh)
            else:
                setattr(module, name, fresh)
