"""Scores from training and from a loss of the user's own, through compile()."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import InputError, SparsifyError, UnknownNameError

X = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def train(model: nn.Module, micro: int = 1) -> dict[str, Tensor]:
    """A few steps of gradient descent; what the formula says that moved, by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    for x in X:
        optimizer.zero_grad()
        for part in x.chunk(micro):
            model(part).square().sum().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            expected[name] -= weight.grad * weight.detach()
        optimizer.step()
    return expected


@pytest.mark.parametrize("micro", [1, 2])
def test_movement_is_the_formula_also_with_accumulated_gradients(micro: int) -> None:
    model = net()
    with sc.Movement(model) as movement:
        expected = train(model, micro)
    known = movement.known()["movement"]
    assert known.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(known[name], value, rtol=1e-4, atol=1e-5)
    model(X[0]).sum().backward()
    torch.testing.assert_close(movement.known()["movement"]["0.weight"], known["0.weight"], rtol=0, atol=0)


def test_what_moved_towards_zero_goes() -> None:
    model = net()
    with sc.Movement(model) as movement:
        train(model)
    model.eval()
    program = capture(model, (X[0],))
    recipe = sc.recipes.movement(density=0.4)
    found = calibrate(program, [(X[0],)], recipe.passes[0].needs(program), cache=False, known=movement.known())
    assert found.runs == 0
    torch.testing.assert_close(found.get("0", "movement"), movement.known()["movement"]["0.weight"])
    compiled = sc.compile(model, (X[0],), recipe=recipe, calibration=[(X[0],)], known=movement.known())
    other = sc.compile(model, (X[0],), recipe=recipe, calibration=[(X[0],)])
    moved = torch.cat([movement.known()["movement"][f"{i}.weight"].flatten() for i in (0, 2)])
    limit = moved.sort(descending=True).values[int(0.4 * len(moved))]
    expected = {str(i): float((movement.known()["movement"][f"{i}.weight"] > limit).float().mean()) for i in (0, 2)}
    densities = {site.site: site.density for site in compiled.report().sites}
    assert densities == pytest.approx(expected, abs=0.01)
    assert densities != {site.site: site.density for site in other.report().sites}


@pytest.mark.parametrize(("known", "error", "words"), [
    ({"movement": {"0.weight": torch.zeros(3)}}, InputError, "shape"),
    ({"movement": {"nothing": torch.zeros(3)}}, UnknownNameError, "parameter"),
    ({"moved": {"0.weight": torch.zeros(32, 16)}}, UnknownNameError, "movement"),
])
def test_wrong_knowledge_is_refused(known: Any, error: type[SparsifyError], words: str) -> None:
    with pytest.raises(error, match=words):
        sc.compile(net().eval(), (X[0],), recipe=sc.recipes.movement(density=0.5), calibration=[(X[0],)], known=known)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="trained"):
        sc.Movement(net().requires_grad_(False))


@pytest.mark.parametrize("recipe", ["snip", "taylor_rows"])
def test_compile_takes_a_loss(recipe: str) -> None:
    """A loss of the first output alone leaves the last layer's other rows without a gradient."""
    seen: list[int] = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return output[:, 0].square().mean()

    compiled = sc.compile(net().eval(), (X[0],), recipe=recipe, budget=sc.Budget(density=0.5), calibration=[(x,) for x in X], loss=loss)
    assert seen == [8, 8, 8]
    assert {site.density for site in compiled.report().sites} != {1.0}


def test_a_loss_that_is_no_function_is_refused() -> None:
    wrong: Any = 3.0
    with pytest.raises(InputError, match="loss"):
        sc.compile(net().eval(), (X[0],), recipe="snip", budget=sc.Budget(density=0.5), calibration=[(X[0],)], loss=wrong)
