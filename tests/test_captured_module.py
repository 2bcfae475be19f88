"""A captured module is a plain module: its tensors are read where they stand, whatever is done to them, and calling it is thin."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsify_compiler.call import CapturedModule, instantiate
from sparsify_compiler.capture import capture


class Block(nn.Module):
    """A parameter of its own, layers in layers, a buffer, and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
        self.norm, self.scale = nn.BatchNorm1d(4), nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.body(x) * self.scale + x) @ self.body[1].weight
        return y


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def captured() -> CapturedModule:
    module = instantiate(capture(Block().eval(), (X,)))
    assert isinstance(module, CapturedModule)
    return module


def by_attributes(module: CapturedModule) -> Tensor:
    """What the graph's own code computes, which asks the module for its attributes."""
    flat = module._code(module, X)
    assert isinstance(flat[0], Tensor)
    return flat[0]


def test_values(captured: CapturedModule) -> None:
    assert torch.equal(captured(X), by_attributes(captured))
    assert torch.allclose(captured(X), Block().eval()(X))
    assert torch.equal(captured(x=X), captured(X))


def test_the_thin_way_is_the_one_that_runs(captured: CapturedModule) -> None:
    def asked(*_: object) -> None:
        raise AssertionError("the graph's own code ran")

    captured._code = asked  # type: ignore[assignment]
    assert captured(X).shape == X.shape


def test_tensors_may_be_changed_and_replaced(captured: CapturedModule) -> None:
    before = captured(X)
    with torch.no_grad():
        captured.get_parameter("body.0.0.weight").mul_(2)
    changed = captured(X)
    assert not torch.equal(before, changed)
    captured.get_submodule("body.1").bias = nn.Parameter(torch.full((4,), 3.0))
    assert not torch.equal(changed, captured(X))
    assert torch.equal(captured(X), by_attributes(captured))
    fresh = {name: tensor + 1 for name, tensor in captured.state_dict().items()}
    captured.load_state_dict(fresh, assign=True)
    assert torch.equal(captured(X), by_attributes(captured))


def test_a_copy_has_tensors_of_its_own(captured: CapturedModule) -> None:
    before, twin = captured(X), copy.deepcopy(captured)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(captured(X), before)
    assert not torch.equal(twin(X), before)
    assert torch.equal(twin(X), by_attributes(twin))


def test_a_functional_call_uses_the_given_tensors(captured: CapturedModule) -> None:
    given = {name: torch.zeros_like(tensor) for name, tensor in captured.named_parameters() if name == "body.1.weight"}
    assert float(torch.func.functional_call(captured, given, (X,)).detach().abs().max()) == 0
    assert float(captured(X).detach().abs().max()) > 0


def test_a_parametrized_weight_is_computed_at_each_call(captured: CapturedModule) -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    expected = copy.deepcopy(captured)
    with torch.no_grad():
        expected.get_parameter("body.0.0.weight").mul_(2)
    parametrize.register_parametrization(captured.get_submodule("body.0.0"), "weight", Twice())
    assert torch.equal(captured(X), expected(X))


def test_it_trains_as_before(captured: CapturedModule) -> None:
    captured(X).square().sum().backward()
    first = {name: parameter.grad for name, parameter in captured.named_parameters()}
    captured.zero_grad(set_to_none=True)
    by_attributes(captured).square().sum().backward()
    for name, parameter in captured.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(first[name], parameter.grad), name  # type: ignore[arg-type]
