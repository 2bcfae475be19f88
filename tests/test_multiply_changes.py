"""multiply_changes and delta_activations: sums of changes are the layer, what stays the same is an exact zero, and training makes more of it so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

import sparsify_compiler as sc
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError, SelectorError
from sparsify_compiler.ops.changes import op as changes
from sparsify_compiler.passes.activation.multiply_changes import MultiplyChanges, summed
from sparsify_compiler.passes_api import Context, Preserves
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import check_preserves, outputs
from sparsify_compiler.program import Program

pytestmark = pytest.mark.usefixtures("seeded")


def stream(time: int = 12, batch: int = 2) -> Tensor:
    return torch.randn(batch, time, 8).cumsum(1) / 8


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8, bias=False)).eval()


def run(model: nn.Module, x: Tensor, one: MultiplyChanges, dynamic: Any = None) -> tuple[Program, Program, Context]:
    program, ctx = capture(model, (x,), dynamic), Context()
    return program, Pipeline((one,)).run(program, ctx), ctx


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.sampled_from([0.0, 0.125, 0.3]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_sum_of_what_changes_multiply_is_the_layer_of_rounded_values(batch: int, time: int, width: int, step: float, dtype: torch.dtype) -> None:
    x = torch.randn(batch, time, width, generator=torch.Generator().manual_seed(time)).to(dtype)
    weight, bias = torch.randn(3, width).to(dtype), torch.randn(3).to(dtype)
    rounded = ((x / step).round() * step if step else x).float()
    found, expected = summed(linear(changes(x, step), weight), bias), linear(rounded, weight.float(), bias.float())
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), expected, atol=1e-4 if dtype is torch.float32 else 0.3, rtol=1e-4 if dtype is torch.float32 else 0.1)


def test_what_stays_within_a_step_is_an_exact_zero() -> None:
    x = torch.tensor([[[0.31, 1.0], [0.28, 1.4], [0.33, 1.4]]])
    assert torch.equal(changes(x, 0.1)[0, :, 0] == 0, torch.tensor([False, True, True]))
    assert torch.equal(changes(x, 0.1)[0, :, 1] == 0, torch.tensor([False, False, True]))


def test_what_is_no_stream_is_refused() -> None:
    for x, step in ((torch.randn(4, 8), 0.1), (torch.randn(2, 4, 8), -0.1)):
        with pytest.raises(RuntimeError, match="changes"):
            changes(x, step)
    assert changes(torch.randn(2, 0, 8), 0.1).shape == (2, 0, 8)


def test_gradients_pass_the_rounding() -> None:
    x = torch.randn(2, 5, 3, requires_grad=True)
    changes(x, 0.5).square().sum().backward()
    gradient, y = x.grad, x.detach().clone().requires_grad_()
    changed = changes(x, 0.5).detach()
    (torch.cat((y[:, :1], y[:, 1:] - y[:, :-1]), 1) * 2 * changed).sum().backward()
    assert gradient is not None
    assert y.grad is not None
    torch.testing.assert_close(gradient, y.grad)


def test_without_a_step_the_model_computes_the_same_at_any_length() -> None:
    model, x = net(), stream()
    program, after, ctx = run(model, x, MultiplyChanges(step=0.0), {"input": {0: "batch", 1: "time"}})
    assert ctx.rewrites == 2
    check_preserves(program, after, (x,), Preserves.VALUES)
    check_preserves(program, after, (stream(5, 3),), Preserves.VALUES)
    rounded = outputs(run(model, x, MultiplyChanges(step=0.5))[1], (x,))[0]
    assert 1e-3 < (rounded - model(x)).abs().mean() < 1


def test_what_is_no_stream_is_left_alone() -> None:
    model, x = net(), torch.randn(4, 8)
    program, after, ctx = run(model, x, MultiplyChanges())
    assert ctx.rewrites == 0
    assert all("not [batch, time, inputs]" in miss.why for miss in ctx.misses)
    check_preserves(program, after, (x,), Preserves.VALUES)
    assert "no linear" in run(nn.ReLU().eval(), stream(), MultiplyChanges())[2].misses[0].why
    assert run(model, stream(), MultiplyChanges(ignore=("2",)))[2].rewrites == 1
    with pytest.raises(SelectorError):
        run(model, stream(), MultiplyChanges(targets=("nowhere",)))
    with pytest.raises(ParseError, match="step"):
        MultiplyChanges(step=-1.0)


def test_training_makes_changes_rarer_and_they_are_then_skipped() -> None:
    """Beside the same training without the term of the loss; what is compiled afterwards computes the same."""
    x, model = stream(24, 4), net()
    target, share = model(x).detach(), []
    for weight in (0.0, 0.5):
        module, hook = sc.attach(model, (x,), sc.recipes.delta_activations(0.05, weight))
        optimizer = torch.optim.Adam(module.parameters(), 1e-2)
        for _ in range(60):
            loss = (module(x) - target).square().mean() + hook.loss()
            loss.backward()
            optimizer.step(), hook.step(optimizer), optimizer.zero_grad()
        assert float(hook.loss() > 0) == (weight > 0)
        with torch.no_grad():
            hidden = torch.relu(linear(x, module.get_parameter("0.weight"), module.get_parameter("0.bias")))
            share.append(float((changes(hidden, 0.05) != 0).float().mean()))
            expected = module(x)
    assert share[1] < 0.8 * share[0]
    context = Context(calibrate=lambda now, needs: calibrate(now, [(x,)], needs, cache=False))
    after = Pipeline.parse("select_inputs(selector='nonzero')").run(capture(module.eval(), (x,)), context)
    assert "sparsify.select" in after.text()
    torch.testing.assert_close(instantiate(after)(x), expected, atol=1e-4, rtol=1e-4)
