"""Calls that change nothing: dropout in eval, aliases, casts to the dtype at hand, whole slices, copies, assertions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .normal_form_edit import argument, aten, insert, is_call, replace, same_shape, shape, value

_ASSERTIONS = {"_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size", "_check"}
_SAME = {aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default, aten.contiguous.default,
         aten.positive.default, aten.resolve_conj.default, aten.resolve_neg.default}
_DROPOUTS = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.feature_alpha_dropout.default}
_CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default}


def drop_noop(node: fx.Node) -> bool:
    """Remove or shorten one call. True when it changed."""
    if node.op == "call_module" and str(node.target) == "_guards_fn":
        node.graph.erase_node(node)
        return True
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target._schema.name.rpartition("::")[2] in _ASSERTIONS and not node.users:
        node.graph.erase_node(node)
        return True
    source = _unchanged(node)
    if source is not None:
        replace(node, source)
        return True
    return _plain_cast(node) or _open_slice(node)


def drop_detached(node: fx.Node) -> bool:
    """Remove a call that only keeps gradients from passing, where none will. True when it changed."""
    source = node.kwargs.get("self")
    if not is_call(node, aten.detach.default) or not isinstance(source, fx.Node):
        return False
    replace(node, source)
    return True


def _unchanged(node: fx.Node) -> fx.Node | None:
    """The argument that a call hands on as it is."""
    source = node.kwargs.get("self", node.kwargs.get("input"))
    if not isinstance(source, fx.Node):
        return None
    known = value(source)
    if is_call(node, aten.resolve_conj.default, aten.clone.default) and known is not None and known.is_complex():
        return None     # it may be a conjugate that is not in memory, and view_as_real() asks for one that is
    if node.target in _SAME or (node.target in _DROPOUTS and (node.kwargs.get("train") is False or node.kwargs.get("p") == 0)):
        return source
    if is_call(node, aten.clone.default):
        return None if _leaves_with_input(node, source) else source
    if is_call(node, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
        return source if _neutral(node, source) else None
    if is_call(node, aten.copy.default):  # what it writes over is gone
        written = node.kwargs["src"]
        return written if isinstance(written, fx.Node) and _same_type(node, written) and same_shape(shape(written), shape(node)) else None
    if is_call(node, aten.slice_scatter.default):
        written = node.kwargs["src"]
        return written if isinstance(written, fx.Node) and _whole(node, source) else None
    if is_call(node, aten.slice.Tensor) and _whole(node, source):
        return source
    if node.target in _CASTS and _same_type(node, source):
        return source
    if is_call(node, aten.expand.default, aten.reshape.default, aten.view.default) and same_shape(shape(source), shape(node)):
        return source
    return None


def _neutral(node: fx.Node, source: fx.Node) -> bool:
    """x + 0, x - 0, x * 1, x / 1, where the dtype stays. Of floats x + 0 turns -0 into 0: see `_starts_a_sum`."""
    before, number = value(source), node.kwargs["other"]
    if before is None or isinstance(number, (bool, fx.Node)) or not _same_type(node, source):
        return False
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        inexact = is_call(node, aten.add.Tensor) and (before.is_floating_point() or before.is_complex())
        return type(number) is int and number == 0 and "alpha" not in node.kwargs and (not inexact or _starts_a_sum(node))
    return bool(number == 1)


def _starts_a_sum(node: fx.Node) -> bool:
    """Whether 0 + x is what Python's sum() begins with: only added to more terms. The sum is the same without the 0; where every term is -0
    it is -0 instead of 0, which compares equal.
    """
    return bool(node.users) and all(is_call(user, aten.add.Tensor) and _is_term(user, node) for user in node.users)


def _is_term(add: fx.Node, node: fx.Node) -> bool:
    other = add.kwargs["other"] if add.kwargs["self"] is node else add.kwargs["self"]
    return isinstance(other, fx.Node) and value(other) is not None and "alpha" not in add.kwargs


def _leaves_with_input(node: fx.Node, source: fx.Node) -> bool:
    """Whether a copy is what keeps a caller from holding the model's own input or weight."""
    return any(user.op == "output" for user in node.users) and not (source.op == "call_function" and value(source) is not None)


def _whole(node: fx.Node, source: fx.Node) -> bool:
    start, end, step = argument(node, "start"), argument(node, "end"), argument(node, "step")
    if start not in (None, 0) or step != 1:
        return False
    open_end = end is None or (isinstance(end, int) and end >= 2**62)
    return open_end or (is_call(node, aten.slice.Tensor) and same_shape(shape(source), shape(node)))


def _same_type(node: fx.Node, source: fx.Node) -> bool:
    before, after = value(source), value(node)
    return before is not None and after is not None and before.dtype == after.dtype and before.device == after.device


def _plain_cast(node: fx.Node) -> bool:
    """Every cast that only changes the dtype is aten.to.dtype."""
    if node.target not in _CASTS or (node.target is aten.to.dtype and set(node.kwargs) == {"self", "dtype"}):
        return False
    before, after = value(node.kwargs.get("self")), value(node)
    if before is None or after is None or before.device != after.device:
        return False
    replace(node, insert(node, aten.to.dtype, after, self=node.kwargs["self"], dtype=after.dtype))
    return True


def _open_slice(node: fx.Node) -> bool:
    """A slice from 0, or to the largest integer, is one without that end."""
    if not is_call(node, aten.slice.Tensor, aten.slice_scatter.default):
        return False
    kwargs: dict[str, Any] = dict(node.kwargs)
    if kwargs.get("start") == 0 and isinstance(kwargs["start"], int):
        del kwargs["start"]
    if isinstance(kwargs.get("end"), int) and kwargs["end"] >= 2**62:
        del kwargs["end"]
    if kwargs == node.kwargs:
        return False
    node.kwargs = kwargs
    return True
