"""finalize(): what was trained, whatever trained it, computes the same packed and lowered, and keeps its zeros."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.errors import InputError, ModelError

X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
RECIPES = {
    "masks": ("mask_weights(structure='16x1', density=0.25)", ("bsr",)),
    "packed": ("mask_weights(structure='16x1', density=0.25) | pack()", ("bsr",)),
    "adapters": (sc.recipes.sqft(density=0.25, rank=2), ("bitmap", "csr")),
    "moved": (sc.recipes.rigl(density=0.25, steps=4, every=2), ("bitmap", "csr")),
    "learnt": (sc.recipes.mask_llm(steps=4), ("nm",)),
}


def trained(recipe: Any) -> nn.Module:
    """A network of two layers after four steps with the recipe."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    module, hook = sc.attach(net, (X,), recipe, calibration=[(X,)], dynamic={"input": {0: "rows"}})
    optimizer = torch.optim.SGD([parameter for parameter in module.parameters() if parameter.requires_grad], 0.05)
    for _ in range(4):
        ((module(X) - X).square().mean() + hook.loss()).backward()
        optimizer.step()
        hook.step(optimizer)
        optimizer.zero_grad()
    return module.eval()


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_trained_goes_on_to_kernels(name: str) -> None:
    recipe, packed = RECIPES[name]
    module = trained(recipe)
    kept, before = copy.deepcopy(module.state_dict()), module(X).detach()
    compiled = sc.finalize(module, (X,), dynamic={"input": {0: "rows"}})
    torch.testing.assert_close(compiled(X).detach(), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled(X[:3]).detach(), before[:3], rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in kept.items()), "the module may train on"
    sites = compiled.report().sites
    assert len(sites) == 2
    assert all(site.density == pytest.approx(0.5 if name == "learnt" else 0.25, abs=0.01) for site in sites)
    assert {site.format for site in sites} <= {*packed, "dense"}, "a format of what was trained, or dense where that was faster"
    assert all(site.reason for site in sites if site.format == "dense")
    if name == "packed":
        assert [site.site for site in sites] == ["0", "2"]


def test_the_report_has_the_recovery() -> None:
    net = nn.Sequential(nn.Linear(64, 64)).eval()
    module, hook = sc.attach(net, (X,), "mask_weights(structure='16x1', density=0.25)")
    module, recovery = sc.recover(module, net, [(X,)], hook=hook, steps=3, minutes=1)
    compiled = sc.finalize(module, (X,), recovery=recovery)
    assert compiled.report().recovery is recovery
    assert sc.finalize(module, (X,)).report().recovery is None


def test_what_it_does_not_take() -> None:
    module = trained("mask_weights(structure='16x1', density=0.25)")
    with pytest.raises(InputError, match=r"takes no recipe(.|\n)*sc.compile"):
        sc.finalize(module, (X,), recipe="exact_zeros")
    with pytest.raises(ModelError, match="training mode"):
        sc.finalize(module.train(), (X,))
