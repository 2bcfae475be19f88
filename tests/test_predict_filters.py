"""Filters that are predicted for the image at hand: exact at first, learnt by the maps alone, and zeros where they say so."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from training_help import assert_resumes

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.activation.predict_filters import PredictFilters, matter
from sparsify_compiler.passes_api import Context
from sparsify_compiler.training import Hook

LABELS = torch.arange(12) % 2


def images() -> Tensor:
    """Of two kinds, bright in one of two channels."""
    x = 0.1 * torch.rand(12, 2, 10, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    x[LABELS == 0, 0] += 1
    x[LABELS == 1, 1] += 1
    return x


X = images()


def net() -> nn.Module:
    """Half of the first filters see the first channel, half the second: which ones matter depends on the image."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                          nn.Flatten(), nn.Linear(288, 2))
    with torch.no_grad():
        model[0].weight.abs_()  # type: ignore[operator, union-attr]
        model[0].weight[:4, 1] = 0  # type: ignore[index, union-attr]
        model[0].weight[4:, 0] = 0  # type: ignore[index, union-attr]
    return model.eval()


def attached(mass: float = 0.9, weight: float = 1.0) -> tuple[nn.Module, Hook, torch.optim.Optimizer]:
    module, hook = sc.attach(net(), (X,), sc.recipes.ftwt(mass, weight))
    return module, hook, torch.optim.AdamW(module.parameters(), 5e-2, weight_decay=0)


def step(module: nn.Module, hook: Hook, optimizer: torch.optim.Optimizer) -> float:
    loss = functional.cross_entropy(module(X), LABELS) + hook.loss()
    loss.backward()
    optimizer.step()
    hook.step(optimizer)
    optimizer.zero_grad()
    return float(loss.detach())


def first_maps(module: nn.Module, x: Tensor = X) -> Tensor:
    """What the first convolution hands on behind its selection: [images, filters, ...]."""
    program = sc.capture(module.eval(), (x,))
    seen: list[Tensor] = []
    (region,) = program.regions.values()
    relu = next(node for node in region.graph.nodes if "relu" in str(node.target))

    class Look(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            value = super().run_node(n)
            if n is relu.all_input_nodes[0]:
                seen.append(value)
            return value

    with torch.no_grad():
        Look(region.module, graph=region.graph).run(x)
    return seen[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.floats(0.05, 1.0), st.integers(0, 1000))
def test_what_matters_is_the_fewest_filters_that_hold_the_mass(filters: int, mass: float, seed: int) -> None:
    maps = torch.randn(4, filters, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    found, sums = matter(maps, mass), maps.relu().sum((2, 3)).double()
    for chosen, own in zip(found, sums, strict=True):
        wanted = mass * own.sum()
        assert own[chosen].sum() >= wanted - 1e-9
        if bool(chosen.any()):
            assert own[chosen].sum() - own[chosen].min() < wanted + 1e-9
            assert bool((own[chosen].min() >= own[~chosen]).all())


def test_at_first_nothing_changes() -> None:
    module, _, _ = attached()
    with torch.no_grad():
        torch.testing.assert_close(module(X), net()(X), rtol=1e-4, atol=1e-5)


def test_images_get_filters_of_their_own() -> None:
    module, hook, optimizer = attached()
    losses = [step(module, hook, optimizer) for _ in range(60)]
    assert losses[-1] < losses[0] / 2
    used = first_maps(module).abs().sum((2, 3)) != 0
    assert bool((used[LABELS == 0] == used[0]).all())
    assert not torch.equal(used[0], used[1]), "all images have the same filters: that is static pruning"
    assert float(used.double().mean()) < 0.8
    assert float((module(X).argmax(1) == LABELS).double().mean()) == 1


def test_predictions_learn_by_their_own_loss_alone() -> None:
    """And the network by its own: no gradient of the one goes to the other."""
    module, hook, _ = attached()
    predictors = {name: one for name, one in module.named_parameters() if "predictor" in name}
    assert len(predictors) == 4
    for one in predictors.values():
        one.data.fill_(0.1)  # with weights of 0 no gradient would go on anyway
    functional.cross_entropy(module(X), LABELS).backward()
    assert all(one.grad is None or not bool(one.grad.any()) for one in predictors.values())
    module.zero_grad()
    module(X)
    hook.loss().backward()
    assert all(bool(one.grad.any()) for one in predictors.values() if one.grad is not None and one.dim() == 1)
    assert all(one.grad is None or not bool(one.grad.any()) for name, one in module.named_parameters() if name not in predictors)


def test_a_filter_is_computed_where_a_linear_layer_of_the_largest_inputs_says_so() -> None:
    """By hand, with weights that let some filters through for some images."""
    module, x = attached()[0], torch.randn(12, 2, 10, 10, generator=torch.Generator().manual_seed(4), dtype=torch.float32)
    convs = dict(module.named_parameters())
    weight, bias = (convs[f"0.weight_folded_predictor_{part}"] for part in ("weight", "bias"))
    assert weight.dim() == 2
    with torch.no_grad():
        weight.normal_(generator=torch.Generator().manual_seed(3)), bias.fill_(0.1)
        kept = functional.linear(x.amax((2, 3)), weight, bias) >= 0
        maps = functional.conv2d(x, convs["0.weight_folded"], convs["0.bias_folded"])
    assert 0 < int(kept.sum()) < kept.numel()
    assert len(kept.unique(dim=0)) > 1
    torch.testing.assert_close(first_maps(module, x), maps * kept[:, :, None, None], rtol=1e-5, atol=1e-6)


def test_the_weight_of_its_loss_and_the_layers_that_have_one_are_the_users() -> None:
    losses = {}
    for weight, schedule in ((1.0, "constant"), (3.0, "constant"), (3.0, "ramp(end=10)")):
        module, hook = sc.attach(net(), (X,), PredictFilters(weight=weight, schedule=schedule))
        module(X)
        losses[weight, schedule] = float(hook.loss().detach())
    assert losses[3.0, "constant"] == pytest.approx(3 * losses[1.0, "constant"])
    assert losses[3.0, "ramp(end=10)"] == 0
    program = sc.recipes.ftwt(ignore=("3",)).run(sc.capture(net(), (X,)), Context(example_inputs=(X,)))
    assert [name for name, _ in instantiate(program).named_parameters() if "predictor_bias" in name] == ["0.weight_folded_predictor_bias"]
    assert "batch_norm" not in program.text(), "maps are what activations see"


def test_less_mass_are_fewer_filters() -> None:
    share = {}
    for mass in (0.5, 0.95):
        module, hook, optimizer = attached(mass)
        for _ in range(40):
            step(module, hook, optimizer)
        share[mass] = float((first_maps(module).abs().sum((2, 3)) != 0).double().mean())
    assert share[0.5] < share[0.95]


def test_a_run_that_is_resumed_is_the_same_to_the_bit() -> None:
    assert_resumes(partial(attached), step, 3, 3)


def test_what_it_leaves_alone_it_says() -> None:
    ctx = Context(example_inputs=(X,))
    program = PredictFilters(least=20).run(sc.capture(net(), (X,)), ctx)
    assert ctx.rewrites == 0
    assert "8 filters, fewer than least=20" in str(ctx.misses[0])
    twice = sc.Pipeline.parse("predict_filters() | predict_filters()").run(program, Context(example_inputs=(X,)))
    assert sum(name.endswith("predictor_bias") for name, _ in instantiate(twice).named_parameters()) == 2
    with pytest.raises(ParseError, match="mass"):
        PredictFilters(mass=0.0)


def test_a_mask_and_an_image_that_is_no_batch_are_left_alone() -> None:
    for recipe, x, why in (("mask_weights(targets=('conv',), density=0.5) | predict_filters()", X, "has a mask"),
                           ("predict_filters()", X[0], "no batch")):
        ctx = Context(example_inputs=(x,))
        sc.Pipeline.parse(recipe).run(sc.capture(nn.Conv2d(2, 8, 3).eval(), (x,)), ctx)
        assert why in " ".join(map(str, ctx.misses))
