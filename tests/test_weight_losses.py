"""Losses of weights and proximal steps: their formulas, what they do in training, the exact cut at the end, and bad input."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import training_help
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_help import assert_resumes, net

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.errors import InputError, ParseError, UnknownNameError
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train._envelope import shrink_factors
from sparsify_compiler.passes.train.penalise_weights import PenaliseWeights
from sparsify_compiler.passes.train.shrink_groups import ShrinkGroups, shrink
from sparsify_compiler.passes.train.weight_losses.hyper_sparse import hyper_sparse
from sparsify_compiler.training import Hook

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randn(48, 8, generator=torch.Generator().manual_seed(2))
ART = "hyper_sparse(density=0.25, steps=12, dense=3, weight=0.01, growth=0.1)"
WGSEF = "wgsef(density=0.25, steps=12, strength=0.02)"
step = partial(training_help.step, X, Y)


def attached(recipe: Any) -> tuple[nn.Module, Hook, torch.optim.Optimizer]:
    module, hook = sc.attach(net(), (X,), recipe)
    return module, hook, torch.optim.AdamW(module.parameters(), 1e-2)


def test_hyper_sparse_has_the_gradient_of_its_paper() -> None:
    weights = [torch.randn(30, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2)]
    loss = hyper_sparse(weights, kept=12)
    loss.backward()
    whole = torch.cat([weight.detach() for weight in weights])
    limit = whole.abs().topk(12).values[-1]
    s = 0.6585 / limit
    expected = whole.sign() * s / torch.cosh(s * whole.abs()).square() * whole.abs().sum() / torch.tanh(s * whole.abs()).sum()
    found = torch.cat([weight.grad for weight in weights if weight.grad is not None])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float(loss.detach()) == pytest.approx(float(whole.abs().sum()))
    small, large = whole.abs().argmin(), whole.abs().argmax()
    assert float(found[small].abs()) > 1 > float(found[large].abs())


def test_hyper_sparse_at_its_edges() -> None:
    for weights, kept in (([torch.zeros(0)], 0), ([torch.zeros(4)], 2), ([torch.ones(4)], 4), ([torch.ones(4)], 9), ([torch.ones(4)], 0)):
        one = [weight.requires_grad_() for weight in weights]
        loss = hyper_sparse(one, kept)
        assert bool(loss.isfinite())
        if one[0].numel():
            loss.backward()
            assert one[0].grad is not None
            assert bool(one[0].grad.isfinite().all())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 20), share=st.floats(0.05, 1), strength=st.sampled_from([1e-3, 0.1, 1.0, 10.0]))
def test_the_proximal_step_is_the_best(seed: int, groups: int, share: float, strength: float) -> None:
    """No point and shares nearby, or anywhere, do better; and the shares add up to k."""
    generator = torch.Generator().manual_seed(seed)
    norms, k = torch.rand(groups, generator=generator, dtype=torch.float64), max(1, round(share * groups))
    factors = shrink_factors(norms, k, strength)
    shares = strength * factors / (1 - factors)
    assert float(shares.sum()) == pytest.approx(min(k, groups), abs=1e-6)
    assert -1e-9 <= float(shares.min()) <= float(shares.max()) <= 1 + 1e-9

    def value(x: Tensor, u: Tensor) -> float:
        return float(0.5 * (x - norms).square().sum() + strength / 2 * (x.square() / u.clamp_min(1e-12)).sum())

    best = value(norms * factors, shares)
    for _ in range(20):
        u = torch.rand(groups, generator=generator, dtype=torch.float64)
        u = (u * min(1.0, k / float(u.sum()))).clamp(1e-9, 1)
        near = shares + 0.05 * (u - shares)
        for other in (u, near):
            assert best <= value(norms * other / (other + strength), other) + 1e-9


def test_the_weakest_groups_become_zero_and_the_rest_shrinks() -> None:
    factors = shrink_factors(torch.tensor([0.01, 0.02, 1.0, 2.0], dtype=torch.float64), 2, 0.1)
    torch.testing.assert_close(factors, torch.tensor([0, 0, 1 / 1.1, 1 / 1.1], dtype=torch.float64))
    factors = shrink_factors(torch.tensor([1e-30, 1e-3, 1.0, 2.0], dtype=torch.float64), 2, 0.1)
    torch.testing.assert_close(factors, torch.tensor([0, 0, 1 / 1.1, 1 / 1.1], dtype=torch.float64))
    weight = torch.tensor([[0.5, -1.0, 2.0]])
    expected = weight * shrink_factors(weight[0].abs().double(), 1, 10.0).float()
    shrink(weight, torch.arange(3).view(1, 3), 1, 10.0)
    torch.testing.assert_close(weight, expected)
    assert shrink_factors(torch.tensor([0.0, 3.0], dtype=torch.float64), 1, 1.0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize(("structure", "of"), [("fan_in", lambda w: w), ("row", lambda w: w), ("column", lambda w: w.T)])
def test_weights_are_compared_with_those_that_their_structure_compares(structure: str, of: Any) -> None:
    """A row of small weights keeps its share, as the cut at the end lets it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).eval()
    module, hook = sc.attach(model, (torch.randn(2, 8),), f"mask_weights(structure={structure!r}, density=0.5) | shrink_groups(strength=0.5)")
    weight = module.get_parameter("0.weight")
    weight.data = torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) + 0.1
    of(weight.data)[0] *= 1e-3
    before = weight.data.clone()
    hook.step()
    for now, old in zip(of(weight.data), of(before), strict=True):
        torch.testing.assert_close(now, old * shrink_factors(old.double(), math.ceil(len(old) / 2), 0.5).float())
        assert bool(now.any())


def test_rows_of_zeros_beside_others() -> None:
    norms = torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 2], [1, 2, 3, 4]], dtype=torch.float64)
    factors = shrink_factors(norms, 2, 1.0)
    assert bool(factors.isfinite().all())
    torch.testing.assert_close(factors[1], torch.full((4,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(factors[2], shrink_factors(norms[2], 2, 1.0))


@pytest.mark.parametrize("structure", ["Rows(size=2)", "Columns()", "4x2", "unstructured", "Rows(size=3)", "3x2"])
def test_groups_are_what_a_structure_keeps_together(structure: str) -> None:
    made = Structure.parse(structure)
    groups = made.groups(8, 12)
    assert sorted(set(groups.flatten().tolist())) == list(range(int(groups.max()) + 1))
    mask = made.mask(torch.rand(8, 12, generator=torch.Generator().manual_seed(0)), 0.4)
    kept, cut = set(groups[mask].tolist()), set(groups[~mask].tolist())
    assert not kept & cut
    weight = torch.rand(8, 12, generator=torch.Generator().manual_seed(1))
    weight[mask] += 100
    before = weight.clone()
    shrink(weight, groups, len(kept), 0.1)
    assert not bool(weight[~mask].any())
    assert bool((weight[mask] > 0.2 * before[mask]).all())


@pytest.mark.parametrize(("recipe", "structure"), [(ART, "unstructured"), (WGSEF, "Rows()"),
                                                   ("wgsef(density=0.25, structure='4x1', steps=12)", "4x1"),
                                                   ("hyper_sparse(density=0.25, structure='4x1', steps=12, loss='l1')", "4x1")])
def test_everything_is_kept_until_the_exact_cut(recipe: str, structure: str) -> None:
    module, hook, optimizer = attached(recipe)
    for number in range(1, 15):
        step(module, hook, optimizer)
        for mask in hook.masks.values():
            assert float(mask.double().mean()) == (1.0 if number < 12 else 0.25)
            assert torch.equal(mask, Structure.parse(structure).mask(mask.float(), 0.25 if number >= 12 else 1.0))
    with torch.no_grad():
        torch.testing.assert_close(sc.compile(module, (X,), recipe="pack()")(X), module(X))


def test_a_cut_costs_less_where_weights_were_pressed_or_shrunk() -> None:
    """Of the rows, or weights, that go, next to nothing is left."""
    pairs = ((ART.replace("0.01,", "0.05,"), ART.replace("0.01,", "0.0,")), (WGSEF.replace("0.02", "0.2"), WGSEF.replace("0.02", "0.0")))
    for recipe, other in pairs:
        left = []
        for one in (recipe, other):
            module, hook, optimizer = attached(one)
            for _ in range(11):
                step(module, hook, optimizer)
            before = {name: module.get_parameter(f"{name}.weight").detach().clone() for name in hook.masks}
            step(module, hook, optimizer)
            left.append(sum(float((before[name] * ~mask).square().sum() / before[name].square().sum()) for name, mask in hook.masks.items()))
        assert left[0] < 0.7 * left[1]


def test_the_loss_is_silent_before_its_start_and_behind_the_cut() -> None:
    module, hook, _ = attached(ART)
    found = []
    for steps in (0, 2, 3, 8, 12, 20):
        hook.load_state_dict({"steps": steps})
        found.append(float(hook.loss().detach()))
    size = sum(float(module.get_parameter(f"{name}.weight").detach().abs().sum()) for name in hook.masks)
    assert found == pytest.approx([0, 0, 0.01 * size, 0.01 * size * math.exp(0.5), 0, 0])
    assert "penalise_weights(loss=l1," in str(sc.recipes.hyper_sparse(0.25, loss="l1"))


def test_the_last_shrinking_is_that_of_the_cut() -> None:
    module, hook, _ = attached(WGSEF)
    hook.load_state_dict({"steps": 11})
    before = module.get_parameter("0.weight").detach().clone()
    hook.step()
    after = module.get_parameter("0.weight").detach().clone()
    torch.testing.assert_close(after, before * hook.masks["0"] / 1.02)
    hook.step()
    assert torch.equal(module.get_parameter("0.weight"), after)


@pytest.mark.parametrize("structure", ["Rows(size=3)", "Columns(size=3)", "4x1"])
def test_as_many_groups_stay_where_the_last_is_smaller(structure: str) -> None:
    torch.manual_seed(0)
    module, hook = sc.attach(nn.Sequential(nn.Linear(16, 10)).eval(), (X,), f"wgsef(density=0.5, structure={structure!r}, steps=1, strength=0.5)")
    weight, form = module.get_parameter("0.weight"), Structure.parse(structure)
    mask, groups = form.mask(weight.detach().abs(), 0.5), form.groups(10, 16)
    hook.step()
    assert torch.equal(hook.masks["0"], mask)
    recipe = f"mask_weights(density=0.5, structure={structure!r}) | shrink_groups(strength=0.5)"
    module, hook = sc.attach(nn.Sequential(nn.Linear(16, 10)).eval(), (X,), recipe)
    mask, weight = hook.masks["0"], module.get_parameter("0.weight")
    weight.data.mul_(torch.where(mask, 100.0, 1.0))
    hook.step()
    assert set(groups[weight.detach() != 0].tolist()) == set(groups[mask].tolist())


def test_a_weight_of_two_layers_is_counted_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).eval()
    model[2].weight = model[0].weight
    module, hook = sc.attach(model, (X,), "mask_weights(density=0.5) | penalise_weights(loss='l1', weight=1.0) | shrink_groups(strength=1.0)")
    weight, mask = module.get_parameter("0.weight"), hook.masks["0"]
    assert float(hook.loss().detach()) == pytest.approx(float((weight.detach() * mask).abs().sum()))
    before = weight.detach().clone()
    hook.step()
    assert float(weight.detach().abs().max() / before.abs().max()) == pytest.approx(0.5)


def test_frozen_and_unbounded_weights_stay() -> None:
    module, hook, optimizer = attached(WGSEF)
    frozen, broken = module.get_parameter("0.weight"), module.get_parameter("2.weight")
    frozen.requires_grad_(False)
    broken.data[0, 0] = math.inf
    before = frozen.clone(), broken.clone()
    hook.step(optimizer)
    assert torch.equal(frozen, before[0])
    assert torch.equal(broken, before[1])
    module, hook, _ = attached(ART)
    module.get_parameter("0.weight").requires_grad_(False)
    hook.load_state_dict({"steps": 3})
    assert float(hook.loss().detach()) == pytest.approx(0.01 * float(module.get_parameter("2.weight").detach().abs().sum()))


@pytest.mark.parametrize("recipe", [ART, WGSEF])
def test_resuming_is_bit_equal(recipe: str) -> None:
    assert_resumes(partial(attached, recipe), partial(step, accumulate=2), 6, 8)


def test_a_convolution_whose_filters_go() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(4, 3, 8, 8)
    module, hook = sc.attach(model, (x,), sc.recipes.wgsef(0.5, steps=6, strength=0.3, targets=("conv",)))
    optimizer = torch.optim.SGD(module.parameters(), 0.01)
    for _ in range(6):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(x).float().square().mean()
        loss.backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    assert [mask.flatten(1).any(1).sum() for mask in hook.masks.values()] == [4, 2]
    assert all(bool((mask.flatten(1).all(1) == mask.flatten(1).any(1)).all()) for mask in hook.masks.values())


def test_bad_options() -> None:
    with pytest.raises(ParseError):
        PenaliseWeights(weight=-1.0)
    with pytest.raises(UnknownNameError):
        PenaliseWeights("hoyer")
    with pytest.raises(ParseError):
        ShrinkGroups(strength=-1.0)
    with pytest.raises(ParseError):
        ShrinkGroups(strength=math.inf)
    with pytest.raises(InputError, match="nothing to choose"):
        attached("mask_weights(structure='2:4') | shrink_groups()")
    with pytest.raises(InputError, match="packed"):
        attached("mask_weights(density=0.25) | penalise_weights() | pack()")
    assert set(catalog.names("weight loss")) == {"hyper_sparse", "l1", "orthonormal"}
