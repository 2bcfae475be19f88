"""Estimators of a router's gradient against their authors' formulas, and what selectors and recipes around them promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.phimoe.modeling_phimoe import sparsemixer

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.moe._evidence import Evidence, Ffn
from sparsify_compiler.passes.moe.routers._base import Task
from sparsify_compiler.passes.moe.routers.oracle import measured
from sparsify_compiler.passes.moe.routers.tree import tree
from sparsify_compiler.passes.moe.selectors.ordered import calibrate, ordered
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline


def estimated(name: str, scores: Tensor, k: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = Named.parse("router gradient", name)(scores, scores.detach().topk(k, -1).indices, weights)
    return found


@pytest.mark.parametrize("near", [0.2, 1e9])
def test_sparse_mixer_draws_and_learns_as_its_authors_do(near: float) -> None:
    """Against the library's Phi-3.5-MoE, whose second choice takes other random numbers: the first one of each row."""
    torch.manual_seed(0)
    theirs = torch.randn(400, 6, requires_grad=True)
    ours = theirs.detach().clone().requires_grad_(True)
    upstream = torch.randn(400)
    torch.manual_seed(1)
    weights, chosen = sparsemixer(theirs, near / 2, True)
    torch.manual_seed(1)
    chosen_here, weights_here = estimated(f"sparse_mixer(near={near!r})", ours, 1, torch.ones(400, 1))
    assert torch.equal(chosen_here[:, 0], chosen[:, 0])
    torch.testing.assert_close(weights_here[:, 0], weights[:, 0], rtol=1e-3, atol=1e-4)
    (weights[:, 0] * upstream).sum().backward()
    (weights_here[:, 0] * upstream).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_sparse_mixer_is_right_on_average() -> None:
    """The mean of weight * value over the draws, whose parts that are cut to a third are made up for by the rows that are not: Heun's rule."""
    torch.manual_seed(0)
    scores, values = torch.randn(4), torch.randn(4)
    chosen, weights = estimated("sparse_mixer", scores.expand(200000, 4), 1, torch.ones(200000, 1))
    odds = scores.softmax(-1)
    factor = torch.where(odds == odds.max(), 1.0, 0.25 + 0.75 / 3)
    assert float((weights * values[chosen]).mean()) == pytest.approx(float((odds * odds * factor * values).sum()), abs=0.01)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.sampled_from(["sparse_mixer", "sparse_mixer(near=0.5)", "dice", "straight_through"]), st.integers(1, 7), st.integers(1, 7),
       st.integers(0, 9), st.booleans(), st.integers(0, 99))
def test_estimators_choose_as_many_and_none_twice(name: str, experts: int, k: int, rows: int, weighted: bool, seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(rows, experts, requires_grad=True)
    before = scores.detach().topk(min(k, experts), -1).indices
    before = torch.where(torch.rand(before.shape) < 0.3, -1, before)
    weights = torch.rand(before.shape) if weighted else None
    chosen, given_ = Named.parse("router gradient", name)(scores, before, weights)
    assert chosen.dtype == torch.int64
    assert torch.equal(chosen < 0, before < 0)
    for row in chosen.tolist():
        named = [expert for expert in row if expert >= 0]
        assert len(set(named)) == len(named)
        assert all(expert < experts for expert in named)
    assert given_.shape == before.shape
    assert bool(given_.isfinite().all())
    if not weighted:
        assert torch.equal(given_, torch.ones_like(given_))
    if given_.requires_grad:
        given_.sum().backward()
        assert scores.grad is not None
        assert bool(scores.grad.isfinite().all())


def test_dice_are_fair_and_no_router_learns() -> None:
    torch.manual_seed(0)
    chosen, weights = estimated("dice", torch.tensor([9.0, 0.0, -9.0], requires_grad=True).expand(30000, 3), 1, None)
    assert not weights.requires_grad
    torch.testing.assert_close(torch.bincount(chosen.flatten(), minlength=3) / 30000, torch.full((3,), 1 / 3), rtol=0, atol=0.02)


@pytest.mark.parametrize("recipe", ["thor", "sparse_mixer"])
def test_choices_are_drawn_in_training_alone(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(16, 32).eval(), torch.randn(40, 16)
    module, _ = sc.attach(model, (x,), sc.catalog.get("recipe", recipe)(experts=4))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "experts" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
        assert torch.equal(module(x), module(x))
    assert not torch.equal(module(x), module(x))


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.floats(0.05, 1.0), st.integers(0, 99))
def test_ordered_takes_the_first_experts_within_the_budget(experts: int, rows: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.rand(rows, experts) * torch.arange(experts, 0, -1)
    number = calibrate(scores, share)
    chosen = ordered(scores, number)
    count = (chosen >= 0).sum(-1)
    assert torch.equal(chosen, torch.where(torch.arange(experts) < count[:, None], torch.arange(experts), -1))
    assert int(count.min()) >= 1
    assert bool((count == experts).all()) or share < 1
    assert float(count.float().mean()) >= share * experts - 1e-6
    fewer = ordered(scores, number + 1e-3)
    assert share >= 1 or float((fewer >= 0).float().mean()) <= share + 1 / experts + 1 / rows


def test_easy_rows_take_fewer_learners() -> None:
    scores = torch.tensor([[5.0, 0.1, 0.1, 0.1], [5.0, 4.0, 3.0, 0.1], [-1.0, -1.0, -1.0, -1.0]])
    assert ordered(scores, 0.1).tolist() == [[0, -1, -1, -1], [0, 1, 2, -1], [0, -1, -1, -1]]
    assert ordered(scores, calibrate(scores, 1.0)).tolist() == [[0, 1, 2, 3]] * 3


def test_acm_gives_important_neurons_to_the_first_learners() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 6)).eval(), torch.randn(300, 6)
    compiled = sc.compile(model, (x,), recipe=sc.recipes.acm(4, density=0.5), calibration=[(x,)], target="cpu")
    assert float(((compiled(x) - model(x)).square().mean() / model(x).square().mean()).detach()) < 0.2


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 9), st.floats(0.3, 5.0), st.integers(0, 99))
def test_leaves_of_a_tree_are_probabilities(experts: int, margin: float, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = GatedFfn(5, 12).eval(), torch.randn(20, 5)
    split = SplitExperts(experts, "copies", f"tree(margin={margin!r})", "top_k(k=1)", 0.0, "weight_norm", "softmax", "none")
    module, _ = sc.attach(model, (x,), split, seed=seed)
    router = next(tensor for name, tensor in module.named_parameters() if "router" in name)

    def walked(row: Tensor, leaves: list[int], node: int, odds: float) -> tuple[dict[int, float], int]:
        if len(leaves) < 2:
            return {leaves[0]: odds}, node
        t = max(-0.5, min(0.5, float(router[node] @ row) / margin))
        yes, half = -2 * t**3 + 1.5 * t + 0.5, len(leaves) // 2
        first, after = walked(row, leaves[:half], node + 1, odds * yes)
        second, end = walked(row, leaves[half:], after, odds * (1 - yes))
        return first | second, end

    with torch.no_grad():
        best = torch.tensor([max(walked(row, list(range(experts)), 0, 1.0)[0].values()) for row in x])
        torch.testing.assert_close(module(x), model(x) * best[:, None], rtol=1e-3, atol=1e-4)  # every expert is the FFN, weighted with its leaf


def test_a_tree_needs_a_margin_and_trains() -> None:
    model, x = GatedFfn(5, 12).eval(), torch.randn(20, 5)
    with pytest.raises(ParseError, match="margin lies above 0"):
        sc.attach(model, (x,), sc.recipes.comet(margin=0.0))
    module, _ = sc.attach(model, (x,), sc.recipes.comet(experts=5, margin=8.0))
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
    module(x).square().sum().backward()
    grad = next(tensor.grad for name, tensor in module.named_parameters() if "router" in name)
    assert grad is not None
    assert bool(grad.isfinite().all())


def test_a_tree_scores_the_rows_of_calibration() -> None:
    """Its splits are a buffer, which selectors and repairs that look at rows need too."""
    torch.manual_seed(0)
    model, x = GatedFfn(8, 32).eval(), torch.randn(64, 8)
    split = SplitExperts(4, router="tree", selector="top_p", repair="mean", shared=0.0, density=0.5)
    program = Pipeline((split,)).run(capture(model, (x,)), Context(batches=[(x,)]))
    assert next(iter(program.decisions.values())).density == pytest.approx(0.5, abs=0.05)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 99))
def test_as_many_experts_as_trees_have_a_probability_where_splits_are_whole(experts: int, trees: int, seed: int) -> None:
    """COMET's cardinality; and several trees are the softmax over all of their leaves, added up by expert."""
    torch.manual_seed(seed)
    ffn, x = Ffn(torch.randn(12, 5), torch.randn(5, 12), "relu"), torch.randn(20, 5)
    evidence = Evidence(ffn, torch.zeros(0, 5), torch.zeros(0, 12), seed=seed)
    task = Task(evidence, torch.full((experts, 1), -1), 1.0, torch.zeros(0, experts), "output")
    for margin, whole in ((1e-6, True), (4.0, False)):
        made = tree(task, margin=margin, trees=trees)
        tensors = {name: torch.randn_like(value) if name.startswith("leaf") else value for name, value in made.tensors.items()}
        odds = made.function(x, **tensors, **made.buffers).softmax(-1)
        assert bool(((odds > 1e-12).sum(-1) <= trees).all()) or not whole
        leaves = []
        for at in range(trees):
            part = {name: value.unflatten(0, (trees, -1))[at] for name, value in tensors.items()}
            zeros = {name: torch.zeros_like(part[name]) for name in ("leaf", "leaf_offset")}
            reached = tree(task, margin=margin).function(x, part["weight"], **zeros, **made.buffers).exp()
            leaves.append((x @ part["leaf"].T + part["leaf_offset"]).exp() * reached)
        wanted = torch.stack(leaves).sum(0)
        torch.testing.assert_close(odds, wanted / wanted.sum(-1, keepdim=True), rtol=1e-3, atol=1e-6)


def test_what_lies_outside_of_the_choice_is_its_formula_and_shrinks() -> None:
    loss, scores = Named.parse("router loss", "outside"), torch.tensor([[1.0, 2.0, 3.0]]).log()
    assert float(loss(scores, torch.tensor([[2, 0]]))) == pytest.approx(1 / 3)
    assert float(loss(torch.zeros(2, 3), torch.tensor([[0, -1], [-1, -1]]))) == pytest.approx(5 / 6)
    torch.manual_seed(0)
    model, x = GatedFfn(5, 12).eval(), torch.randn(200, 5)
    module, hook = sc.attach(model, (x,), sc.recipes.comet(experts=5, margin=4.0, outside=1.0))
    optimizer = torch.optim.Adam([one for name, one in module.named_parameters() if "router" in name], 0.05)
    losses = []
    for _ in range(60):
        module(x)
        optimizer.zero_grad(), hook.loss().backward(), optimizer.step(), hook.step(optimizer)
        losses.append(float(hook.loss().detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_routers_come_to_choose_what_matters_most() -> None:
    """FactorLLM's loss: its formula, 0 for a router that is sure of the best, and what it does to one that knows nothing."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), torch.randn(200, 8)
    split = SplitExperts(4, "contiguous", "random", "top_k(k=1)", 0.0, "weight_norm", repair="none")
    module, hook = sc.attach(model, (x,), Pipeline((split, PenaliseRouting("prior_approximate", 1.0))))
    module(x)
    own = {".".join(name.removesuffix("_folded").split(".")[-2:]): one for name, one in module.named_parameters()}
    row = model[0](x)
    importance = measured(row, own["experts.gate"], own["experts.down"], own["experts.up"], activation="silu", criterion="output")
    wanted = torch.nn.functional.cross_entropy(row @ own["router.weight"].T, importance.argmax(-1))
    assert float(hook.loss().detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    optimizer, first = torch.optim.Adam([own["router.weight"]], 0.05), float(wanted.detach())
    for _ in range(60):
        module(x)
        optimizer.zero_grad(), hook.loss().backward(), optimizer.step(), hook.step(optimizer)
    right = (row @ own["router.weight"].T).argmax(-1) == importance.argmax(-1)
    assert float(hook.loss().detach()) < 0.8 * first
    assert float(right.float().mean()) > 0.5


def test_a_row_is_to_choose_as_many_of_the_best_as_it_does() -> None:
    """Selectors that take a number of their own in each row leave places at -1, which are no experts."""
    class Known:
        def importance(self, criterion: str, every: int) -> Tensor:
            return torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [1.0, 2.0, 3.0]])

    loss, scores = Named.parse("router loss", "prior_approximate"), torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0], [1.0, 1.0, 1.0]])
    logs = scores.log_softmax(-1)
    wanted = -(logs[0, 0] + (logs[1, 1] + logs[1, 2]) / 2) / 3
    torch.testing.assert_close(loss(scores, torch.tensor([[2, -1, -1], [1, 0, -1], [-1, -1, -1]]), Known()), wanted)


def test_importance_is_measured_of_rows_that_autocast_made_bfloat16() -> None:
    """As sc.recover(dtype=torch.bfloat16) does: the model runs under autocast, hook.loss() does not."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), torch.randn(64, 8)
    module, hook = sc.attach(model, (x,), sc.recipes.factor_llm(), calibration=[(x,)])
    module(x)
    exact = float(hook.loss().detach())
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    assert float(hook.loss().detach()) == pytest.approx(exact, rel=0.05)
