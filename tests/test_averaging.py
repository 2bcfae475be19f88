"""Averages of sparse models: the mean, as sparse as each, refused where masks differ; greedy soups; prune, train, average."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import sparsify_compiler as sc
from sparsify_compiler.errors import InputError
from sparsify_compiler.training import Hook

X = torch.randn(32, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float32)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


def train(module: nn.Module, hook: Hook, particle: int) -> None:
    """Another half of the rows for each particle."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    rows = torch.randperm(32, generator=torch.Generator().manual_seed(particle))[:16]
    for _ in range(5):
        functional.mse_loss(module(X[rows]), Y[rows]).backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()


def trained(recipe: str, particles: int = 3) -> list[tuple[nn.Module, Hook]]:
    made = []
    for particle in range(particles):
        module, hook = sc.attach(net(), (X,), recipe)
        train(module, hook, particle)
        made.append((module, hook))
    return made


def loss(module: nn.Module) -> float:
    with torch.no_grad():
        return float(functional.mse_loss(module(X), Y))


@pytest.mark.parametrize("recipe", ["mask_weights(density=0.3)", "mask_weights(density=0.3) | pack()", "mask_weights(structure='2:4')"])
@pytest.mark.parametrize("shares", [None, [1.0, 2.0, 5.0]])
def test_the_mean_is_as_sparse_as_each(recipe: str, shares: list[float] | None) -> None:
    models = trained(recipe)
    before = [{name: one.clone() for name, one in module.state_dict().items()} for module, _ in models]
    mean = sc.average([module for module, _ in models], shares)
    weights = [share / sum(shares or [1.0] * 3) for share in shares or [1.0] * 3]
    for name, parameter in mean.named_parameters():
        wanted = sum(state[name] * weight for state, weight in zip(before, weights, strict=True))
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-6)
    for (module, _), state in zip(models, before, strict=True):
        assert all(torch.equal(one, state[name]) for name, one in module.state_dict().items())
    for name, one in mean.state_dict().items():
        assert one.is_floating_point() or torch.equal(one, before[0][name])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 24 * 16 - 1), st.booleans())
def test_one_place_that_differs_is_refused_by_name(place: int, in_mask: bool) -> None:
    first, _ = sc.attach(net(), (X,), "mask_weights(density=0.5)")
    other = copy.deepcopy(first)
    name = "0.weight_mask" if in_mask else "2.weight_mask"
    mask = other.get_buffer(name).view(-1)
    mask[place % len(mask)] ^= True
    with pytest.raises(InputError, match="mask of model 1") as caught:
        sc.average([first, other])
    assert name in str(caught.value)


def test_zeros_of_plain_models_count_too() -> None:
    one, other = net(), net()
    with torch.no_grad():
        one.get_parameter("2.weight")[3, 4] = 0
    with pytest.raises(InputError, match="zeros of its weight") as caught:
        sc.average([one, other])
    assert "2.weight" in str(caught.value)
    assert sc.average([other, other]) is not other


def test_models_of_other_kinds_are_refused() -> None:
    with pytest.raises(InputError, match=r"other weights.*float32 \[8, 16\] on cpu and none"):
        sc.average([net(), nn.Sequential(net()[0])])  # type: ignore[index]
    with pytest.raises(InputError, match=r"none and float32 \[8, 16\]"):
        sc.average([nn.Sequential(net()[0]), net()])  # type: ignore[index]
    for bad in ([], None, [1.0, -1.0]):
        with pytest.raises(InputError, match="positive share"):
            sc.average([net(), net()] if bad else [], bad)


def test_a_soup_is_never_worse_than_its_best() -> None:
    models = [module for module, _ in trained("mask_weights(density=0.5)", 4)]
    with torch.no_grad():
        models[3].get_parameter("0.weight").mul_(-20)  # one that spoils it
    made = sc.soup(models, lambda module: -loss(module))
    assert loss(made) <= min(loss(module) for module in models)
    assert loss(made) < loss(sc.average(models))
    alone = sc.soup(models, lambda module: float(module is models[1]))
    assert torch.equal(alone.get_parameter("0.weight"), models[1].get_parameter("0.weight"))
    with pytest.raises(InputError, match="finite"):
        sc.soup(models, lambda module: float("nan"))


@pytest.mark.parametrize("packed", ["", " | pack()"])
def test_cycles_prune_the_average(packed: str) -> None:
    """A cycle's masks lie in those before it; the last average is what a plain loop by hand gives."""
    seen: list[dict[str, torch.Tensor]] = []
    starts: list[torch.Tensor] = []
    ends: list[torch.Tensor] = []
    biases: list[torch.Tensor] = []

    def noted(module: nn.Module, hook: Hook, particle: int) -> None:
        seen.append({path: mask.clone() for path, mask in hook.masks.items()})
        starts.append(hook.weights()["0"])
        biases.append(module.get_parameter("0.bias").detach().clone())
        train(module, hook, particle)
        ends.append(hook.weights()["0"])
        biases.append(module.get_parameter("0.bias").detach().clone())

    recipes = [f"mask_weights(density={density}){packed}" for density in (0.5, 0.25)]
    module, hook = sc.averaged_cycles(net(), (X,), recipes, noted, particles=2)
    assert len(seen) == 4
    assert not torch.equal(ends[0], ends[1])
    for start in starts[2:]:
        torch.testing.assert_close(start, (ends[0] + ends[1]) / 2 * seen[2]["0"])
    torch.testing.assert_close(biases[4], (biases[1] + biases[3]) / 2)
    for path, mask in seen[3].items():
        assert torch.equal(mask, seen[2][path])
        assert not bool((mask & ~seen[1][path]).any())
        assert torch.equal(mask, hook.masks[path])
        assert float(mask.float().mean()) == pytest.approx(0.25, abs=0.01)
    assert loss(module) < loss(net())
    train(module, hook, 0)


def test_particles_start_with_the_weights_that_they_are_rewound_to() -> None:
    early = {name: one.clone() for name, one in net().state_dict().items()}
    starts: list[torch.Tensor] = []

    def noted(module: nn.Module, hook: Hook, particle: int) -> None:
        starts.append(module.get_parameter("0.weight").detach().clone())
        train(module, hook, particle)

    sc.averaged_cycles(net(), (X,), ["mask_weights(density=0.5)", "mask_weights(density=0.25)"], noted, particles=2, rewind=early)
    assert all(torch.equal(start, early["0.weight"]) for start in starts)
    with pytest.raises(InputError, match="rewind"):
        sc.averaged_cycles(net(), (X,), ["mask_weights(density=0.5) | pack()"], noted, rewind=early)
    with pytest.raises(InputError, match="at least one particle"):
        sc.averaged_cycles(net(), (X,), ["mask_weights(density=0.5)"], noted, particles=0)


def test_counts_are_the_first_models_and_other_floats_are_averaged() -> None:
    """Batch norms count their batches, which models that trained for longer have seen more of; tied weights stay tied."""
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.one, self.two = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

    one = Tied()
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.one.weight.add_(1.0)
    other.norm.train()(torch.ones(5, 4, dtype=torch.float32))
    mean = sc.average([one, other])
    assert mean.two.weight is mean.one.weight
    torch.testing.assert_close(mean.one.weight, one.one.weight + 0.5)
    torch.testing.assert_close(mean.norm.running_mean, (one.norm.running_mean + other.norm.running_mean) / 2)
    assert int(mean.norm.num_batches_tracked) == 0


def test_a_tie_in_the_first_model_has_to_be_one_in_all() -> None:
    def made(tied: bool, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
        if tied:
            model[1].weight = model[0].weight
        return model

    with pytest.raises(InputError, match=r"tensor of 0\.weight in the first"):
        sc.average([made(True, 0), made(False, 1)])
    for models in ([made(True, 0), made(True, 1)], [made(False, 0), made(True, 1)]):
        mean = sc.average(models)
        for name in ("0.weight", "1.weight"):
            torch.testing.assert_close(mean.get_parameter(name), sum(one.get_parameter(name) for one in models) / 2)


def test_what_cannot_be_averaged_is_refused() -> None:
    for other in (net().to("meta"), net().double()):
        with pytest.raises(InputError, match="other weights than the first") as caught:
            sc.average([net(), other])
        assert "0.weight" in str(caught.value)
    with pytest.raises(InputError, match="positive share"):
        sc.average([net(), net()], [1.0, float("inf")])


def test_the_zeros_of_a_weight_beside_one_with_a_mask_count() -> None:
    one = nn.Module()
    one.up, one.down = (nn.Parameter(torch.ones(3, 3, dtype=torch.float32)) for _ in range(2))
    one.register_buffer("up_mask", torch.eye(3, dtype=torch.bool))
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.get_parameter("up")[0, 1] = 0
        sc.average([one, other])
        other.get_parameter("down")[0, 1] = 0
    with pytest.raises(InputError, match="zeros of its weight") as caught:
        sc.average([one, other])
    assert "down" in str(caught.value)


@pytest.mark.parametrize("added", ["add_adapters(adapter='low_rank(rank=2)', freeze=False)", "widen_channels(density=0.5)"])
def test_what_the_model_has_no_place_for_is_not_lost_between_cycles(added: str) -> None:
    plain, more = "mask_weights(density=0.5)", f"{added} | mask_weights(density=0.25)"
    sc.averaged_cycles(net(), (X,), [plain, more], train, particles=1)
    with pytest.raises(InputError, match="no place for"):
        sc.averaged_cycles(net(), (X,), [more, plain], train, particles=1)


def test_copies_average_to_themselves_to_the_bit_and_equal_scores_join_a_soup() -> None:
    one = net().bfloat16()
    mean = sc.average([one, copy.deepcopy(one), copy.deepcopy(one)])
    assert all(torch.equal(a, b) for a, b in zip(mean.parameters(), one.parameters(), strict=True))
    models = [module for module, _ in trained("mask_weights(density=0.5)")]
    torch.testing.assert_close(sc.soup(models, lambda module: 1.0).state_dict(), sc.average(models).state_dict())


def test_cycles_leave_out_a_particle_that_spoils_the_average() -> None:
    def spoiled(module: nn.Module, hook: Hook, particle: int) -> None:
        train(module, hook, particle)
        if particle == 1:
            with torch.no_grad():
                module.get_parameter("0.weight").mul_(-20)

    mask = ["mask_weights(density=0.5)"]
    module, _ = sc.averaged_cycles(net(), (X,), mask, spoiled, particles=2, metric=lambda module: -loss(module))
    torch.testing.assert_close(module.state_dict(), trained(mask[0], 1)[0][0].state_dict())
