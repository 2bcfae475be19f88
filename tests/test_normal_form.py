"""Normal form: one spelling, idempotent, same values; on the zoo, on formulas written by hand, and on patterns traced without shapes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, fx, nn
from torch.nn import functional

from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.capture_verify import close
from sparsify_compiler.errors import CaptureError
from sparsify_compiler.normal_form import normalise
from sparsify_compiler.program import Program


def names(program: Program) -> list[str]:
    """Names of the operators that a Program calls, in order."""
    return [str(node.target).removeprefix("aten.") for _, node in program.nodes() if node.op == "call_function"]


class Of(nn.Module):
    """A function of tensors with a few parameters."""

    def __init__(self, function: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, **dict(self.named_parameters()))


def of(function: Callable[..., Any], *inputs: Tensor, **shapes: tuple[int, ...]) -> Program:
    """The Program of a function; capture checks that the values are those of the function."""
    return capture(Of(function, **shapes).eval(), inputs)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", zoo.WHOLE)
def test_every_call_is_spelled_one_way(name: str) -> None:
    _, _, program = zoo.captured(name)
    for _, node in program.nodes():
        if node.op == "call_module" or node.op == "call_method":
            pytest.fail(node.format_node() or "")
        if node.op != "call_function" or node.target is operator.getitem or getattr(operator, node.target.__name__, None) is node.target:
            continue
        assert isinstance(node.target, torch._ops.OpOverload)
        assert node.args == ()
        assert not node.target._schema.is_mutable
        schema = {a.name: a for a in node.target._schema.arguments}
        for key, value in node.kwargs.items():
            default = schema[key].default_value if schema[key].has_default_value() else ...
            assert isinstance(value, fx.Node) or value is None or value != default
    banned = {"dropout.default", "contiguous.default", "view.default", "detach.default", "alias.default",
              "_assert_tensor_metadata.default", "clone.default"}
    assert not banned & set(names(program))


@pytest.mark.parametrize("name", zoo.WHOLE)
def test_idempotent_and_same_values(name: str) -> None:
    model, inputs, program = zoo.captured(name)
    again = program.clone()
    for region in again.regions.values():
        normalise(region.module)
    assert again.text() == program.text()
    fresh = {k: v + 1 if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        expected, actual = model(**fresh), instantiate(program)(**fresh)
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(actual), strict=True):
        assert not isinstance(a, Tensor) or close(a, b)


@pytest.mark.parametrize(("function", "shapes", "expected"), [
    (lambda t, w, b: torch.addmm(b, t, w), {"w": (4, 6), "b": (6,)}, ["t.default", "linear.default"]),
    (lambda t, w: t @ w, {"w": (4, 6)}, ["t.default", "linear.default"]),
    (lambda t, w: torch.mm(t, w.t()), {"w": (6, 4)}, ["linear.default"]),
    (lambda t, w: t.unsqueeze(0) @ w.transpose(0, 1), {"w": (6, 4)}, ["unsqueeze.default", "linear.default"]),
    (lambda t: t.view(4, 3).contiguous().clone() * 1, {}, ["reshape.default"]),
    (lambda t: functional.dropout(t, 0.5, False).to(torch.float32)[:, :].detach().relu_(), {}, ["relu.default"]),
    (lambda t: t * torch.sigmoid(t), {}, ["silu.default"]),
    (lambda t: 0.5 * t * (1 + torch.erf(t / math.sqrt(2))), {}, ["gelu.default"]),
    (lambda t: 0.5 * t * (1 + torch.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t * t * t))), {}, ["gelu.default"]),
    (lambda t, w: t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6) * w, {"w": (4,)}, ["rms_norm.default"]),
    (lambda t, w: w * (t / torch.sqrt((t * t).mean(-1, keepdim=True) + 1e-6)), {"w": (4,)}, ["rms_norm.default"]),
    (lambda t, w, b: w * ((t - t.mean(-1, keepdim=True)) / torch.sqrt(t.var(-1, keepdim=True, unbiased=False) + 1e-5)) + b,
     {"w": (4,), "b": (4,)}, ["layer_norm.default"]),
])
def test_formulas_by_hand(function: Callable[..., Any], shapes: dict[str, tuple[int, ...]], expected: list[str]) -> None:
    assert names(of(function, x(3, 4), **shapes)) == expected


@pytest.mark.parametrize("function", [
    lambda t: t * torch.rsqrt(t.pow(2).mean(0, keepdim=True) + 1e-6),  # the mean of another axis
    lambda t: t * torch.rsqrt(t.pow(2).sum(-1, keepdim=True) + 1e-6),  # a sum, no mean
    lambda t: (t - t.mean(-1, keepdim=True)) / torch.sqrt(t.var(-1, keepdim=True) + 1e-5),  # the unbiased variance
])
def test_what_is_no_norm_stays(function: Callable[..., Any]) -> None:
    assert not {"rms_norm.default", "layer_norm.default"} & set(names(of(function, x(3, 4))))


@pytest.mark.parametrize(("function", "expected"), [
    (lambda t, w: sum([functional.linear(t, w), t * 2, t.exp()]), ["linear.default", "mul.Tensor", "exp.default", "add.Tensor", "add.Tensor"]),
    (lambda t, w: t.relu() - 0, ["relu.default"]),  # exact: -0 - 0 is -0
    (lambda t, w: (t.sign().long() + 0).neg(), ["sign.default", "to.dtype", "neg.default"]),
    (lambda t, w: (0 + t).reciprocal(), ["add.Tensor", "reciprocal.default"]),  # 1 / -0 is not 1 / 0
    (lambda t, w: (t + 0.0) + t.exp(), ["add.Tensor", "exp.default", "add.Tensor"]),  # written by a user who means it
    (lambda t, w: ((t > 0) + 0) + t, ["gt.Scalar", "add.Tensor", "add.Tensor"]),  # makes integers of bools
    (lambda t, w: (0 + t).add(t.exp(), alpha=2), ["add.Tensor", "exp.default", "add.Tensor"]),
    (lambda t, w: (t + 0) + 1, ["add.Tensor", "add.Tensor"]),
])
def test_a_sum_begins_with_its_first_term(function: Callable[..., Any], expected: list[str]) -> None:
    assert names(of(function, x(3, 4), w=(4, 4))) == expected


def test_a_norm_in_bfloat16_stays_as_it_is_written() -> None:
    program = of(lambda t: t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + 1e-6), x(3, 4).bfloat16())
    assert "rms_norm.default" not in names(program)


MASK = torch.ones(5, 5, dtype=torch.bool).tril()


@pytest.mark.parametrize(("scores", "mask", "scale"), [
    (lambda q, k: q @ k.transpose(-1, -2) / math.sqrt(8), False, None),
    (lambda q, k: (q * 0.5) @ k.transpose(2, 3), False, 0.5),
    (lambda q, k: q @ k.mT * 0.25 + torch.zeros(5, 5).masked_fill(~MASK, -1e9), True, 0.25),
    (lambda q, k: (q @ k.transpose(-1, -2)).masked_fill(~MASK, -math.inf), True, 1.0),
    (lambda q, k: (q @ k.transpose(-1, -2)).masked_fill(~MASK, torch.finfo(torch.float32).min), True, 1.0),
    (lambda q, k: torch.where(MASK, q @ k.transpose(-1, -2), -math.inf), True, 1.0),
])
def test_attention_by_hand(scores: Callable[..., Tensor], mask: bool, scale: float | None) -> None:
    q, k, v = x(2, 3, 5, 8), x(2, 3, 5, 8).flip(0), x(2, 3, 5, 8).flip(1)
    program = of(lambda q, k, v: torch.softmax(scores(q, k), -1) @ v, q, k, v)
    (node,) = [n for _, n in program.nodes() if str(n.target) == "aten.scaled_dot_product_attention.default"]
    assert ("attn_mask" in node.kwargs) == mask
    assert node.kwargs.get("scale") == scale
    assert "softmax.int" not in names(program)


def test_attention_whose_weights_are_returned_stays() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Any:
        weights = torch.softmax(q @ k.transpose(-1, -2), -1)
        return weights @ v, weights

    q = x(2, 3, 5, 8)
    assert "softmax.int" in names(of(attend, q, q + 1, q + 2))


def test_convolutions() -> None:
    program = of(lambda t, w: functional.conv2d(t, w, padding="same") + functional.conv2d(t, w, stride=1, padding=1), x(1, 2, 5, 5), w=(2, 2, 3, 3))
    assert names(program) == ["conv2d.default", "add.Tensor"]  # the two are one call, made once
    node = next(n for _, n in program.nodes() if n.op == "call_function")
    assert {k: v for k, v in node.kwargs.items() if k not in ("input", "weight")} == {"padding": [1, 1]}


def test_in_place_on_a_view_goes_through_exports_own_functionalisation() -> None:
    def write(t: Tensor) -> Tensor:
        y = t * 2
        y[:, 1:].mul_(3)
        return y.relu_()

    program = of(write, x(3, 4))
    assert not any(isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable for _, n in program.nodes())


def test_in_place_keeps_the_dtype() -> None:
    program = of(lambda t, u: t.clone().mul_(2).add_(u), x(3, 4).bfloat16(), x(3, 4))
    assert next(iter(program.regions.values())).module(x(3, 4).bfloat16(), x(3, 4))[0].dtype == torch.bfloat16


def test_random_calls_are_not_merged() -> None:
    with pytest.raises(CaptureError, match="does not reproduce"):
        of(lambda t: torch.rand_like(t) - torch.rand_like(t), x(3, 4))


def test_patterns_come_to_the_same_form() -> None:
    def formula(t: Tensor, w: Tensor, b: Tensor) -> Any:
        y = functional.relu(functional.linear(t, w, b), inplace=True)
        y = functional.gelu(y) * 2 + 1
        return functional.softmax((1 - y).view(2, -1), dim=-1), functional.conv2d(t, w, b, padding=1), y[:, None].shape[0], y.float()

    traced = fx.symbolic_trace(formula)
    normalise(traced)
    calls = [n for n in traced.graph.nodes if n.op == "call_function"]
    assert [str(n.target).removeprefix("aten.") for n in calls] == [
        "linear.default", "relu.default", "gelu.default", "mul.Tensor", "add.Tensor", "rsub.Scalar", "reshape.default", "softmax.int",
        "conv2d.default", "unsqueeze.default", "sym_size.int", "to.dtype"]
    assert all(not n.args for n in calls)
    assert dict(calls[8].kwargs)["padding"] == [1, 1]
    text = str(traced.graph)
    normalise(traced)
    assert str(traced.graph) == text
