"""Masks that are learnt on weights that stay, decaying masks, and another mask for the way back: what holds after every step, and bad input."""

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
from torch.nn import functional
from training_help import assert_resumes, net

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.errors import InputError, ParseError, StructureError
from sparsify_compiler.masked import Masked
from sparsify_compiler.masked_backward import WayBack
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train._chosen import Chosen
from sparsify_compiler.passes.train.choosers._base import Choice
from sparsify_compiler.passes.train.choosers.gumbel import Gumbel
from sparsify_compiler.passes.train.choosers.top_k import TopK, led
from sparsify_compiler.passes.train.learn_masks import LearnMasks
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.training import Hook

X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
MASKLLM = "mask_llm(steps=20, reward=1e-4)"
JACKPOTS = "lottery_jackpots(density=0.25, steps=20)"


Y = net()(X).detach()
step = partial(training_help.step, X, Y)


def attached(recipe: Any) -> tuple[nn.Module, Hook, torch.optim.Optimizer]:
    module, hook = sc.attach(net(), (X,), recipe, calibration=[(X,)])
    return module, hook, torch.optim.Adam([one for one in module.parameters() if one.requires_grad], 1e-2)


def distance(module: nn.Module) -> float:
    with torch.no_grad():
        return float((module(X) - Y).square().mean())


def taps(module: nn.Module) -> list[Chosen]:
    return [part for part in module.modules() if isinstance(part, Chosen)]


@settings(max_examples=6, deadline=None)
@given(chooser=st.sampled_from(["gumbel", "gumbel(prior=0.0)", "top_k", "top_k(power=0.0)"]), every=st.sampled_from([1, 3]),
       structure=st.sampled_from(["2:4", "1:4", "NM(n=2, m=8, along='outputs')", "unstructured", "row", "fan_in", "4x1", "Rows()"]))
def test_masks_keep_their_structure_and_density_and_weights_stay(chooser: str, structure: str, every: int) -> None:
    made = Structure.parse(structure)
    if chooser.startswith("gumbel") and ":" not in structure and "NM" not in structure:
        chooser = "top_k"
    start = sc.Pipeline.parse(f"mask_weights(structure={structure!r}, density={made.density or 0.25})")
    module, hook, optimizer = attached(start | LearnMasks(chooser, until=7, every=every))
    weights = {name: value.clone() for name, value in module.named_parameters() if "scores" not in name}
    counts = [int(mask.sum()) for mask in hook.masks.values()]
    for number in range(1, 10):
        before = [mask.clone() for mask in hook.masks.values()]
        step(module, hook, optimizer)
        for old, mask, count in zip(before, hook.masks.values(), counts, strict=True):
            assert int(mask.sum()) == count
            assert torch.equal(mask, made.mask(mask.float(), made.density or count / mask.numel()))
            if number > 7 or (number != 7 and number % every):
                assert torch.equal(old, mask)
        with torch.no_grad():
            hidden = functional.linear(X, weights["0.weight"] * hook.masks["0"], weights["0.bias"]).relu()
            assert torch.equal(module(X), functional.linear(hidden, weights["2.weight"] * hook.masks["2"], weights["2.bias"]))
    assert all(torch.equal(value, dict(module.named_parameters())[name]) for name, value in weights.items())


@pytest.mark.parametrize("recipe", [MASKLLM, JACKPOTS, "lottery_jackpots(structure='2:4', steps=20)"])
def test_learning_brings_the_network_closer_to_the_dense_one(recipe: str) -> None:
    module, hook, optimizer = attached(recipe.replace("steps=20", "steps=120"))
    before = distance(module)
    for _ in range(120):
        step(module, hook, optimizer)
    assert distance(module) < 0.9 * before
    assert all(one.choice is not None and one.choice.progress == 1 for one in taps(module))
    after = distance(module)
    assert float((module(X) - Y).square().mean().detach()) == after, "behind the last choice training passes multiply with the mask too"
    compiled = sc.compile(module, (X,), recipe="pack() | lower()" if recipe == MASKLLM else "pack()")
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), module(X))
    again, _ = sc.attach(module, (X,), "mask_weights(density=0.1)")
    assert not taps(again), "another attach begins with the masks alone"


@pytest.mark.parametrize("recipe", [MASKLLM, JACKPOTS, "bdwp(n=2, m=8)", "progressive_gradient_flow(n=1, m=8, steps=8, rate=0.2)",
                                    "progressive_gradient_flow(n=1, m=8, decays='structure', steps=8)"])
def test_resuming_is_bit_equal(recipe: str) -> None:
    assert_resumes(partial(attached, recipe), partial(step, accumulate=2), 5, 6)


def test_scores_that_are_not_finite_or_frozen_leave_their_masks() -> None:
    for recipe in (MASKLLM, JACKPOTS):
        module, hook, optimizer = attached(recipe)
        first, second = taps(module)
        second.scores.requires_grad_(False)
        before = [mask.clone() for mask in hook.masks.values()]
        first.scores.data.flatten()[3] = math.nan
        second.scores.data.uniform_()
        for _ in range(3):
            step(module, hook, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(before, hook.masks.values(), strict=True))


def test_gumbel_is_what_the_paper_says() -> None:
    form = Structure.parse("2:4")
    mask = torch.tensor([[True, True, False, False, False, True, False, True]])
    chooser, choice = Gumbel(spread=0.0), Choice(form, 0.5)
    assert not bool(chooser.start(mask, choice).any()), "the prior is in units of the spread"
    prior = Gumbel(spread=1.0, prior=1000.0).start(mask, choice)
    assert torch.equal(chooser.mask(prior, mask, choice), mask)
    assert ((prior / 1000).round().int() + 1).tolist() == [[2, 1, 1, 1, 1, 0], [1, 0, 1, 1, 2, 1]], "weights in common, less the average"
    scores = torch.zeros(1, 6, requires_grad=True)
    shares = torch.stack([chooser.soft(scores, mask[:, :4], Choice(form, 0.5, 0.0, seed)) for seed in range(2000)])
    torch.testing.assert_close(shares.sum(2), torch.full((2000, 1), 2.0))
    torch.testing.assert_close(shares.mean(0), torch.full((1, 4), 0.5), atol=0.02, rtol=0)
    ahead = torch.tensor([[0.0, 0, 0, 0, 0, 0.01]])
    late = torch.stack([chooser.soft(ahead, mask[:, :4], Choice(form, 0.5, 0.999, seed)) for seed in range(2000)])
    picked = float((late[:, 0, 2] * late[:, 0, 3]).mean())  # e^(500 * 0.01) against five times 1
    assert abs(picked - math.exp(4.996) / (math.exp(4.996) + 5)) < 0.01
    assert float(((late < 0.1) | (late > 0.9)).float().mean()) > 0.97, "at last one candidate is drawn nearly whole"


def test_shares_are_not_rounded_under_autocast() -> None:
    form, mask = Structure.parse("2:4"), torch.tensor([[True, True, False, False]])
    scores = torch.randn(1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 0.01
    plain = Gumbel().soft(scores, mask, Choice(form, 0.5, 0.5, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Gumbel().soft(scores, mask, Choice(form, 0.5, 0.5, 3)), plain)


def test_every_pass_draws_anew_until_the_learning_is_done() -> None:
    module, hook, _ = attached("mask_llm(steps=20)")
    first = [module(X).detach() for _ in range(3)]
    assert not torch.equal(first[0], first[1])
    hook.load_state_dict({"steps": 0})
    assert all(torch.equal(module(X), y) for y in first), "the same passes of the same step draw the same"
    hook.load_state_dict({"steps": 20})
    with torch.no_grad():
        hard = module(X)
    assert torch.equal(module(X), hard)
    for one in taps(module):
        one.scores.data.zero_()
    assert torch.equal(module(X), hard)
    module(X).sum().backward()
    assert not any(one.scores.grad is not None and bool(one.scores.grad.any()) for one in taps(module))


def test_a_learnt_mask_gets_the_gradient_of_its_chooser() -> None:
    module, hook, _ = attached(JACKPOTS)
    first = taps(module)[0]
    weight, mask = module.get_parameter("0.weight"), hook.masks["0"]
    soft = mask.float().requires_grad_()
    hidden = functional.linear(X, weight * soft, module.get_parameter("0.bias")).relu()
    y = functional.linear(hidden, module.get_parameter("2.weight") * hook.masks["2"], module.get_parameter("2.bias"))
    functional.mse_loss(y, Y).backward()
    functional.mse_loss(module(X), Y).backward()
    torch.testing.assert_close(first.scores.grad, soft.grad)
    assert weight.grad is None


def test_the_reward_is_of_what_the_last_pass_multiplied_with() -> None:
    module, hook, _ = attached("mask_llm(steps=20, reward=0.5)")
    assert float(hook.loss().detach()) == 0, "nothing went by"
    module(X)
    total = sum(float(one.seen.detach().square().sum()) for one in taps(module) if one.seen is not None)
    assert float(hook.loss().detach()) == pytest.approx(-0.5 * total)
    hook.load_state_dict({"steps": 15})
    module(X)
    total = sum(float(one.seen.detach().square().sum()) for one in taps(module) if one.seen is not None)
    assert float(hook.loss().detach()) == pytest.approx(-0.5 * 0.25 * total)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), most=st.integers(0, 40))
def test_a_lead_lets_those_in_that_are_furthest_ahead(seed: int, most: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, mask = torch.rand(8, 16, generator=generator), torch.rand(8, 16, generator=generator) < 0.3
    choice = Choice(Structure.parse("unstructured"), float(mask.double().mean()))
    wanted = choice.structure.mask(scores, choice.density)
    found = led(scores, mask, wanted, choice, most)
    assert int(found.sum()) == int(mask.sum())
    new, gone = found & ~mask, mask & ~found
    assert int(new.sum()) == int(gone.sum()) <= most
    if not most:
        assert torch.equal(found, mask)
    assert int(new.sum()) >= min(most, int((wanted & ~mask).sum())) - 1, "as many as may"
    if bool(new.any()):
        assert not bool((scores[new].min() < scores[~found & ~mask]).any()), "none that is left out scores higher"
        assert not bool((scores[gone].max() > scores[found & mask]).any())


def test_restriction_falls_to_nothing() -> None:
    mask, choice = torch.tensor([[True, True, False, False]]), Choice(Structure.parse("unstructured"), 0.5, 0.5)
    scores = torch.tensor([[0.0, 0.1, 1.0, 2.0]])
    assert TopK(power=0.0).mask(scores, mask, choice).tolist() == [[False, False, True, True]]
    assert TopK(power=1.0).mask(scores, mask, choice).tolist() == [[False, True, False, True]]
    assert torch.equal(TopK(power=4.0).mask(scores, mask, Choice(choice.structure, 0.5, 1.0)), mask)


def test_bfloat16_convolutions_and_a_weight_that_is_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.weight = nn.Conv2d(4, 4, 2), nn.Parameter(torch.randn(16, 16))
            self.register_buffer("mask", torch.tensor([True, False, True, False]).repeat(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.mask, Tensor)
            y = self.conv(x).flatten(1)
            return functional.linear(functional.linear(y, self.weight * self.mask).tanh(), self.mask * self.weight)  # two nodes

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(8, 4, 3, 3)
    target = model(x).detach()
    recipe = "mask_weights(structure='2:4', targets=('conv',)) | learn_masks(structure='2:4', until=30)"
    module, hook = sc.attach(model, (x,), recipe)
    assert len(taps(module)) == 2, "one choice for a weight and its mask"
    optimizer = torch.optim.Adam([one for one in module.parameters() if one.requires_grad], 1e-2)
    assert len([one for one in module.parameters() if one.requires_grad]) == 2
    before = {name: mask.clone() for name, mask in hook.masks.items()}
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            loss = (module(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    assert any(not torch.equal(mask, before[name]) for name, mask in hook.masks.items())
    assert all(bool((mask.reshape(mask.shape[0], -1, 4).sum(2) == 2).all()) for mask in hook.masks.values())
    with torch.no_grad():
        torch.testing.assert_close(sc.compile(module, (x,), recipe="pack()")(x), module(x))


def test_only_what_is_masked_is_frozen_on_request() -> None:
    module, _ = sc.attach(net(), (X,), "mask_weights(structure='2:4') | learn_masks(freeze=False)")
    assert {name for name, one in module.named_parameters() if not one.requires_grad} == {"0.weight", "2.weight"}


@pytest.mark.parametrize("structure", ["Rows(size=3)", "Columns(size=3)", "4x1"])
@pytest.mark.parametrize("moves", ["learn_masks(chooser='top_k(power=0.0)', until=5)", "move_masks(every=1, straight_through=True)"])
def test_as_many_groups_are_kept_where_the_last_is_smaller(structure: str, moves: str) -> None:
    torch.manual_seed(0)
    model, form = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 8)).eval(), Structure.parse(structure)
    module, hook = sc.attach(model, (X,), f"mask_weights(structure={structure!r}, density=0.5) | {moves}")
    kept = lambda: [len(form.groups(*mask.shape)[mask].unique()) for mask in hook.masks.values()]  # noqa: E731
    before, first = kept(), hook.masks["0"].clone()
    for _ in range(4):
        for one in module.parameters():
            one.data.uniform_()
        hook.step()
        assert kept() == before
    assert not torch.equal(hook.masks["0"], first)


def test_a_mask_is_learnt_once_and_by_one_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 16))
            self.register_buffer("mask", torch.tensor([True, False, True, False]).repeat(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.mask, Tensor)
            return functional.linear(functional.linear(x, self.a * self.mask).tanh(), self.b * self.mask)

    with pytest.raises(InputError, match="two weights share"):
        sc.attach(Shared().eval(), (X,), "learn_masks(structure='2:4')")
    with pytest.raises(InputError, match="another pass"):
        attached("mask_weights(structure='2:4') | learn_masks() | learn_masks(chooser='top_k')")
    with pytest.raises(StructureError, match="do not divide"):
        attached("mask_weights(density=0.5) | learn_masks(chooser='top_k', structure='2:3')")


def test_bad_options_of_learning() -> None:
    for wrong in ({"until": 0}, {"every": 0}, {"reward": -1.0}, {"chooser": "gumbel(scale=1)"}):
        with pytest.raises(ParseError):
            LearnMasks(**wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="two numbers"):
        LearnMasks("gumbel(scale=(1.0,))")
    with pytest.raises(InputError, match="n:m groups"):
        attached("mask_weights(density=0.5) | learn_masks()")
    with pytest.raises(InputError, match="candidates"):
        attached("mask_weights(structure='8:16') | learn_masks()")
    with pytest.raises(InputError, match="does not divide"):
        attached("mask_weights(structure=NM(n=2, m=6, padded=True)) | learn_masks()")
    with pytest.raises(InputError, match="another pass"):
        attached("mask_weights(structure='2:4') | move_masks() | learn_masks()")


# --- decaying masks, and the way back -----------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_kept_count_less_and_less_and_only_in_training() -> None:
    module, hook = sc.attach(net(), (X,), "mask_weights(structure='2:4') | move_masks(rest='exponential(rate=0.5, end=3)')")
    hard = lambda: {name: module.get_parameter(f"{name}.weight") * mask for name, mask in hook.masks.items()}  # noqa: E731
    for steps, share in ((0, 1.0), (1, math.exp(-0.5)), (2, math.exp(-1)), (3, 0.0)):
        hook.load_state_dict({"steps": steps})
        module.zero_grad()
        weights = {name: (module.get_parameter(f"{name}.weight") * (mask + share * ~mask)) for name, mask in hook.masks.items()}
        hidden = functional.linear(X, weights["0"], module.get_parameter("0.bias")).relu()
        expected = functional.linear(hidden, weights["2"], module.get_parameter("2.bias"))
        torch.testing.assert_close(module(X), expected)
        gradient = torch.autograd.grad(expected.square().mean(), module.get_parameter("0.weight"))[0]
        module(X).square().mean().backward()
        torch.testing.assert_close(module.get_parameter("0.weight").grad, gradient)
        with torch.no_grad():
            hidden = functional.linear(X, hard()["0"], module.get_parameter("0.bias")).relu()
            assert torch.equal(module(X), functional.linear(hidden, hard()["2"], module.get_parameter("2.bias")))


def test_a_decaying_mask_lets_the_whole_gradient_through_where_that_goes_straight() -> None:
    module, hook = sc.attach(net(), (X,), "progressive_gradient_flow(n=1, m=8, steps=10, rate=0.3)")
    hook.load_state_dict({"steps": 2})
    share = math.exp(-0.6)
    soft = [(module.get_parameter(f"{name}.weight") * (mask + share * ~mask)).detach().requires_grad_() for name, mask in hook.masks.items()]
    hidden = functional.linear(X, soft[0], module.get_parameter("0.bias")).relu()
    functional.linear(hidden, soft[1], module.get_parameter("2.bias")).square().mean().backward()
    module(X).square().mean().backward()
    torch.testing.assert_close(module.get_parameter("0.weight").grad, soft[0].grad)


def test_the_structure_decays_by_halves() -> None:
    module, hook, optimizer = attached("progressive_gradient_flow(n=1, m=8, decays='structure', steps=8)")
    found = [int(hook.masks["0"][0].sum())]
    for _ in range(9):
        step(module, hook, optimizer)
        mask = hook.masks["0"]
        assert len(set(mask.view(32, 2, 8).sum(2).flatten().tolist())) == 1
        found.append(int(mask[0].sum()))
    assert [one // 2 for one in found] == [7, 7, 4, 4, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("n", "m"), [(1, 16), (3, 8), (5, 8), (2, 12), (3, 4), (1, 2)])
def test_the_structure_decays_to_what_was_asked_for(n: int, m: int) -> None:
    pipeline = sc.recipes.progressive_gradient_flow(n, m, "structure", 60)
    density = [1 - (1 - n / m) * Named.parse("schedule", pipeline.passes[1].options()["sparsity"])(step) for step in range(61)]
    assert density[0] == pytest.approx((m - 1) / m)
    assert density[-1] == pytest.approx(n / m)
    assert density == sorted(density, reverse=True)


@pytest.mark.parametrize("convolution", [False, True])
def test_what_goes_back_goes_through_the_other_mask(convolution: bool) -> None:
    torch.manual_seed(0)
    first, last = (nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=2)) if convolution else (nn.Linear(16, 32), nn.Linear(32, 8))
    model, x = nn.Sequential(first, nn.Tanh(), last).eval(), torch.randn(6, 4, 8, 8) if convolution else X
    recipe = f"mask_weights(structure=NM(n=2, m=4, padded=True), targets=('{'conv' if convolution else 'linear'}',))"
    back = "NM(n=2, m=4, along='outputs', padded=True)"
    plain, _ = sc.attach(model, (x,), f"{recipe} | move_masks(straight_through=True)")
    module, hook = sc.attach(model, (x,), f"{recipe} | move_masks(straight_through=True, backward={back})")
    assert torch.equal(module(x), plain(x))
    weight = module.get_parameter("2.weight")
    mask = Structure.parse(back).mask(weight.detach().abs(), 0.5)
    assert [part.mask for part in module.modules() if isinstance(part, WayBack)][1].equal(mask)
    forward = functional.conv2d if convolution else functional.linear
    options = {"padding": 1, "groups": 2} if convolution else {}
    middle = forward(x, module.get_parameter("0.weight") * hook.masks["0"], module.get_parameter("0.bias")).tanh().detach().requires_grad_()
    y = forward(middle, weight * mask, module.get_parameter("2.bias"), **options)  # type: ignore[operator]
    straight = module(x)
    gradient = 2 * straight.detach() / straight.numel()
    expected = torch.autograd.grad(y, middle, gradient)[0]
    bias = torch.autograd.grad(straight.square().mean(), module.get_parameter("0.bias"), retain_graph=True)[0]
    through = (expected * (1 - middle.detach().square())).sum((0, 2, 3) if convolution else 0)
    torch.testing.assert_close(bias, through)
    own, theirs = (torch.autograd.grad(one(x).square().mean(), one.get_parameter("2.weight"))[0] for one in (module, plain))
    torch.testing.assert_close(own, theirs)
    with torch.no_grad():
        torch.testing.assert_close(sc.compile(module, (x,), recipe="pack()")(x), module(x))


def test_the_way_back_follows_the_weights_as_the_mask_does() -> None:
    module, hook, optimizer = attached("bdwp(n=2, m=8)")
    for _ in range(5):
        step(module, hook, optimizer, dtype=torch.bfloat16)
        for name, back in zip(("0", "2"), (part for part in module.modules() if isinstance(part, WayBack)), strict=True):
            score = module.get_parameter(f"{name}.weight").detach().abs()
            assert torch.equal(back.mask, Structure.parse("NM(n=2, m=8, along='outputs')").mask(score, 0.25))
            assert torch.equal(hook.masks[name], Structure.parse("2:8").mask(score, 0.25))
    assert not any(one.wanted for one in module.modules() if isinstance(one, Masked))


def test_schedules_that_fall_and_that_jump() -> None:
    line, exponential, stages = (catalog.get("schedule", name) for name in ("line", "exponential", "stages"))
    assert [line(s, start=10, end=20) for s in (0, 10, 15, 20, 30)] == [1, 1, 0.5, 0, 0]
    assert [exponential(s, start=2, end=6, rate=1.0) for s in (0, 2, 4, 6)] == pytest.approx([1, 1, math.exp(-2), 0])
    assert [exponential(s, start=2, end=6, rate=-1.0, before=0.0) for s in (0, 2, 4, 6)] == pytest.approx([0, 1, math.exp(2), 0])
    assert [stages(s, starts=(2, 4), levels=(0.5, 1.0)) for s in (0, 1, 2, 3, 4, 9)] == [0, 0, 0.5, 0.5, 1, 1]
    for text in ("line(start=5, end=5)", "exponential(end=0)", "stages(starts=(2, 1), levels=(0.5, 1.0))", "stages(starts=(1,), levels=(0.5, 1.0))"):
        with pytest.raises(ParseError):
            MoveMasks(sparsity=text)


def test_bad_options_of_rests_and_ways_back() -> None:
    with pytest.raises(StructureError, match="do not divide"):
        attached("mask_weights(structure='2:4') | move_masks(backward=NM(n=1, m=7, along='outputs'))")
    with pytest.raises(InputError, match="that are not kept"):
        attached("mask_weights(density=0.25) | move_masks(rest='line') | pack()")
