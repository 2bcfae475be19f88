"""Routers that read what another module gives for a whole text: the time of a diffusion model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline


class Diffusion(nn.Module):
    """Two FFNs on a stream [images, patches, 8] that a time shifts."""

    def __init__(self) -> None:
        super().__init__()
        self.t_embedder = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 5))
        self.rates, self.shift = nn.Buffer(torch.tensor([1.0, 0.1, 0.01, 0.001])), nn.Linear(5, 8)
        self.ffns = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)) for _ in range(2))

    def time(self, t: Tensor) -> Tensor:
        found: Tensor = self.t_embedder((t[:, None] * self.rates).cos())
        return found

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + self.shift(self.time(t))[:, None]
        for ffn in self.ffns:
            x = x + ffn(x)
        return x


DYNAMIC = {"x": {0: "images", 1: "patches"}, "t": {0: "images"}}


def model() -> tuple[Diffusion, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return Diffusion().eval(), (torch.randn(3, 5, 8), torch.tensor([10.0, 400.0, 900.0]))


def test_all_patches_of_an_image_have_the_experts_of_its_time() -> None:
    net, inputs = model()
    module, hook = sc.attach(net, inputs, sc.recipes.switch_dit(experts=4, top_k=1, shared=0.0), dynamic=DYNAMIC)
    torch.testing.assert_close(module(*inputs), net(*inputs), rtol=1e-4, atol=1e-5)  # copies, of weights that add up to 1
    down = next(one for name, one in module.named_parameters() if "ffns.1" in name and "experts.down" in name)
    router = next(one for name, one in module.named_parameters() if "ffns.1" in name and "router.weight" in name)
    assert router.shape == (4, 5)
    with torch.no_grad():
        down[2] = 0  # one expert of the second FFN gives nothing
        x, t = torch.randn(64, 2, 8), 999 * torch.rand(64)
        last = net.ffns[1]
        stream = x + net.shift(net.time(t))[:, None]
        stream = stream + net.ffns[0](stream)
        out = (net.time(t) @ router.T).argmax(-1) == 2
        bias = last[3].bias  # type: ignore[index]
        wanted = stream + torch.where(out[:, None, None], bias, last(stream))
        assert 0 < int(out.sum()) < 64
        torch.testing.assert_close(module(x, t), wanted, rtol=1e-4, atol=1e-5)
    (module(*inputs).square().mean() + hook.loss()).backward()
    assert router.grad is not None


def test_such_routers_learn_and_are_compiled() -> None:
    net, inputs = model()
    module, hook = sc.attach(net, inputs, sc.recipes.switch_dit(), dynamic=DYNAMIC)
    optimizer, losses = torch.optim.Adam(module.parameters(), 1e-2), []
    for _ in range(40):
        loss = (module(*inputs) - 1).square().mean()
        optimizer.zero_grad(), (loss + 0.1 * hook.loss()).backward(), optimizer.step(), hook.step(optimizer)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    compiled = sc.compile(module.eval(), inputs, recipe="lower()", dynamic=DYNAMIC)
    other = torch.randn(2, 9, 8), 999 * torch.rand(2)
    torch.testing.assert_close(compiled(*other), module(*other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("more", [{"given": "t_embedder"}, {"residual": True}])
def test_routers_that_read_more_than_the_row_are_compiled_at_once(more: dict[str, Any]) -> None:
    """Such a mixture is not timed beside the FFN that it was made of: its router cannot be run on rows alone."""
    net, inputs = model()
    recipe = Pipeline((SplitExperts(4, "contiguous", "random", "top_k(k=2)", 0.0, "weight_norm", repair="none", **more),))
    compiled = sc.compile(net, inputs, recipe=recipe, dynamic=DYNAMIC)
    other = torch.randn(2, 9, 8), 999 * torch.rand(2)
    assert bool(compiled(*other).isfinite().all())
    if "given" in more:  # else the first mixture reads rows alone, and stays dense where that is faster
        plain = sc.attach(net, inputs, recipe, dynamic=DYNAMIC)[0].eval()
        torch.testing.assert_close(compiled(*other), plain(*other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("path", "why"), [("nowhere", "no module nowhere before it"), ("ffns.1", "no module ffns.1 before it"),
                                           ("ffns.0.0", "no row for each of its texts")])
def test_what_is_no_condition_says_so(path: str, why: str) -> None:
    net, inputs = model()
    ctx, split = Context(), SplitExperts(4, "copies", "random", "top_k(k=2)", 0.0, "weight_norm", "normalised", "none", given=path)
    Pipeline((split,)).run(capture(net, inputs, DYNAMIC), ctx)
    assert any(why in str(miss) for miss in ctx.misses)


def test_other_routers_are_refused() -> None:
    with pytest.raises(ParseError, match="is random"):
        SplitExperts(given="t_embedder")
