"""Attention written by hand → aten.scaled_dot_product_attention.

    softmax(q @ k.transpose(-1, -2) * scale + mask, -1) @ v         scale also as a division or on q, several masks, masked_fill, where

A boolean -inf fill stays a boolean mask; a finite fill becomes an additive one, so that a row that is masked whole averages as it did before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .normal_form_edit import argument, aten, insert, is_call, only_user, rank, same_shape, shape, value
from .normal_form_edit import replace as replace_node

_MATMULS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class _Scores:
    """q @ kᵀ * scale + the masks; `transposed` is kᵀ."""

    q: fx.Node
    transposed: fx.Node
    scale: float = 1.0
    added: tuple[fx.Node, ...] = ()
    filled: tuple[tuple[fx.Node, bool, float], ...] = ()  # (condition, whether it says what to keep, value elsewhere)


def name_attention(node: fx.Node) -> bool:
    """Replace attention by hand whose last product is `node`; shorten the scale of one that is named. True when it changed."""
    if is_call(node, aten.scaled_dot_product_attention.default):
        return _default_scale(node) or _open_mask(node)
    if not is_call(node, *_MATMULS):
        return False
    probabilities, v = node.kwargs["self"], _second(node)
    if not is_call(probabilities, aten.softmax.int) or only_user(probabilities) is None or not isinstance(v, fx.Node):
        return False
    dim, dims = probabilities.kwargs["dim"], rank(probabilities)
    before, after = value(probabilities.kwargs["self"]), value(probabilities)
    if dims is None or dim not in (-1, dims - 1) or before is None or after is None or before.dtype != after.dtype:
        return False
    scores = _scores(probabilities.kwargs["self"])
    if scores is None or not _fits(scores, v, dims):
        return False
    replace_node(node, _attention(node, _scale_of_query(scores), v, after.dtype))
    return True


def _second(node: fx.Node) -> Any:
    return node.kwargs.get("other", node.kwargs.get("mat2"))


def _scores(node: Any) -> _Scores | None:
    """Peel masks and scales off until the product of q and kᵀ. None when it is something else, or somebody else reads it."""
    if not isinstance(node, fx.Node) or only_user(node) is None:
        return None
    if is_call(node, *_MATMULS):
        q, k = node.kwargs["self"], _second(node)
        return _Scores(q, k) if isinstance(q, fx.Node) and isinstance(k, fx.Node) else None
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        number, inner = node.kwargs["other"], _scores(node.kwargs["self"])
        if inner is None or inner.added or inner.filled or isinstance(number, bool) or not isinstance(number, (int, float)):
            return None
        return replace(inner, scale=inner.scale * number if is_call(node, aten.mul.Tensor) else inner.scale / number)
    if is_call(node, aten.add.Tensor) and argument(node, "alpha") == 1:
        for inside, mask in ((node.kwargs["self"], node.kwargs["other"]), (node.kwargs["other"], node.kwargs["self"])):
            inner = _scores(inside)
            if inner is not None and isinstance(mask, fx.Node):
                return None if inner.filled else replace(inner, added=(*inner.added, mask))
    return _fill(node)


def _fill(node: fx.Node) -> _Scores | None:
    if is_call(node, aten.masked_fill.Scalar):
        inside, condition, keep, number = node.kwargs["self"], node.kwargs["mask"], False, node.kwargs["value"]
    elif is_call(node, aten.where.ScalarOther):
        inside, condition, keep, number = node.kwargs["self"], node.kwargs["condition"], True, node.kwargs["other"]
    elif is_call(node, aten.where.self):
        inside, condition, keep, number = node.kwargs["self"], node.kwargs["condition"], True, _constant(node.kwargs["other"])
    else:
        return None
    inner = _scores(inside)
    if inner is None or not isinstance(condition, fx.Node) or not isinstance(number, (int, float)) or number > -1e4:
        return None
    return replace(inner, filled=(*inner.filled, (condition, keep, float(number))))


def _constant(node: Any) -> float | None:
    """The number that a scalar tensor made by full() or scalar_tensor() holds."""
    if is_call(node, aten.full.default):
        number = node.kwargs["fill_value"]
    elif is_call(node, aten.scalar_tensor.default):
        number = node.kwargs["s"]
    else:
        return None
    return number if isinstance(number, (int, float)) else None


def _fits(scores: _Scores, v: fx.Node, dims: int) -> bool:
    """Whether the shapes are those of attention: one rank, the same leading sizes, masks that broadcast by rank."""
    q, k, values = shape(scores.q), shape(scores.transposed), shape(v)
    if q is None or k is None or values is None or not len(q) == len(k) == len(values) == dims or dims < 3:
        return False
    masks = [*scores.added, *(condition for condition, _, _ in scores.filled)]
    if any(rank(mask) not in (2, dims) for mask in masks):
        return False
    return same_shape(q[:-2], k[:-2]) and same_shape(q[:-2], values[:-2])


def _scale_of_query(scores: _Scores) -> _Scores:
    """A number that multiplies q is part of the scale."""
    q = scores.q
    if is_call(q, aten.mul.Tensor, aten.div.Tensor) and only_user(q) is not None:
        number = q.kwargs["other"]
        if isinstance(number, (int, float)) and not isinstance(number, bool) and isinstance(q.kwargs["self"], fx.Node):
            return replace(scores, q=q.kwargs["self"], scale=scores.scale * number if is_call(q, aten.mul.Tensor) else scores.scale / number)
    return scores


def _attention(node: fx.Node, scores: _Scores, v: fx.Node, dtype: torch.dtype) -> fx.Node:
    kwargs: dict[str, Any] = {"query": scores.q, "key": _key(node, scores.transposed), "value": v}
    mask = _mask(node, scores, dtype)
    if mask is not None:
        kwargs["attn_mask"] = mask
    if not _is_default(scores.scale, scores.q):
        kwargs["scale"] = scores.scale
    return insert(node, aten.scaled_dot_product_attention.default, node.meta["val"], **kwargs)


def _key(node: fx.Node, transposed: fx.Node) -> fx.Node:
    dims = rank(transposed) or 0
    if is_call(transposed, aten.transpose.int):
        swapped = {transposed.kwargs["dim0"] % dims, transposed.kwargs["dim1"] % dims}
        if swapped == {dims - 1, dims - 2}:
            source: fx.Node = transposed.kwargs["self"]
            return source
    return insert(node, aten.transpose.int, self=transposed, dim0=-1, dim1=-2)


def _mask(node: fx.Node, scores: _Scores, dtype: torch.dtype) -> fx.Node | None:
    """All masks as one: boolean when that says it exactly, else additive in the dtype of q."""
    if not scores.added and len(scores.filled) == 1 and scores.filled[0][2] == -math.inf:
        condition, keep, _ = scores.filled[0]
        return condition if keep else insert(node, aten.logical_not.default, self=condition)
    parts = [_cast(node, mask, dtype) for mask in scores.added]
    for condition, keep, number in scores.filled:
        chosen = {"self": 0.0, "other": number} if keep else {"self": number, "other": 0.0}
        parts.append(_cast(node, insert(node, aten.where.Scalar, condition=condition, **chosen), dtype))
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = insert(node, aten.add.Tensor, self=total, other=part)
    return total


def _cast(node: fx.Node, mask: fx.Node, dtype: torch.dtype) -> fx.Node:
    known = value(mask)
    return mask if known is None or known.dtype == dtype else insert(node, aten.to.dtype, self=mask, dtype=dtype)


def _is_default(scale: Any, q: Any) -> bool:
    sizes = shape(q)
    if sizes is None or not isinstance(sizes[-1], int) or not isinstance(scale, float):
        return False
    return math.isclose(scale, 1 / math.sqrt(sizes[-1]), rel_tol=1e-6)


def _default_scale(node: fx.Node) -> bool:
    if "scale" not in node.kwargs or not _is_default(node.kwargs["scale"], node.kwargs["query"]):
        return False
    node.kwargs = {name: given for name, given in node.kwargs.items() if name != "scale"}
    return True


def _open_mask(node: fx.Node) -> bool:
    """A mask that lets everything through, as transformers builds for images when it is traced, is none."""
    if "attn_mask" not in node.kwargs or not _is_true(node.kwargs["attn_mask"]):
        return False
    node.kwargs = {name: given for name, given in node.kwargs.items() if name != "attn_mask"}
    return True


def _is_true(node: Any) -> bool:
    """Whether every element of a boolean tensor is known to be True."""
    known = value(node)
    if known is None or known.dtype != torch.bool:
        return False
    if is_call(node, aten.ones.default, aten.new_ones.default, aten.ones_like.default):
        return True
    if is_call(node, aten.ge.Scalar):
        return node.kwargs["other"] == 0 and _is_range(node.kwargs["self"])
    if is_call(node, aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default):
        return _is_true(node.kwargs["self"]) and _is_true(node.kwargs["other"])
    return is_call(node, *_VIEWS) and _is_true(node.kwargs["self"])


def _is_range(node: Any) -> bool:
    """Whether a tensor is arange(n), whatever its shape now: nothing in it is negative."""
    return is_call(node, aten.arange.default) or (is_call(node, *_VIEWS) and _is_range(node.kwargs["self"]))


_VIEWS = (aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.slice.Tensor, aten.transpose.int, aten.permute.default)
