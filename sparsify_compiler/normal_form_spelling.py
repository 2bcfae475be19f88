"""What aten can say in several ways, said in one: reshape, transposed matrix, scalar arithmetic, softmax, linear, convolution."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from .normal_form_edit import Call, Overload, argument, aten, from_parameters, insert, is_call, rank, replace, same_shape, shape, value

_RENAMED: dict[Overload, tuple[Overload, dict[str, str]]] = {
    aten.view.default: (aten.reshape.default, {"size": "shape"}),
    aten._unsafe_view.default: (aten.reshape.default, {"size": "shape"}),
    aten.numpy_T.default: (aten.t.default, {}),
    aten.add.Scalar: (aten.add.Tensor, {}),
    aten.sub.Scalar: (aten.sub.Tensor, {}),
    aten.mul.Scalar: (aten.mul.Tensor, {}),
    aten.div.Scalar: (aten.div.Tensor, {}),
    aten.multiply.Tensor: (aten.mul.Tensor, {}),
    aten.subtract.Tensor: (aten.sub.Tensor, {}),
    aten.divide.Tensor: (aten.div.Tensor, {}),
    aten.true_divide.Tensor: (aten.div.Tensor, {}),
    aten.concat.default: (aten.cat.default, {}),
    aten.swapaxes.default: (aten.transpose.int, {"axis0": "dim0", "axis1": "dim1"}),
    aten.swapdims.default: (aten.transpose.int, {}),
}


def respell(node: fx.Node) -> bool:
    """Bring one call with named arguments to its one spelling. True when it changed."""
    if node.op != "call_function":
        return False
    return any(rewrite(node) for rewrite in (_rename, _matrix_transpose, _softmax, _matmul, _addmm, _linear_over_leading, _convolution,
                                              _stored_norm))


def _rename(node: fx.Node) -> bool:
    if not is_call(node, *_RENAMED) or (is_call(node, aten.numpy_T.default) and rank(node.kwargs["self"]) not in (None, 2)):
        return False
    overload, names = _RENAMED[node.target]
    replace(node, insert(node, overload, node.meta.get("val"), **{names.get(k, k): v for k, v in node.kwargs.items()}))
    return True


def _matrix_transpose(node: fx.Node) -> bool:
    """transpose and permute of a matrix are aten.t."""
    if not is_call(node, aten.transpose.int, aten.permute.default) or rank(node) != 2:
        return False
    dims = node.kwargs.get("dims") or [node.kwargs["dim0"], node.kwargs["dim1"]]
    if ([d % 2 for d in dims] == [0, 1] and is_call(node, aten.permute.default)) or {d % 2 for d in dims} != {0, 1}:
        return False
    replace(node, insert(node, aten.t.default, node.meta["val"], self=node.kwargs["self"]))
    return True


def _softmax(node: fx.Node) -> bool:
    if not is_call(node, aten._softmax.default) or node.kwargs["half_to_float"]:
        return False
    replace(node, insert(node, aten.softmax.int, node.meta.get("val"), self=node.kwargs["self"], dim=node.kwargs["dim"]))
    return True


def _matmul(node: fx.Node) -> bool:
    """x @ w, with w a matrix of parameters alone → linear(x, t(w))."""
    if not is_call(node, aten.matmul.default, aten.mm.default):
        return False
    x, w = node.kwargs["self"], node.kwargs.get("other", node.kwargs.get("mat2"))
    if not is_parameter_matrix(w) or from_parameters(x) or rank(x) in (0, 1):
        return False
    replace(node, insert(node, aten.linear.default, node.meta.get("val"), input=x, weight=transposed(w, node)))
    return True


def _addmm(node: fx.Node) -> bool:
    """addmm(bias, x, w) of parameters → linear(x, t(w), bias)."""
    if not is_call(node, aten.addmm.default) or argument(node, "alpha") != 1 or argument(node, "beta") != 1:
        return False
    bias, x, w = node.kwargs["self"], node.kwargs["mat1"], node.kwargs["mat2"]
    if not is_parameter_matrix(w) or not from_parameters(bias) or rank(bias) not in (None, 1) or from_parameters(x):
        return False
    replace(node, insert(node, aten.linear.default, node.meta.get("val"), input=x, weight=transposed(w, node), bias=bias))
    return True


def is_parameter_matrix(w: Any) -> bool:
    """Whether a value is a matrix computed from parameters alone. Without shapes (in a pattern) only get_attr counts."""
    if not isinstance(w, fx.Node) or not from_parameters(w):
        return False
    known = value(w)
    return known is None or known.dim() == 2


def transposed(w: fx.Node, before: fx.Node) -> fx.Node:
    """w transposed; the source itself when w is a transpose."""
    if is_call(w, aten.t.default):
        source = w.kwargs["self"]
        assert isinstance(source, fx.Node)
        return source
    return insert(before, aten.t.default, self=w)


def _linear_over_leading(node: fx.Node) -> bool:
    """reshape(linear(reshape(x, [-1, K])), [*leading, N]) → linear(x): GPT-2's Conv1D flattens tokens by hand."""
    if not is_call(node, aten.reshape.default):
        return False
    linear = node.kwargs["self"]
    if not is_call(linear, aten.linear.default):
        return False
    flat = linear.kwargs["input"]
    if not is_call(flat, aten.reshape.default) or rank(flat) != 2:
        return False
    x = flat.kwargs["self"]
    before, after, wide = shape(x), shape(node), shape(linear)
    if before is None or after is None or wide is None or not same_shape(before[:-1], after[:-1]):
        return False
    if not same_shape(before[-1:], (shape(flat) or ())[-1:]) or not same_shape(after[-1:], wide[-1:]):
        return False
    replace(node, insert(node, aten.linear.default, node.meta["val"], **{**linear.kwargs, "input": x}))
    return True


_CONVOLUTIONS = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
_DIMS = {overload: dims for dims, overload in _CONVOLUTIONS.items()}
_PADDED = {aten.conv1d.padding: 1, aten.conv2d.padding: 2, aten.conv3d.padding: 3}


def _convolution(node: fx.Node) -> bool:
    """convolution, _convolution and padding given as a word → conv{1,2,3}d with numbers."""
    if is_call(node, *_PADDED):
        return _padding_word(node)
    if is_call(node, *_CONVOLUTIONS.values()):
        return _full_lists(node)
    if not is_call(node, aten.convolution.default, aten._convolution.default) or node.kwargs["transposed"]:
        return False
    dims = len(node.kwargs["stride"])
    known = rank(node.kwargs["weight"])
    dims = known - 2 if known is not None else dims
    if dims not in _CONVOLUTIONS:
        return False
    kwargs = {k: node.kwargs[k] for k in ("input", "weight", "bias", "stride", "padding", "dilation", "groups")}
    replace(node, insert(node, _CONVOLUTIONS[dims], node.meta.get("val"), **kwargs))
    return True


def _padding_word(node: Call) -> bool:
    dims, word = _PADDED[node.target], argument(node, "padding")
    kernel = (shape(node.kwargs["weight"]) or ())[2:]
    dilation = _spread(argument(node, "dilation"), dims)
    if word == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=False)]
        if len(total) != dims or any(t % 2 for t in total):
            return False  # uneven padding has no other spelling
        padding = [t // 2 for t in total]
    else:
        padding = [0] * dims
    replace(node, insert(node, _CONVOLUTIONS[dims], node.meta.get("val"), **{**node.kwargs, "padding": padding}))
    return True


def _full_lists(node: Call) -> bool:
    """stride=[2] means [2, 2]."""
    dims = _DIMS[node.target]
    lists = [k for k in ("stride", "padding", "dilation") if k in node.kwargs and not isinstance(node.kwargs[k], fx.Node)]  # a pattern may bind one
    full = {k: _spread(v, dims) if k in lists else v for k, v in node.kwargs.items()}
    changed = any(list(full[k]) != node.kwargs[k] for k in lists)
    if changed:
        node.kwargs = full
    return changed


def _spread(number: Any, dims: int) -> list[Any]:
    if not isinstance(number, (list, tuple)):
        return [number] * dims
    return list(number) * dims if len(number) == 1 else list(number)


def _stored_norm(node: fx.Node) -> bool:
    """The first of the three results of a batch norm in eval mode, as decomposition spells it: aten.batch_norm. The others are empty."""
    if node.target is not operator.getitem or node.args[1] != 0 or not is_call(node.args[0], aten._native_batch_norm_legit_no_training.default):
        return False
    norm = node.args[0]
    assert isinstance(norm, fx.Node)
    replace(node, insert(node, aten.batch_norm.default, node.meta.get("val"), **norm.kwargs, training=False, cudnn_enabled=False))
    return True
