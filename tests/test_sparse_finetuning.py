"""PST, AST, APP, AP and G2GNet: their formulas as the papers' code computes them, what holds after every step, resuming to the bit, bad input."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import training_help
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from training_help import assert_resumes, in_two_processes, net, sgd

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.call import instantiate
from sparsify_compiler.errors import InputError, ParseError, StructureError
from sparsify_compiler.masked_pairs import Pairs, correlation
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.scores.unmoved_negatives import unmoved_negatives
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train._moving import regrown
from sparsify_compiler.passes.train.adapters.group_sums import group_sums
from sparsify_compiler.passes.train.choosers._base import Choice
from sparsify_compiler.passes.train.choosers.factored import Factored
from sparsify_compiler.passes.train.learn_masks import LearnMasks
from sparsify_compiler.training import Hook

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
Y = torch.randn(48, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
PST = "pst(density=0.25, rank=4, scores=3, steps=9)"
AST = "ast(steps=9, every=2, size=4)"
APP = "app(density=0.25, batches=4, steps=3)"
AP = "activate_while_pruning(density=0.25, steps=9, every=2)"
G2G = "g2gnet(density=0.5, group=8, steps=9, every=2)"
RECIPES = [PST, AST, APP, AP, G2G]
step = partial(training_help.step, X, Y)


def attached(recipe: str) -> tuple[nn.Module, Hook, torch.optim.Optimizer]:
    module, hook = sc.attach(net(), (X,), recipe)
    return module, hook, torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], 1e-2)


def masks(module: nn.Module) -> dict[str, Tensor]:
    return {name: one.clone() for name, one in module.named_buffers() if one.dtype == torch.bool}


# --- what holds for all -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_hold_and_come_back_only_where_the_recipe_says(recipe: str) -> None:
    """After every step: what is cut gives nothing, and only masks that are chosen anew, or grow, have new places."""
    module, hook, optimizer = attached(recipe)
    losses = []
    for number in range(1, 13):
        before = masks(module)
        losses.append(step(module, hook, optimizer))
        moved = {PST: number <= 9, AST: number <= 9 and (number % 2 == 0 or number == 9), APP: number in (3, 6, 9),
                 AP: number <= 9 and (number % 2 == 0 or number == 9), G2G: number <= 9 and (number % 2 == 0 or number == 9)}[recipe]
        for name, mask in masks(module).items():
            assert moved or torch.equal(mask, before[name])
            if recipe in (APP, AP):
                assert not bool((mask & ~before[name]).any())
            if recipe == G2G:
                assert int(mask.sum()) == int(before[name].sum())
            if recipe == AST:
                assert torch.equal(mask.view(-1, 4).sum(1), torch.full((mask.numel() // 4,), 2))
    assert losses[-1] < losses[0]
    if recipe in (PST, APP, AP):
        assert [int(mask.sum()) for mask in masks(module).values()] == [128, 64]
    module.eval()
    with torch.no_grad():
        expected = module(X)
        compiled = sc.finalize(module, (X,))
        torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
        for name, mask in masks(module).items():
            weight = module.get_parameter(name.removesuffix("_mask"))
            weight[~mask] = 7.0
        assert torch.equal(module(X), expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resuming_is_bit_equal(recipe: str) -> None:
    assert_resumes(partial(attached, recipe), step, 5, 6)


@pytest.mark.parametrize("recipe", [PST, AST, AP, G2G])
def test_accumulated_gradients_choose_alike(recipe: str) -> None:
    found = []
    for accumulate in (1, 4):
        module, hook, _ = attached(recipe)
        optimizer = sgd(module)
        for _ in range(4):
            step(module, hook, optimizer, accumulate)
        found.append(masks(module))
    for name, mask in found[0].items():
        assert float((mask != found[1][name]).float().mean()) < 0.02, "but for ties that rounding breaks"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes_choose_as_one_does_on_both_halves(recipe: str, tmp_path: Path) -> None:
    one, other = in_two_processes(attached, recipe, X, Y, 4, tmp_path)
    module, hook, _ = attached(recipe)
    optimizer = sgd(module)
    for _ in range(4):
        step(module, hook, optimizer)
    for name, value in module.state_dict().items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5)


# --- PST ----------------------------------------------------------------------------------------------------------------------------------------


def test_pst_is_the_authors_layer() -> None:
    """Forward and all gradients, of their code written plainly: a mask of |W + U V| + A B + (R + C), through which gradients go straight."""
    module, _, _ = attached(PST)
    tap = next(one for one in module.modules() if type(one).__name__ == "Chosen")
    with torch.no_grad():
        for one in module.parameters():
            if one.requires_grad:
                one.copy_(0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(one.numel()), dtype=torch.float32))
    functional.mse_loss(module(X), Y).backward()
    mask, name = module.get_buffer("0.weight_mask"), "0.weight"
    leaves = {key: module.get_parameter(f"{name}_{key}").detach().clone().requires_grad_() for key in ("reads", "writes")}
    a, b, r, c = (one.clone().requires_grad_() for one in tap.scores.detach().split([32 * 3, 3 * 16, 32, 16]))
    weight = module.get_parameter(name).detach() + leaves["writes"] @ leaves["reads"]
    score = weight.abs() + a.view(32, 3) @ b.view(3, 16) + r[:, None] + c[None]
    through = mask.float() + (score - score.detach())
    hidden = functional.linear(X, through * weight, module.get_parameter("0.bias")).relu()
    second = module.get_parameter("2.weight") + module.get_parameter("2.weight_writes") @ module.get_parameter("2.weight_reads")
    y = functional.linear(hidden, (second * module.get_buffer("2.weight_mask")).detach(), module.get_parameter("2.bias"))
    functional.mse_loss(y, Y).backward()
    torch.testing.assert_close(tap.scores.grad, torch.cat([one.grad for one in (a, b, r, c)]))  # type: ignore[misc]
    for key, leaf in leaves.items():
        torch.testing.assert_close(module.get_parameter(f"{name}_{key}").grad, leaf.grad)
    assert module.get_parameter(name).grad is None


def test_pst_chooses_the_best_of_both_scores_and_thins_out_along_a_cubic() -> None:
    module, hook, optimizer = attached(PST)
    cubic = catalog.get("schedule", "cubic")
    for number in range(1, 10):
        with torch.no_grad():
            weight = module.get_parameter("0.weight") + module.get_parameter("0.weight_writes") @ module.get_parameter("0.weight_reads")
        step(module, hook, optimizer)
        tap = next(one for one in module.modules() if type(one).__name__ == "Chosen")
        a, b, r, c = tap.scores.detach().split([32 * 3, 3 * 16, 32, 16])
        ranking = weight.abs() + a.view(32, 3) @ b.view(3, 16) + r[:, None] + c[None]
        density = 1 - 0.75 * cubic(number, end=9)
        wanted = Structure.parse("unstructured").mask(ranking, density)
        assert torch.equal(module.get_buffer("0.weight_mask"), wanted)
    trained = sum(one.numel() for one in module.parameters() if one.requires_grad)
    assert trained == sum(4 * (i + o) + 3 * (i + o) + i + o for i, o in ((16, 32), (32, 8)))


def test_a_factored_score_looks_at_a_parameter_as_it_is_and_at_convolutions() -> None:
    conv = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    module, hook = sc.attach(conv, (x,), "mask_weights(density=0.25, targets=('conv',)) | learn_masks(chooser='factored(rank=2)', until=4)")
    optimizer = torch.optim.SGD([one for one in module.parameters() if one.requires_grad], 0.5)
    for _ in range(4):
        module(x).square().mean().backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    assert [int(mask.sum()) for mask in hook.masks.values()] == [72, 72]
    choice = Choice(Structure.parse("unstructured"), 0.5, weight=torch.tensor([[1.0, -4.0], [2.0, 3.0]]))
    flat = torch.tensor([0.0, 0, 0, 0, 0, 5.0, 0, 0])   # the second row is worth 5 more
    assert Factored(rank=1).mask(flat, torch.ones(2, 2, dtype=torch.bool), choice).tolist() == [[False, False], [True, True]]
    assert Factored(rank=1, lines=0.0).mask(flat, torch.ones(2, 2, dtype=torch.bool), choice).tolist() == [[False, True], [False, True]]


# --- AST ----------------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(outputs=st.integers(1, 6), runs=st.integers(1, 4), size=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_sums_stand_for_what_is_cut(outputs: int, runs: int, size: int, seed: int) -> None:
    """On inputs that are the same within a run the layer gives what it gave before it was cut, as with the authors' projection of ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, runs * size, generator=generator, dtype=torch.float64)
    mask = torch.rand(weight.shape, generator=generator, dtype=torch.float64) < 0.5
    adapter = group_sums(weight, 0, mask, size=size)
    same = torch.randn(3, runs, generator=generator, dtype=torch.float64).repeat_interleave(size, 1)
    got = functional.linear(same, weight * mask) + adapter.formula(same, **adapter.tensors)
    torch.testing.assert_close(got, functional.linear(same, weight))
    x, projection = torch.randn(3, runs * size, generator=generator, dtype=torch.float64), torch.eye(runs, dtype=torch.float64)
    wanted = functional.linear(functional.linear(x, projection.repeat_interleave(size, 1)), adapter.tensors["writes"])
    torch.testing.assert_close(adapter.formula(x, **adapter.tensors), wanted)


def test_ast_decays_more_and_more_what_is_cut() -> None:
    module, hook, optimizer = attached("ast(steps=40, penalty=0.5, size=4)")
    weights, kept = [module.get_parameter(f"{layer}.weight") for layer in "02"], list(hook.masks.values())
    for number in range(13):
        beyond = sum(float((weight.detach() * ~mask).square().sum()) for weight, mask in zip(weights, kept, strict=True))
        assert float(hook.loss().detach()) == pytest.approx(0.25 * min(number / 10, 1) * beyond, rel=1e-4)
        step(module, hook, optimizer)


def test_ast_keeps_its_sums_beside_the_mask() -> None:
    module, _, _ = attached(AST)
    program = sc.Pipeline.parse("merge_adapters()").run(sc.capture(module.eval(), (X,)))
    assert sum(node.target == torch.ops.aten.linear.default for _, node in program.nodes()) == 4
    torch.testing.assert_close(instantiate(program)(X), module(X))
    assert sc.Pipeline.parse("add_adapters(adapter='group_sums')").passes[0].preserves == "signature"
    assert sc.Pipeline.parse("add_adapters()").passes[0].preserves == "values"
    with pytest.raises(StructureError, match="do not divide"):
        attached("ast(size=5)")
    with pytest.raises(ParseError, match="mean"):
        sc.Pipeline.parse("add_adapters(adapter=\"group_sums(start='sum')\")")


# --- APP ----------------------------------------------------------------------------------------------------------------------------------------


def test_app_keeps_what_the_authors_keep_of_each_batch() -> None:
    """Their 0.8 ** linspace(1, 4.5, 8) of the weights."""
    schedule, final = catalog.get("schedule", "geometric"), 0.8**4.5
    for stage in range(10):
        kept = 1 - (1 - final) * schedule(stage * 50 + 7, density=final, first=0.8, stages=8, every=50)
        assert kept == pytest.approx(0.8 ** (1 + 3.5 * min(stage, 7) / 7))
    for wrong in ({"density": 0.9}, {"density": 0.0}, {"first": 1.5}, {"stages": 0}, {"every": 0}, {"density": 1.0, "first": 1.0}):
        with pytest.raises(ParseError, match="stages of"):
            schedule(0, **wrong)


def test_app_cuts_by_magnitude_first_and_by_gradients_then() -> None:
    module, hook, optimizer = attached(APP)
    start = net().get_parameter("0.weight")
    assert torch.equal(hook.masks["0"], Structure.parse("unstructured").mask(start.abs(), 0.8))
    for _ in range(2):
        step(module, hook, optimizer)
    functional.mse_loss(module(X), Y).backward()
    optimizer.step()
    tap = next(one for one in module.modules() if type(one).__name__ == "Masked")
    assert tap._sum is not None
    score, before = (module.get_parameter("0.weight") * tap._sum).detach().abs(), hook.masks["0"].clone()
    hook.step(optimizer)
    density = 0.8 * (0.25 / 0.8) ** (1 / 3)
    assert torch.equal(hook.masks["0"], before & Structure.parse("unstructured").mask(score.masked_fill(~before, -math.inf), density))


# --- AP -----------------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(20, 60), st.sampled_from([0.1, 0.25, 0.5]))
def test_ap_takes_its_share_of_negatives(seed: int, size: int, share: float) -> None:
    """The authors' two cuts: the smallest of all, then as many negative ones as were moved least; what is in both is taken once."""
    generator = torch.Generator().manual_seed(seed)
    weight, start = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    count = size // 2
    score = unmoved_negatives(weight[None], {"start": start[None]}, 0, share=share)[0]
    gone = score.argsort(stable=True)[:count]
    smallest, negatives = weight.abs().argsort(), [i for i in (weight - start).abs().argsort().tolist() if weight[i] < 0]
    surely = set(smallest[: math.floor(count * (1 - share))].tolist()) | set(negatives[: math.floor(count * share)])
    limit = float(score[gone].max())
    assert all(float(score[i]) <= limit for i in surely)
    for i in gone.tolist():
        small = (weight.abs() < weight[i].abs()).sum() / (1 - share)
        idle = negatives.index(i) / share if weight[i] < 0 else math.inf
        assert float(score[i]) == pytest.approx(min(float(small), idle))


def test_ap_measures_from_where_training_started_and_counts_no_zeros() -> None:
    module, hook, optimizer = attached("activate_while_pruning(density=0.25, share=0.5, steps=4, every=2)")
    start = net().get_parameter("0.weight").detach()
    step(module, hook, optimizer)
    functional.mse_loss(module(X), Y).backward()
    optimizer.step()
    weight = module.get_parameter("0.weight").detach().clone()
    hook.step(optimizer)
    score = unmoved_negatives(weight, {"start": start}, 0, share=0.5)
    density = 1 - 0.75 * catalog.get("schedule", "cubic")(2, end=4)
    assert torch.equal(hook.masks["0"], Structure.parse("unstructured").mask(score, density))
    zeros = torch.tensor([[0.0, 0.0, 3.0, -1.0, 2.0]])
    found = unmoved_negatives(zeros, {"start": torch.zeros(1, 5)}, 0, share=0.1)
    assert found[0, :2].tolist() == [0, 0]
    assert found[0].argsort()[2] == 3, "the smallest of those that are left has rank 0 too"
    for share in (0.0, 1.0):
        with pytest.raises(ParseError, match="between 0 and 1"):
            unmoved_negatives(zeros, {"start": zeros}, 0, share=share)


# --- G2GNet -------------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 99), st.integers(1, 4))
def test_the_correlation_is_that_of_all_rows(seed: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(24, 5, generator=generator, dtype=torch.float32), torch.randn(24, 3, generator=generator, dtype=torch.float32)
    x[:, 2] = 4.0
    y[:, 1] = x[:, 0] * -2 + 5
    pairs = Pairs()
    pairs(x, y)
    assert pairs.take() is None, "nobody wants it"
    pairs.wanted = True
    for one, other in zip(x.chunk(parts), y.chunk(parts), strict=True):
        pairs(one.view(len(one), 1, 5), other.view(len(other), 1, 3))
    with torch.no_grad():
        pairs(x * 100, y)
    sums = pairs.take()
    assert sums is not None
    found = correlation(sums)
    assert float(found[1, 0]) == pytest.approx(-1, abs=1e-4)
    assert not bool(found[:, 2].any()), "what does not vary goes with nothing"
    wanted = torch.corrcoef(torch.cat([y.T, x.T]).double())[:3, 3:].float()
    wanted[:, 2] = 0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert pairs.take() is None


def test_what_does_not_vary_is_exactly_uncorrelated_far_from_zero_too() -> None:
    """Of numbers whose float32 sums round: a row that is cut whole gives its bias alone, and would grow by noise."""
    generator, far = torch.Generator().manual_seed(0), torch.linspace(0, 1000, 8)
    x, y = (torch.randn(1000, 8, generator=generator, dtype=torch.float32) for _ in range(2))
    pairs = Pairs()
    pairs.wanted = True
    pairs(x + far, torch.cat([y + far, torch.tensor([[0.1, 0.3, -0.7, 1.234]]).expand(1000, 4)], 1))
    sums = pairs.take()
    assert sums is not None
    found = correlation(sums)
    assert not bool(found[8:].any())
    torch.testing.assert_close(found[:8], torch.corrcoef(torch.cat([y.T, x.T]).double())[:8, 8:].float(), rtol=0, atol=1e-4)


class _Twice(nn.Module):
    """One layer that reads both halves of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x[:, :8]).relu() + self.layer(x[:, 8:] * 3)
        return made


def test_the_correlation_is_that_of_all_uses_and_sought_where_masks_move_alone() -> None:
    torch.manual_seed(0)
    passes = "mask_weights(score='random', density=0.25) | move_masks(grow='correlation', fraction=0.5, every=2)"
    module, hook = sc.attach(_Twice().eval(), (X,), passes)
    optimizer, found = torch.optim.SGD(module.parameters(), 0.0), [one for one in module.modules() if isinstance(one, Pairs)]
    assert len(found) == 2
    for number in (1, 2):
        module(X).square().mean().backward()
        assert all((one._sums is None) == (number == 1) for one in found)
        before = hook.masks["layer"].clone()
        optimizer.step()
        hook.step(optimizer)
    weight, rows = module.get_parameter("layer.weight").detach(), torch.cat([X[:, :8], X[:, 8:] * 3])
    outs = functional.linear(rows, net_weight(_Twice) * before, module.get_parameter("layer.bias").detach())
    related = torch.corrcoef(torch.cat([outs.T, rows.T]).double())[:8, 8:].nan_to_num(0).float().abs()
    structure = Structure.parse("unstructured")
    assert torch.equal(hook.masks["layer"], regrown(before, net_weight(_Twice).abs(), related, structure, 0.25, 0.125))
    assert not bool(weight[~hook.masks["layer"]].any())


def net_weight(kind: type[nn.Module]) -> Tensor:
    torch.manual_seed(0)
    return kind().get_parameter("layer.weight").detach()


class _Gate(nn.Module):
    """A layer that some batches do not reach, which no one graph says."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layer(x) if bool(x.sum() > -100) else x
        return made


def test_a_layer_that_no_batch_reached_keeps_its_places() -> None:
    model = nn.Sequential(nn.Linear(16, 8), _Gate()).eval()
    module, hook = sc.attach(model, (X.abs(),), "mask_weights(score='random', density=0.25) | move_masks(grow='correlation', every=1)")
    optimizer, before = torch.optim.SGD(module.parameters(), 0.1), masks(module)
    assert len(before) == 2
    with torch.no_grad():
        module.get_parameter("0.bias").fill_(-100)
    module(X).sum().backward()
    optimizer.step()
    hook.step(optimizer)
    moved = {name: not torch.equal(mask, before[name]) for name, mask in masks(module).items()}
    assert sorted(moved.values()) == [False, True]


def test_groups_are_connected_whole_and_correlated_ones_grow() -> None:
    module, hook, optimizer = attached("g2gnet(density=0.5, group=8, steps=9, every=2)")
    blocks = hook.masks["0"].view(4, 8, 2, 8).float().mean((1, 3))
    assert set(blocks.flatten().tolist()) == {0.0, 1.0}
    step(module, hook, optimizer)
    before, weight = hook.masks["0"].clone(), module.get_parameter("0.weight")
    y = module(X)
    hidden = functional.linear(X, weight * before, module.get_parameter("0.bias")).detach()
    functional.mse_loss(y, Y).backward()
    optimizer.step()
    size = weight.detach().abs().clone()
    hook.step(optimizer)
    stays = 0.5 * (1 - 0.3 * catalog.get("schedule", "cosine")(2, end=9))
    going = int(before.sum()) - math.ceil(stays * before.numel() - 1e-6)
    limit = size[before].sort().values[going - 1]
    free = (~before | (size <= limit)) & ~(before & (size > limit))
    related = torch.corrcoef(torch.cat([hidden.T, X.T]))[:32, 32:].nan_to_num(0).abs().masked_fill(~free, -1)  # rows that are cut whole are constant
    came = hook.masks["0"] & free
    assert int(came.sum()) == going
    assert set(related.flatten().topk(going).indices.tolist()) == set(came.flatten().nonzero()[:, 0].tolist())


def test_what_does_not_go_together_with_correlation_is_refused() -> None:
    start = "mask_weights(score='random', density=0.25)"
    with pytest.raises(InputError, match="packed"):
        sc.attach(net(), (X,), f"{start} | move_masks(grow='correlation') | pack()")
    conv, x = nn.Sequential(nn.Conv2d(2, 4, 3)).eval(), torch.zeros(1, 2, 5, 5, dtype=torch.float32)
    with pytest.raises(InputError, match="linear layers alone"):
        sc.attach(conv, (x,), "mask_weights(score='random', density=0.25, targets=('conv',)) | move_masks(grow='correlation')")
    module, hook, optimizer = attached(f"{start} | move_masks(grow='correlation', every=1)")
    with torch.no_grad():
        module(X)
    with pytest.raises(InputError, match="no forward pass"):
        hook.step(optimizer)
    before = masks(module)
    again, other, second = attached(f"{start} | move_masks(grow='correlation', every=1)")
    again(X * torch.inf).sum().backward()
    other.step(second)
    assert all(torch.equal(mask, before[name]) for name, mask in masks(again).items()), "what is not finite moves nothing"


def test_what_learning_and_moving_refuse() -> None:
    with pytest.raises(ParseError, match="thin out"):
        LearnMasks("gumbel", sparsity="cubic")
    with pytest.raises(ParseError, match="thin out"):
        LearnMasks("top_k", sparsity="cubic")
    LearnMasks("top_k(power=0.0)", sparsity="cubic")
    with pytest.raises(InputError, match="1 or more"):
        Named.parse("chooser", "factored(rank=0)")()
    with pytest.raises(InputError, match="computed from others"):
        attached("mask_weights(density=0.5) | move_masks() | add_adapters()")
