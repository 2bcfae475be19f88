"""The gradient of a layer's input through another mask of the weight than the one that the layer computes with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from .masked import plain
from .program import Region

aten = torch.ops.aten


class WayBack(nn.Module):
    """Stands in a graph in front of a linear layer or a convolution, and behind it: what goes back from y to x is multiplied with weight * mask.

    operator  of the layer; named: its arguments beside input, weight and bias
    mask      a bool buffer of the weight's shape
    """

    mask: Tensor

    def __init__(self, operator: Callable[..., Tensor], named: Mapping[str, Any], mask: Tensor) -> None:
        super().__init__()
        self._operator, self._named = operator, dict(named)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """In front, of x alone: x, from which no gradient goes back. Behind, of all three: y, from which one goes to x."""
        acts = plain(x) and torch.is_grad_enabled() and x.requires_grad
        if y is None or weight is None:
            return x.detach() if acts else x
        if not acts:
            return y
        found: Tensor = _Back.apply(x, y, weight, self.mask, self)  # type: ignore[no-untyped-call]
        return found

    def back(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an x of that shape, which no layer depends on: it is linear."""
        if self._operator is aten.linear.default:
            return gradient @ weight.to(gradient.dtype)
        with torch.enable_grad():
            x = gradient.new_zeros(shape, requires_grad=True)
            y = self._operator(input=x, weight=weight.to(gradient.dtype), bias=None, **self._named)
            return torch.autograd.grad(y, x, gradient)[0]


class _Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, weight: Tensor, mask: Tensor, owner: WayBack) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.owner, ctx.shape, ctx.dtype = owner, x.shape, x.dtype
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        weight, mask = ctx.saved_tensors
        return ctx.owner.back(gradients[0], weight * mask, ctx.shape).to(ctx.dtype), gradients[0], None, None, None


def tap_backward(region: Region, name: str, product: fx.Node) -> tuple[WayBack, ...]:
    """Put a WayBack, which keeps everything at first, around each layer that reads a product weight * mask."""
    weight = next(source for source in product.all_input_nodes if source.op == "get_attr" and source.meta["val"].dtype != torch.bool)
    made: list[WayBack] = []
    for op in [user for user in product.users if user.kwargs.get("weight") is product]:
        assert callable(op.target)
        named = {key: value for key, value in op.kwargs.items() if key not in ("input", "weight", "bias")}
        back = WayBack(op.target, named, torch.ones(weight.meta["val"].shape, dtype=torch.bool))
        region.module.add_module(f"{name}_back_{len(made)}", back)
        source = op.kwargs["input"]
        with region.graph.inserting_before(op):
            front = region.graph.call_module(f"{name}_back_{len(made)}", (source,))
        with region.graph.inserting_after(op):
            behind = region.graph.call_module(f"{name}_back_{len(made)}", (source, op, weight))
        op.kwargs = {**op.kwargs, "input": front}
        op.replace_all_uses_with(behind, delete_user_cb=lambda user, behind=behind: user is not behind)  # type: ignore[misc]
        made.append(back)
    return tuple(made)
