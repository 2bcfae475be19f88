"""weight * mask: where a graph holds it, and, in training, its gradient, which is that of the dense weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import InputError
from .fold import is_constant, is_mask_product
from .program import Region, get_tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class MaskedWeight:
    """The weight of an op that is weight * mask: the node of the product, and the names of its two tensors in the region."""

    product: fx.Node
    weight: str
    mask: str


def masked_weight(region: Region, node: fx.Node) -> MaskedWeight | None:
    """What an op (linear, convolution) reads as its weight, where that is a parameter times a bool buffer of its shape; else None."""
    product = node.kwargs.get("weight") if node.op == "call_function" else None
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        return None
    sources = [product.kwargs.get("self"), product.kwargs.get("other")]
    names = [str(source.target) for source in sources if isinstance(source, fx.Node) and source.op == "get_attr"]
    masks = [name for name in names if get_tensor(region.module, name).dtype == torch.bool]
    if len(names) != 2 or len(masks) != 1:
        return None
    weight = next(name for name in names if name not in masks)
    same = get_tensor(region.module, weight).shape == get_tensor(region.module, masks[0]).shape
    return MaskedWeight(product, weight, masks[0]) if same else None


def mask_product(region: Region, node: fx.Node) -> tuple[fx.Node, str] | None:
    """What an op reads as its weight, where that is a constant, of whatever parts, times a bool buffer of its shape: it, and the mask's name."""
    product = node.kwargs.get("weight") if node.op == "call_function" else None
    if not isinstance(product, fx.Node) or not is_mask_product(region, product) or not is_constant(product):
        return None
    masks = [one for one in product.all_input_nodes if one.op == "get_attr" and one.meta["val"].dtype == torch.bool]
    weights = [one for one in product.all_input_nodes if one not in masks]
    same = len(masks) == len(weights) == 1 and weights[0].meta["val"].shape == masks[0].meta["val"].shape
    return (weights[0], str(masks[0].target)) if same else None


def gate_products(region: Region) -> Iterator[tuple[fx.Node, str]]:
    """(gate * mask, name of the gate): a float parameter times a bool buffer of its shape, which multiplies values and is nobody's weight."""
    for node in region.graph.nodes:
        sources = node.all_input_nodes if is_mask_product(region, node) else []
        if len(sources) == 2 and all(one.op == "get_attr" for one in sources) and sources[0].meta["val"].shape == sources[1].meta["val"].shape:
            gates = [one for one in sources if one.meta["val"].is_floating_point()]
            if len(gates) == 1 and node.users and all(user.target is aten.mul.Tensor and not is_constant(user) for user in node.users):
                yield node, str(gates[0].target)


class Masked(nn.Module):
    """Stands in a graph for weight * mask. The gradient of the product is dense; the weight gets that of its kept places.

    wanted            keep the dense gradient, the sum over the backward passes since take()
    straight_through  the weight gets all of it (STE, arXiv:1308.3432)
    rest              share with which weights that are not kept count in a product that gradients are taken of; without gradients it is the mask's
    smoothed          a buffer of the weight's shape for who averages gradients over steps, or None
    backs             modules with a `mask` of their own for what goes back through the layers that read the product (masked_backward.py)
    pairs             modules that look at what goes through these layers (masked_pairs.py)
    """

    smoothed: Tensor | None
    backs: tuple[nn.Module, ...] = ()
    pairs: tuple[nn.Module, ...] = ()

    def __init__(self, straight_through: bool = False, smoothed: Tensor | None = None) -> None:
        super().__init__()
        self.wanted, self.straight_through, self.rest = False, straight_through, 0.0
        self.register_buffer("smoothed", smoothed)
        self._sum: Tensor | None = None

    def forward(self, weight: Tensor, mask: Tensor) -> Tensor:
        acts = self.wanted or self.straight_through or (self.rest and torch.is_grad_enabled())
        if not plain(weight) or not weight.requires_grad or not acts:
            return weight * mask
        rest = self.rest if torch.is_grad_enabled() else 0.0
        product: Tensor = _Product.apply(weight, mask, rest, self)  # type: ignore[no-untyped-call]
        return product

    def add(self, gradient: Tensor) -> None:
        """Take in the dense gradient of one backward pass."""
        if self.wanted:
            self._sum = gradient.clone() if self._sum is None else self._sum + gradient

    def take(self) -> Tensor | None:
        """The sum of the dense gradients, of the weight's shape and dtype; None where none has come. It starts again at none."""
        found, self._sum = self._sum, None
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sum": None}


def plain(x: Tensor) -> bool:
    """Is it a tensor, not one of the stand-ins that an export runs on? Those see what the graph means, and nothing of training."""
    return type(x) in (Tensor, nn.Parameter)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, rest: float, owner: Masked) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.rest, ctx.owner = rest, owner
        return _weighed(weight, mask, rest)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient, (mask,) = gradients[0], ctx.saved_tensors
        ctx.owner.add(gradient)
        return gradient if ctx.owner.straight_through else _weighed(gradient, mask, ctx.rest), None, None, None


def _weighed(x: Tensor, mask: Tensor, rest: float) -> Tensor:
    return torch.where(mask, x, x * rest) if rest else x * mask


def _like(weight: fx.Node) -> Tensor:
    """Zeros of the shape of a weight that is computed."""
    value = weight.meta["val"]
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)


def tap_product(region: Region, name: str, product: fx.Node, make: Callable[[Tensor], Masked]) -> Masked:
    """Let a Masked, made of the weight, take the place of a product of a region's graph, under a name of the region's module.

    Raises InputError where another has done so.
    """
    mask = next((source for source in product.all_input_nodes if source.op == "get_attr" and source.meta["val"].dtype == torch.bool), None)
    if mask is None:
        raise InputError("another pass moves this mask", where=str(product.meta.get("path", product.name)), hint="learn it, or move it")
    weight = next(source for source in product.all_input_nodes if source is not mask)
    made = make(get_tensor(region.module, str(weight.target)) if weight.op == "get_attr" else _like(weight))
    region.module.add_module(name, made)
    with region.graph.inserting_before(product):
        call = region.graph.call_module(name, (weight, mask))
    call.meta = dict(product.meta)
    product.replace_all_uses_with(call)
    region.graph.erase_node(product)
    return made
