"""What holds for every recipe of the catalogue that trains with masks: zeros hold after every step but where something grows, and runs resume."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch
import training_help
from torch import Tensor, nn
from torch.nn import functional
from training_help import assert_resumes

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.passes.train.learn_masks import LearnMasks
from sparsify_compiler.passes.train.move_masks import MoveMasks
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.training import Hook

X = torch.randn(24, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
Y = torch.randn(24, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
GIVEN = {"density": 0.5, "steps": 6, "every": 2, "group": 8, "size": 4, "batches": 4, "rank": 2}
TRAINED = {MoveMasks, LearnMasks}
step = partial(training_help.step, X, Y)


class Net(nn.Module):
    """Two FFNs with their residuals: what all of these recipes find something in."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList((nn.Linear(16, 32), nn.Linear(32, 16))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in self.layers:  # type: ignore[misc]
            x = x + down(functional.relu(up(x)))
        return x


def made(name: str) -> Pipeline:
    recipe = catalog.get("recipe", name)
    known = inspect.signature(recipe).parameters
    pipeline: Pipeline = recipe(**{key: value for key, value in GIVEN.items() if key in known})
    return pipeline


def with_masks() -> list[str]:
    """Recipes with a pass of passes/train and one that masks."""
    found = []
    for name in catalog.names("recipe"):
        try:
            names = [one.name() for one in made(name).passes]
            trains = any(".passes.train." in type(one).__module__ for one in made(name).passes)
        except (SparsifyError, TypeError):
            continue
        if trains and "mask_weights" in names:
            found.append(name)
    return found


def attached(name: str) -> tuple[nn.Module, Hook, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module, hook = sc.attach(Net().eval(), (X,), made(name), calibration=[(X,)])
    return module, hook, torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], 1e-2, weight_decay=0.1)


def test_there_are_some() -> None:
    assert {"rigl", "gmp", "mask_llm", "pst", "ast", "app", "g2gnet", "activate_while_pruning", "sqft", "srigl"} <= set(with_masks())


@pytest.mark.parametrize("name", with_masks())
def test_no_zero_is_lost_but_where_its_updater_grows(name: str) -> None:
    module, hook, optimizer = attached(name)
    grows = any((isinstance(one, MoveMasks) and (one.grow is not None or one.straight_through)) or isinstance(one, LearnMasks)
                for one in made(name).passes)
    pairs = {key: module.get_parameter(key.removesuffix("_mask")) for key, one in module.named_buffers() if key.endswith("_mask")}
    assert pairs
    for _ in range(8):
        before = {key: module.get_buffer(key).clone() for key in pairs}
        step(module, hook, optimizer)
        with torch.no_grad():
            expected = module(X)
            for key, weight in pairs.items():
                mask = module.get_buffer(key)
                assert grows or not bool((mask & ~before[key]).any())
                kept = weight.clone()
                weight.masked_fill_(~mask, 3.0)
                assert torch.equal(module(X), expected), f"what {key} cuts has an effect"
                weight.copy_(kept)


@pytest.mark.parametrize("name", with_masks())
def test_a_run_that_is_resumed_is_the_same_to_the_bit(name: str) -> None:
    assert_resumes(partial(attached, name), step, 3, 4)


def test_a_cropped_network_has_fewer_filters_and_learns() -> None:
    """By layers, as ERK shares out; the result is dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 16))
    images, labels = X.view(24, 1, 4, 4), torch.arange(24) % 16
    module, _ = sc.attach(model.eval(), (images,), sc.recipes.precropping(0.5))
    small, large = len(module.get_parameter("0.weight")), len(module.get_parameter("2.weight"))
    assert large / 32 < small / 8 <= 1
    assert module.get_parameter("2.weight").shape == (large, small, 3, 3)
    assert not any(one.dtype == torch.bool for one in module.buffers())
    optimizer, losses = torch.optim.AdamW(module.parameters(), 1e-2), []
    for _ in range(6):
        loss = functional.cross_entropy(module(images), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def convolutional() -> nn.Module:
    """Images of 4 x 4: what recipes of gates on filters and places find something in."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
                         nn.Linear(128, 16)).eval()


class Attending(nn.Module):
    """Two blocks of attention and an FFN around a stream of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList((nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 64), nn.Linear(64, 16))) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for qkv, out, up, down in self.layers:  # type: ignore[misc]
            q, k, v = qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            x = x + down(functional.relu(up(x)))
        return x


IMAGES = X.view(24, 1, 4, 4)
STREAMS = X.view(2, 12, 16)
GATED = {  # recipes that train without a mask of weights: the model, its inputs, and options
    "pat": (Net, X, {"density": 0.5, "rank": 2, "mixing": 2, "steps": 6, "targets": ("neurons",)}),
    "sparse_places": (convolutional, IMAGES, {"density": 0.5, "steps": 6}),
    "ftwt": (convolutional, IMAGES, {"mass": 0.7, "least": 1}),
    "delta_activations": (Net, STREAMS, {"step": 0.3}),
    "lemo": (Attending, STREAMS, {"density": 0.5, "rank": 2}),
    "spt": (Attending, STREAMS, {"share": 0.5, "experts": 4, "block": 4, "rank": 2}),
}


def gated(name: str) -> tuple[nn.Module, Hook, torch.optim.Optimizer]:
    model, x, options = GATED[name]
    torch.manual_seed(0)
    module, hook = sc.attach(model().eval(), (x,), catalog.get("recipe", name)(**options), calibration=[(x,)])  # type: ignore[operator]
    return module, hook, torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], 5e-2, weight_decay=0.1)


def gated_step(name: str) -> partial[float]:
    x = GATED[name][1]
    return partial(training_help.step, x, Y.view(x.shape) if x is STREAMS else Y)


@pytest.mark.parametrize("name", ["lemo", "spt"])
def test_what_a_fine_tuning_freezes_stays_to_the_bit(name: str) -> None:
    """And what it trains moves: adapters in both, routers in spt alone."""
    module, hook, optimizer = gated(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for _ in range(4):
        gated_step(name)(module, hook, optimizer)
    moved = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert moved >= {key for key in before if "low_rank" in key and "router" not in key}
    assert all("low_rank" in key or (name == "spt" and "router" in key) for key in moved), moved
    assert any("router" in key for key in moved) == (name == "spt")


@pytest.mark.parametrize("name", ["pat", "sparse_places"])
def test_what_gates_shut_has_no_effect_after_any_step(name: str) -> None:
    """As many as at the start, whatever the optimizer did to the gates; and at last they were others."""
    module, hook, optimizer = gated(name)
    x, masks = GATED[name][1], {key: one for key, one in module.named_buffers() if key.endswith("_mask")}
    first = {key: mask.clone() for key, mask in masks.items()}
    assert masks
    for _ in range(8):
        gated_step(name)(module, hook, optimizer)
        module.eval()
        with torch.no_grad():
            expected = module(x)
            for key in masks:
                gate, mask = module.get_parameter(key.removesuffix("_mask")), module.get_buffer(key)
                assert int(mask.sum()) == int(first[key].sum())
                assert 0 < int(mask.sum()) < mask.numel()
                kept = gate.clone()
                gate.masked_fill_(~mask, 3.0)
                assert torch.equal(module(x), expected), f"what {key} shuts has an effect"
                gate.copy_(kept)
        module.train()
    assert any(not torch.equal(module.get_buffer(key), mask) for key, mask in first.items())


@pytest.mark.parametrize("name", list(GATED))
def test_such_a_run_that_is_resumed_is_the_same_to_the_bit(name: str) -> None:
    assert_resumes(partial(gated, name), gated_step(name), 3, 4)
