"""Experts that share an FFN: the beginning is the dense model, and what they learn is their formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError, UnknownNameError
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.moe.share_experts import ShareExperts
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline


class Plain(nn.Module):
    def __init__(self, width: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x))) * 2
        return y


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """By the last two parts of their names: routers and experts stand beside the first linear of the FFN."""
    return {".".join(name.removesuffix("_folded").split(".")[-2:]): tensor for name, tensor in module.named_parameters()}


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.sampled_from(["film", "adapter", "adapter(rank=1)", "adapter(scale=0.5, rank=3)"]), st.integers(1, 6), st.integers(1, 7),
       st.sampled_from(["normalised", "softmax", "one"]), st.integers(1, 5), st.integers(0, 99))
def test_it_begins_as_the_ffn_times_the_weights_of_a_row(kind: str, experts: int, k: int, weight: str, outputs: int, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Plain(4, 6, outputs).eval(), torch.randn(2, 7, 4)
    module, _ = sc.attach(model, (x,), ShareExperts(experts, kind, selector=f"top_k(k={k})", weight=weight), seed=seed)
    odds = linear(x, tensors(module)["router.weight"]).softmax(-1).topk(min(k, experts), -1).values
    total = {"normalised": torch.ones(2, 7, 1), "softmax": odds.sum(-1, keepdim=True), "one": torch.full((2, 7, 1), float(odds.shape[-1]))}[weight]
    torch.testing.assert_close(module(x), model(x) * total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adapter(rank=3, scale=0.5)", "film"])
def test_rows_are_changed_by_the_experts_that_they_chose(kind: str) -> None:
    """Row by row, as PESC's and MoFME's formulas say."""
    torch.manual_seed(0)
    model, x = GatedFfn(6, 10).eval(), torch.randn(30, 6)
    module, _ = sc.attach(model, (x,), ShareExperts(4, kind))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "experts" in name:
                parameter.normal_(0, 0.7)
    own, y = tensors(module), model(x)
    scores = linear(x, own["router.weight"])
    for row in range(30):
        found = scores[row].topk(2)
        wanted = torch.zeros(6)
        for weight, expert in zip(found.values.softmax(-1), found.indices, strict=True):
            if kind == "film":
                wanted += weight * (own["experts.scale"][expert] * y[row] + own["experts.shift"][expert])
            else:
                wanted += weight * (y[row] + 0.5 * own["experts.wide"][expert] @ gelu(own["experts.narrow"][expert] @ y[row]))
        torch.testing.assert_close(module(x)[row], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", ["pesc", "mofme"])
def test_recipes_train_and_compile(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    module, hook = sc.attach(model, (x,), sc.catalog.get("recipe", recipe)())
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    wanted = torch.randn(40, 16)
    losses = []
    for _ in range(30):
        loss = (module(x) - wanted).square().mean()
        (loss + hook.loss()).backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    compiled = sc.compile(module, (x,), recipe="lower()")
    torch.testing.assert_close(compiled(x), module.eval()(x).detach(), rtol=1e-4, atol=1e-4)


def test_once_is_enough_and_the_ffn_stays_what_it_is() -> None:
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    program, ctx = capture(model, (x,)), Context()
    program = Pipeline((ShareExperts(), ShareExperts())).run(program, ctx)
    assert [miss.why for miss in ctx.misses] == ["experts share it already"]
    assert [node.target for _, node in program.nodes()].count(experts_ffn.op) == 1
    module, hook = sc.attach(model, (x,), "share_experts(kind='film') | mask_weights(score='magnitude', structure='2:4', ignore=['*.router'])")
    assert set(hook.masks) == {"gate", "up", "down"}  # a router is a linear like others, and would be masked, too
    assert set(catalog.names("shared expert")) == {"adapter", "film"}
    assert module(x).shape == x.shape


@pytest.mark.parametrize(("options", "error"), [
    ({"experts": 0}, ParseError), ({"kind": "lora"}, UnknownNameError), ({"router": "ridge"}, ParseError), ({"router": "oracle"}, ParseError),
    ({"selector": "top_k"}, ParseError), ({"selector": "top_p"}, ParseError)])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ShareExperts(**options)


def test_a_rank_of_nothing_is_refused() -> None:
    with pytest.raises(ParseError, match="rank is 1 or more"):
        sc.attach(GatedFfn(4, 8).eval(), (torch.randn(3, 4),), ShareExperts(kind="adapter(rank=0)"))


@pytest.mark.parametrize("recipe", ["pesc", "mofme"])
def test_recipes_train_under_autocast(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(8, 32).eval(), torch.randn(20, 8)
    module, hook = sc.attach(model, (x,), getattr(sc.recipes, recipe)())
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    torch.testing.assert_close(y.float(), model(x), rtol=5e-2, atol=5e-2)
    (y.float().square().mean() + hook.loss()).backward()
    assert all(bool(one.grad.isfinite().all()) for one in module.parameters() if one.grad is not None)
