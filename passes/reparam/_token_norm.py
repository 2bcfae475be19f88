"""BatchNorm over the last dimension, however a model of tokens spells it: transposed there and back, flattened there and back, or as it is."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from sparsify_compiler.fold import is_constant
from sparsify_compiler.normal_form_edit import argument, aten, is_call, rank, same_shape, shape

_TURNS = (aten.transpose.int, aten.permute.default)
_FOLDS = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)


@dataclass(frozen=True)
class TokenNorm:
    """batch_norm of `x` [..., C] with fixed statistics. mean, var, g and beta are nodes (g and beta may be None); `nodes` are those that it takes."""

    x: fx.Node
    mean: fx.Node
    var: fx.Node
    g: fx.Node | None
    beta: fx.Node | None
    eps: float
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Entry:
    """What a linear reads: `x`, perhaps behind a norm; `nodes` are the norm's and those that only look at x another way and back."""

    x: Any
    norm: TokenNorm | None
    nodes: tuple[fx.Node, ...]


def entry(node: Any) -> Entry:
    """The value behind a norm, and behind views that undo each other (where a norm was folded away from between them)."""
    taken: tuple[fx.Node, ...] = ()
    while (before := _undone(node)) is not None:
        taken = (before, node, *taken)
        node = before.kwargs["self"]
    norm = token_norm(node)
    return Entry(node, None, taken) if norm is None else Entry(norm.x, norm, (*norm.nodes, *taken))


def _undone(node: Any) -> fx.Node | None:
    """The view that this view takes back."""
    before = node.kwargs.get("self") if isinstance(node, fx.Node) else None
    if is_call(node, *_TURNS) and is_call(before, *_TURNS):
        first, second = _order(before), _order(node)
        return before if [first[d] for d in second] == list(range(len(first))) else None
    if is_call(node, *_FOLDS) and is_call(before, *_FOLDS):
        return before if same_shape(shape(before.kwargs["self"]), shape(node)) else None
    return None


def token_norm(node: Any) -> TokenNorm | None:
    """The norm whose result a node is, or None."""
    if rank(node) == 2 and (norm := _norm(node)) is not None:
        return norm
    if is_call(node, *_TURNS):
        norm = _norm(node.kwargs["self"])
        before = None if norm is None else norm.x
        if norm is not None and is_call(before, *_TURNS) and _there_and_back(before, node):
            return _around(norm, before, node)
    if is_call(node, *_FOLDS):
        norm = _norm(node.kwargs["self"])
        before = None if norm is None else norm.x
        if norm is not None and is_call(before, *_FOLDS) and rank(before) == 2:
            sizes, flat = shape(before.kwargs["self"]), shape(before)
            if same_shape(sizes, shape(node)) and same_shape((sizes or ())[-1:], (flat or ())[-1:]):
                return _around(norm, before, node)
    return None


def _around(norm: TokenNorm, before: Any, after: fx.Node) -> TokenNorm:
    return TokenNorm(before.kwargs["self"], norm.mean, norm.var, norm.g, norm.beta, norm.eps, (before, *norm.nodes, after))


def _norm(node: Any) -> TokenNorm | None:
    """batch_norm over dimension 1, by either of its names, in inference."""
    taken = [node]
    if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]
        taken = [node, *taken]
        if not is_call(node, aten._native_batch_norm_legit_no_training.default):
            return None
    elif not is_call(node, aten.batch_norm.default) or argument(node, "training") is not False:
        return None
    mean, var = argument(node, "running_mean"), argument(node, "running_var")
    g, beta = argument(node, "weight"), argument(node, "bias")
    if not isinstance(mean, fx.Node) or not isinstance(var, fx.Node):
        return None
    if not all(is_constant(one) for one in (mean, var, g, beta) if one is not None):
        return None
    return TokenNorm(node.kwargs["input"], mean, var, g, beta, argument(node, "eps"), tuple(taken))


def _there_and_back(before: fx.Node, after: fx.Node) -> bool:
    """Whether the first brings the last dimension to place 1 and the second undoes the first."""
    first, second = _order(before), _order(after)
    return len(first) == len(second) > 2 and first[1] == len(first) - 1 and [first[d] for d in second] == list(range(len(first)))


def _order(node: Any) -> list[int]:
    """Which dimension of the source each dimension of a transpose or permute is."""
    dims = rank(node) or 0
    if is_call(node, aten.permute.default):
        return [d % dims for d in node.kwargs["dims"]]
    order = list(range(dims))
    a, b = node.kwargs["dim0"] % dims, node.kwargs["dim1"] % dims
    order[a], order[b] = order[b], order[a]
    return order
