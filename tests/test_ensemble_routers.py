"""Routers that look at a row several times through dropout, in training alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.train.ensemble_routers import EnsembleRouters, Mean

SPLIT = "split_experts(experts=4, router='{}', shared=0.0, weight='softmax', repair='none', selector='top_k(k=2)')"


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 4), st.integers(0, 99))
def test_the_mean_is_that_of_the_probabilities(samples: int, experts: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    mean, scores = Mean(samples, 0.5), torch.randn(samples, rows, experts)
    mean.looks.many = True
    torch.testing.assert_close(mean(scores.flatten(0, 1)).softmax(-1), scores.softmax(-1).mean(0))
    torch.testing.assert_close(mean(scores[0].repeat(samples, 1)), scores[0])
    mean.looks.many = False
    assert mean(scores) is scores


@pytest.mark.parametrize("router", ["ridge", "mlp", "tree", "hashed", "representative"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_in_training_alone_rows_are_seen_through_dropout(router: str, rate: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), torch.randn(64, 8)
    module, _ = sc.attach(model, (x,), f"{SPLIT.format(router)} | ensemble_routers(samples=3, rate={rate})", calibration=[(x,)])
    plain, _ = sc.attach(model, (x,), SPLIT.format(router), calibration=[(x,)])
    with torch.no_grad():
        assert torch.equal(module(x), plain(x))
    if rate:
        assert not torch.equal(module(x), module(x))
    else:
        torch.testing.assert_close(module(x), plain(x))
    assert torch.equal(module.eval()(x), plain(x))
    torch.testing.assert_close(sc.finalize(module, (x,))(x), plain(x), rtol=1e-4, atol=1e-5)


def test_routers_of_experts_that_share_an_ffn_learn_by_every_look() -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(8, 32).eval(), torch.randn(2, 9, 8)
    module, hook = sc.attach(model, (x,), sc.recipes.mofme(experts=4, top_k=2))
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)  # weights add up to 1, and experts are alike
    optimizer, wanted = torch.optim.Adam(module.parameters(), 1e-2), torch.randn(2, 9, 8)
    losses = []
    for _ in range(40):
        loss = (module(x) - wanted).square().mean() + hook.loss()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), hook.step(optimizer)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    gradients = [one.grad for name, one in module.named_parameters() if "router" in name]
    assert gradients
    assert all(one is not None and bool(one.ne(0).any()) for one in gradients)


def test_routers_that_hand_scores_on_do_so_look_by_look() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(GatedFfn(8, 32), GatedFfn(8, 32)).eval(), torch.randn(64, 8)
    module, _ = sc.attach(model, (x,), sc.Pipeline((*sc.recipes.moe_plus_plus(experts=3).passes, EnsembleRouters(3, 0.4))))
    module(x).sum().backward()
    assert all(bool(one.grad.isfinite().all()) for one in module.parameters() if one.grad is not None)
    assert not torch.equal(module(x), module(x))


@pytest.mark.parametrize("passes", ["ensemble_routers(samples=3, rate=0.0) | penalise_routing(loss='agreement') | route_gradients()",
                                    "route_gradients() | penalise_routing(loss='agreement') | ensemble_routers(samples=3, rate=0.0)"])
def test_what_else_acts_on_the_scores_gets_their_mean(passes: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), torch.randn(64, 8)
    split = "split_experts(experts=4, shared=0.0, selector='top_k(k=2)', repair='none')"
    module, hook = sc.attach(model, (x,), f"{split} | {passes}", calibration=[(x,)])
    plain, other = sc.attach(model, (x,), f"{split} | penalise_routing(loss='agreement') | route_gradients()", calibration=[(x,)])
    for one, loss in ((module, hook), (plain, other)):
        (one(x).square().mean() + loss.loss()).backward()
    assert float(hook.loss().detach()) == pytest.approx(float(other.loss().detach()), rel=1e-4)
    for (name, mine), theirs in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("options", [{"samples": 0}, {"rate": 1.0}, {"rate": -0.1}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ParseError):
        EnsembleRouters(**options)
