"""Norms written by hand → aten.rms_norm and aten.layer_norm.

    x * rsqrt(mean(x**2, -1) + eps) * weight                       → rms_norm(x, weight, eps)
    (x - mean(x)) / sqrt(var(x) + eps) * weight + bias              → layer_norm(x, weight, bias, eps)

In float32 and float64 only: in a narrower type the by-hand formula rounds where the single operation does not. Llama's upcast to float32 is
a no-op for a float32 model and has vanished before this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .normal_form_edit import argument, aten, from_parameters, insert, is_call, only_user, rank, replace, same_shape, shape, value


@dataclass(frozen=True)
class _Normed:
    """x / sqrt(mean(x**2) + eps), of x itself or of x - mean(x)."""

    x: fx.Node
    eps: float
    centred: bool


def name_norm(node: fx.Node) -> bool:
    """Replace a by-hand norm whose product of x and 1/root is `node`. True when it changed."""
    if not is_call(node, aten.mul.Tensor, aten.div.Tensor):
        return False
    known = value(node)
    if known is None or known.dtype not in (torch.float32, torch.float64) or not known.dim() or not isinstance(known.shape[-1], int):
        return False
    found = _normed(node)
    if found is None or not same_shape(shape(found.x), tuple(known.shape)):
        return False
    last, weight = _affine(node, aten.mul.Tensor)
    last, bias = _affine(last, aten.add.Tensor) if weight is not None and found.centred else (last, None)
    kwargs = {"input": found.x, "normalized_shape": [known.shape[-1]]} | ({"weight": weight} if weight is not None else {})
    kwargs |= {"bias": bias} if bias is not None else {}
    target = aten.layer_norm.default if found.centred else aten.rms_norm.default
    replace(last, insert(last, target, last.meta["val"], **kwargs, eps=found.eps))
    return True


def _normed(node: fx.Node) -> _Normed | None:
    for x, root in _products(node):
        if root is None or not isinstance(x, fx.Node) or not is_call(root[0], aten.add.Tensor) or argument(root[0], "alpha") != 1:
            continue
        moment, eps = root[0].kwargs["self"], root[0].kwargs["other"]
        if not isinstance(eps, float) or not isinstance(moment, fx.Node):
            continue
        mean = _centre(x)
        if _is_mean_square(moment, x):
            return _Normed(x, eps, False) if mean is None else _Normed(mean, eps, True)
        if mean is not None and _is_variance(moment, mean):
            return _Normed(mean, eps, True)
    return None


def _products(node: fx.Node) -> list[tuple[Any, tuple[fx.Node] | None]]:
    """(factor, (what is under the root of the other factor,)) for x * rsqrt(s), x * (1 / sqrt(s)) and x / sqrt(s)."""
    a, b = node.kwargs["self"], node.kwargs["other"]
    if is_call(node, aten.div.Tensor):
        return [(a, (b.kwargs["self"],) if is_call(b, aten.sqrt.default) else None)]
    return [(a, _inverse_root(b)), (b, _inverse_root(a))]


def _inverse_root(node: Any) -> tuple[fx.Node] | None:
    if is_call(node, aten.rsqrt.default):
        return (node.kwargs["self"],)
    if is_call(node, aten.reciprocal.default) and is_call(node.kwargs["self"], aten.sqrt.default):
        return (node.kwargs["self"].kwargs["self"],)
    if is_call(node, aten.pow.Tensor_Scalar) and node.kwargs["exponent"] == -0.5:
        return (node.kwargs["self"],)
    return None


def _is_mean(node: Any, of: fx.Node) -> bool:
    if not is_call(node, aten.mean.dim) or node.kwargs["self"] is not of or not argument(node, "keepdim"):
        return False
    return list(node.kwargs["dim"]) in ([-1], [(rank(of) or 0) - 1])


def _is_mean_square(node: fx.Node, x: fx.Node) -> bool:
    square = node.kwargs.get("self")
    if not isinstance(square, fx.Node) or not _is_mean(node, square):
        return False
    if is_call(square, aten.pow.Tensor_Scalar):
        return square.kwargs["self"] is x and square.kwargs["exponent"] == 2
    return (is_call(square, aten.square.default) and square.kwargs["self"] is x) or (
        is_call(square, aten.mul.Tensor) and square.kwargs["self"] is x and square.kwargs["other"] is x)


def _is_variance(node: fx.Node, x: fx.Node) -> bool:
    if not is_call(node, aten.var.correction, aten.var.dim) or node.kwargs["self"] is not x or not argument(node, "keepdim"):
        return False
    biased = argument(node, "correction") == 0 if is_call(node, aten.var.correction) else argument(node, "unbiased") is False
    dim = node.kwargs.get("dim")
    return biased and isinstance(dim, (list, tuple)) and list(dim) in ([-1], [(rank(x) or 0) - 1])


def _centre(node: fx.Node) -> fx.Node | None:
    """x of x - mean(x, -1, keepdim=True)."""
    if not is_call(node, aten.sub.Tensor) or argument(node, "alpha") != 1:
        return None
    x, mean = node.kwargs["self"], node.kwargs["other"]
    return x if isinstance(x, fx.Node) and _is_mean(mean, x) else None


def _affine(node: fx.Node, target: Any) -> tuple[fx.Node, fx.Node | None]:
    """(the node after it, the vector) when the only user of `node` multiplies or adds a parameter vector; else (node, None)."""
    user = only_user(node)
    if user is None or not is_call(user, target) or (target is aten.add.Tensor and argument(user, "alpha") != 1):
        return node, None
    vector = user.kwargs["other"] if user.kwargs["self"] is node else user.kwargs["self"]
    known, own = value(vector), value(node)
    if known is None or own is None or known.dim() != 1 or known.dtype != own.dtype or not same_shape(tuple(known.shape), tuple(own.shape[-1:])):
        return node, None
    return (user, vector) if from_parameters(vector) else (node, None)
