"""The order of a tree's leaves: shares that become a permutation while the model is trained."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.moe._evidence import Evidence, Ffn
from sparsify_compiler.passes.moe.routers._base import Task
from sparsify_compiler.passes.moe.routers.tree import shares, tree
from sparsify_compiler.passes.train.settle_order import SURE, SettleOrder, settled
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99))
def test_shares_sum_to_one_both_ways_and_settle_at_the_nearest_permutation(count: int, seed: int) -> None:
    torch.manual_seed(seed)
    logs = shares(torch.randn(2, count, count))
    for dim in (-1, -2):
        torch.testing.assert_close(logs.exp().sum(dim), torch.ones(2, count), rtol=1e-2, atol=1e-2)
    for one, made in zip(logs.exp(), settled(logs), strict=True):
        best = max(float(sum(one[i, j] for i, j in enumerate(order))) for order in permutations(range(count)))
        assert float((one * made).sum()) == pytest.approx(best, rel=1e-5)
        assert made.sum(0).tolist() == made.sum(1).tolist() == [1.0] * count
        assert torch.equal(shares(made * SURE).exp(), made)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(0, 99))
def test_a_settled_tree_is_the_tree_with_its_experts_moved(experts: int, trees: int, seed: int) -> None:
    torch.manual_seed(seed)
    ffn, x = Ffn(torch.randn(12, 5), torch.randn(5, 12), "relu"), torch.randn(20, 5)
    task = Task(Evidence(ffn, torch.zeros(0, 5), torch.zeros(0, 12), seed=seed), torch.full((experts, 1), -1), 1.0, torch.zeros(0, experts), "output")
    plain, moved = tree(task, margin=4.0, trees=trees), tree(task, margin=4.0, trees=trees, order=True)
    orders = [torch.randperm(experts) for _ in range(trees)]
    order = torch.stack([torch.eye(experts)[one] for one in orders]) * SURE * 0.01
    tensors = {**moved.tensors, "order": order}
    odds = moved.function(x, **tensors, splits=moved.buffers["splits"], heat=torch.tensor(0.01)).exp()
    wanted = torch.zeros(20, experts)
    for at, one in enumerate(orders):  # leaf j is expert one[j]
        part = {name: value.unflatten(0, (trees, -1))[at] for name, value in plain.tensors.items()}
        leaves = tree(task, margin=4.0).function(x, **part, **plain.buffers).exp()
        wanted[:, one] += leaves
    torch.testing.assert_close(odds, wanted, rtol=1e-4, atol=1e-5)


def test_it_cools_settles_and_stays() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), torch.randn(64, 8)
    module, hook = sc.attach(model, (x,), sc.recipes.comet(experts=4, steps=20))
    heat = next(one for name, one in module.named_buffers() if "heat" in name)
    order = next(one for name, one in module.named_parameters() if "order" in name)
    optimizer, heats, apart = torch.optim.Adam(module.parameters(), 3e-2), [float(heat)], []
    for step in range(30):
        ((module(x) - 1).square().mean() + hook.loss()).backward()
        assert order.grad is not None
        assert step > 0 or bool(order.grad.ne(0).any())
        optimizer.step(), hook.step(optimizer), optimizer.zero_grad()
        heats.append(float(heat))
        sure = shares(order.detach() / heat).exp()
        apart.append(float((sure - sure.round()).abs().max()))
    assert heats[:20] == sorted(heats[:20], reverse=True)
    assert heats[0] == pytest.approx(0.1)
    assert heats[20:] == pytest.approx([0.001] * 11)
    assert apart[0] > 0.05
    assert max(apart[19:]) < 1e-6
    assert sorted(order.detach().unique().tolist()) == [0.0, pytest.approx(SURE * 0.001)]  # a permutation to the letter, ten steps later, too
    assert torch.equal(order.detach().gt(0).sum(-1), torch.ones(2, 4, dtype=torch.int64))


def test_a_model_in_bfloat16_settles_too() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).bfloat16().eval(), torch.randn(64, 8).bfloat16()
    module, hook = sc.attach(model, (x,), sc.recipes.comet(experts=4, steps=2))
    for _ in range(2):
        module(x), hook.step()
    order = next(one for name, one in module.named_parameters() if "order" in name)
    assert order.dtype is torch.bfloat16
    assert (order > 0).sum(-1).tolist() == (order > 0).sum(-2).tolist() == [[1] * 4] * 2


def test_a_state_that_was_saved_goes_on_cooling() -> None:
    model, x = GatedFfn(8, 32).eval(), torch.randn(64, 8)
    _, hook = sc.attach(model, (x,), sc.recipes.comet(experts=4, steps=20))
    for _ in range(7):
        hook.step()
    other, second = sc.attach(model, (x,), sc.recipes.comet(experts=4, steps=20))
    second.load_state_dict(hook.state_dict())
    heat = next(one for name, one in other.named_buffers() if "heat" in name)
    assert float(heat) == pytest.approx(0.1 * 0.01**0.35)


def test_nothing_to_settle_is_said_and_wrong_options_are_refused() -> None:
    ctx, model = Context(), GatedFfn(8, 32).eval()
    Pipeline((SettleOrder(),)).run(capture(model, (torch.randn(4, 8),)), ctx)
    assert "no router learns an order" in str(ctx.misses[0])
    for wrong in ({"steps": 0}, {"last": 0.0}, {"first": 0.01, "last": 0.1}):
        with pytest.raises(ParseError):
            SettleOrder(**wrong)
