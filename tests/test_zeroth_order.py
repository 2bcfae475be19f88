"""Training by forward passes: the direction is the gradient's on average, only chosen places move, and a run goes on where it was."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.errors import InputError
from sparsify_compiler.zeroth_order import ZerothOrder, _packed, _unpacked

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
Y = torch.randn(32, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float32)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).eval()


def loss(module: nn.Module) -> Tensor:
    return functional.mse_loss(module(X), Y)


def test_it_learns_without_a_gradient() -> None:
    model = net()
    graphs: list[bool] = []
    optimizer = ZerothOrder(model.parameters(), 1e-2, 1e-3, 1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)

    def measured() -> Tensor:
        found = loss(model)
        graphs.append(found.requires_grad)
        return found

    first = optimizer.step(measured)
    for _ in range(300):
        optimizer.step(measured)
        schedule.step()
    assert optimizer.step(measured) < 0.9 * first
    assert not any(graphs)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_follow_the_gradient_on_average() -> None:
    """Of 3000 directions; E[z zᵀ g] = g."""
    model = nn.Linear(12, 4)
    loss(model).backward()
    gradient = model.weight.grad
    assert gradient is not None
    start, total = model.weight.detach().clone(), torch.zeros_like(gradient)
    optimizer = ZerothOrder([model.weight], 1.0, 1e-2, 1.0)
    for _ in range(3000):
        optimizer.step(lambda: loss(model))
        total += start - model.weight.detach()
        model.weight.data.copy_(start)
    torch.testing.assert_close(functional.cosine_similarity(total.flatten(), gradient.flatten(), 0), torch.tensor(1.0), rtol=0, atol=0.05)
    torch.testing.assert_close((total / 3000).norm(), gradient.norm(), rtol=0.15, atol=0)


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([0.1, 0.25, 0.6]), st.booleans(), st.integers(0, 5))
def test_only_small_kept_weights_move(share: float, masked: bool, seed: int) -> None:
    module, hook = sc.attach(net(), (X,), "mask_weights(density=0.5)") if masked else (net(), None)
    module.get_parameter("2.bias").requires_grad_(False)
    before = {name: one.detach().clone() for name, one in module.named_parameters()}
    optimizer = ZerothOrder(module.parameters(), 0.1, 1e-3, share, hook, seed)
    optimizer.step(lambda: loss(module))
    for name, now in module.named_parameters():
        moved = now != before[name]
        if now.dim() == 1:
            assert bool(moved.all()) == now.requires_grad
            continue
        kept = torch.ones_like(moved) if hook is None else hook.masks[name.removesuffix(".weight")]
        assert not bool((moved & ~kept).any())
        wanted = round(share * int(kept.sum()))
        assert wanted * 0.9 - 1 <= int(moved.sum()) <= wanted
        assert float(before[name][moved].abs().max()) <= float(before[name][kept & ~moved].abs().max())


def test_a_resumed_run_is_the_same_to_the_bit() -> None:
    torch.set_num_threads(1)
    model = net()
    optimizer = ZerothOrder(model.parameters(), 1e-2, seed=3)
    for _ in range(4):
        optimizer.step(lambda: loss(model))
    again = net()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = ZerothOrder(again.parameters(), 0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [optimizer.step(lambda: loss(model)) for _ in range(4)] == [resumed.step(lambda: loss(again)) for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 7), st.integers(1, 9), st.integers(0, 99))
def test_bits(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) < 0.4
    assert torch.equal(_unpacked(_packed(mask), mask.shape), mask)
    assert _packed(mask).nbytes == -(-rows * columns // 8)


def test_parameters_that_are_added_later_train_by_their_own_numbers() -> None:
    """Small ones alone, as those that were there from the start."""
    model = net()
    optimizer = ZerothOrder([model.get_parameter("0.weight")], 1e-1, 1e-2, 0.5)
    weight, frozen = model.get_parameter("2.weight"), nn.Parameter(torch.ones(3, 3), requires_grad=False)
    optimizer.add_param_group({"params": [weight, frozen], "share": 0.25})
    before = weight.detach().clone()
    optimizer.step(lambda: loss(model))
    moved = weight.detach() != before
    assert int(moved.sum()) == weight.numel() // 4
    assert before[moved].abs().max() <= before[~moved].abs().min()
    groups = len(optimizer.param_groups)
    for wrong in ({"share": 0.0}, {"lr": -1.0}, {"scale": 0.0}):
        with pytest.raises(InputError, match="above 0"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **wrong})
    assert len(optimizer.param_groups) == groups


def test_bad_input() -> None:
    model = net()
    for options in ((-1.0,), (0.1, 0.0), (0.1, 0.1, 0.0), (0.1, 0.1, 1.5)):
        with pytest.raises(InputError, match="share above 0"):
            ZerothOrder(model.parameters(), *options)
    with pytest.raises(InputError, match="measured"):
        ZerothOrder(model.parameters()).step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(InputError, match="not finite"):
        ZerothOrder(model.parameters()).step(lambda: torch.tensor(float("inf")))

    def fails() -> Tensor:
        raise KeyError("batch")

    with pytest.raises(KeyError):
        ZerothOrder(model.parameters(), scale=1.0).step(fails)
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), was)
    with pytest.raises(InputError, match="no parameter"):
        ZerothOrder(net().requires_grad_(False).parameters())


def test_an_autocast_around_the_step_does_not_hide_that_the_weights_move() -> None:
    """Autocast keeps the bfloat16 copies that it makes: both measurements, and all steps, would see the weights of the first."""
    model, seen = net(), []

    def measured() -> Tensor:
        seen.append(float(functional.mse_loss(model(X).float(), Y)))
        return torch.tensor(seen[-1], dtype=torch.float32)

    with torch.autocast("cpu", torch.bfloat16):
        loss(model)
        ZerothOrder(model.parameters(), 1e-2, 0.1, 1.0).step(measured)
        after = float(functional.mse_loss(model(X).float(), Y).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert after == float(functional.mse_loss(model(X).float(), Y).detach())
    assert len({*seen, after}) == 3


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_closure_that_fails_leaves_the_weights_and_the_count_of_steps(fails_at: int) -> None:
    """And those that have no part in a step to the bit."""
    model, calls = net(), []
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = ZerothOrder(model.parameters(), 1.0, 0.5)

    def fails() -> Tensor:
        calls.append(1)
        if len(calls) == fails_at:
            raise KeyError("batch")
        return loss(model)

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert optimizer.param_groups[0]["steps"] == 0
    assert set(optimizer.param_groups[0]) == {"params", "lr", "scale", "share", "seed", "steps"}
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), was, rtol=0, atol=1e-6)


def test_runs_of_one_seed_are_the_same_to_the_bit_and_directions_differ() -> None:
    """Between steps, parameters and seeds; and at rate 0 nothing moves but by rounding."""
    torch.set_num_threads(1)
    moved = []
    for seed in (0, 0, 1):
        one = nn.ParameterList([torch.zeros(6, dtype=torch.float32), torch.zeros(6, dtype=torch.float32)])
        optimizer = ZerothOrder(one.parameters(), 1.0, seed=seed)
        for _ in range(2):
            optimizer.step(lambda one=one: sum(two.sum() for two in one))  # type: ignore[misc]
            moved.append(torch.stack([two.detach().clone() for two in one]))
    assert torch.equal(moved[0], moved[2])
    assert torch.equal(moved[1], moved[3])
    steps = [direction / direction.norm() for direction in (moved[0][0], moved[0][1], moved[1][0] - moved[0][0], moved[4][0])]
    assert all(float((a @ b).abs()) < 0.99 for i, a in enumerate(steps) for b in steps[:i])
    model = net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    ZerothOrder(model.parameters(), 0.0).step(lambda: loss(model))
    for parameter, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.detach(), was, rtol=0, atol=1e-6)


def test_a_step_gives_the_mean_of_both_losses_and_leaves_what_was_frozen_since() -> None:
    model, seen = net(), []
    optimizer = ZerothOrder(model.parameters(), 0.1, 0.1)
    model.get_parameter("2.weight").requires_grad_(False)
    before = {name: one.detach().clone() for name, one in model.named_parameters()}

    def measured() -> float:
        seen.append(float(loss(model)))
        return seen[-1]

    assert optimizer.step(measured) == sum(seen) / 2
    assert seen[0] != seen[1]
    assert torch.equal(model.get_parameter("2.weight"), before["2.weight"])
    assert int((model.get_parameter("0.weight") != before["0.weight"]).sum()) == 30
