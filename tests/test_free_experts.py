"""Experts that cost nothing (MoE++): with zero ones everything on is the dense FFN, kernels see FFNs alone, and a mixture is its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import silu, softmax

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError, UnknownNameError
from sparsify_compiler.named import Named
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline


class Two(nn.Module):
    """Two FFNs in a residual stream."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = GatedFfn(width, hidden), GatedFfn(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        y: Tensor = x + self.second(x)
        return y


@settings(max_examples=20, derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.sampled_from(["top_k", "top_p", "threshold", "growing_k"]), st.sampled_from([0.0, 0.25]),
       st.sampled_from(["ridge", "random", "hashed"]), st.booleans(), st.integers(0, 99))
def test_with_everything_on_zero_experts_change_nothing(experts: int, zeros: int, selector: str, shared: float, router: str, residual: bool,
                                                        seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Two(5, 21).eval(), torch.randn(2, 7, 5)
    split = SplitExperts(experts, router=router, selector=selector, shared=shared, free=("zero",) * zeros, residual=residual, density=1.0)
    program = Pipeline((split,)).run(capture(model, (x,)), Context(batches=[(x,)]))
    torch.testing.assert_close(instantiate(program)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selector", ["top_k", "top_p", "threshold"])
def test_rows_that_need_fewer_take_the_zero_expert(selector: str) -> None:
    """A budget is an upper bound, and the kernel never sees a free expert."""
    torch.manual_seed(0)
    model, x = GatedFfn(16, 64).eval(), torch.randn(200, 16)
    split = SplitExperts(8, selector=selector, shared=0.0, free=("zero",), density=0.5)
    program = Pipeline((split,)).run(capture(model, (x,)), Context(batches=[(x,)]))
    (op,) = (node for _, node in program.nodes() if node.target is experts_ffn.op)
    seen: list[Tensor] = []

    class Watching(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found = super().run_node(n)
            if n is op.kwargs["chosen"]:
                seen.append(found)
            return found

    Watching(program.regions[""].module).run(x)
    density = next(iter(program.decisions.values())).density
    assert int(seen[0].max()) < 8
    counts = (seen[0] >= 0).sum(-1)
    assert int(counts.max()) > int(counts.min())
    assert density is not None
    assert 0.25 < density < 0.51
    assert density == pytest.approx(float(counts.float().mean()) / 8)


def expected(x: Tensor, own: dict[str, Tensor], before: Tensor | None) -> tuple[Tensor, Tensor]:
    """MoE++, section 3, of two FFN experts, a constant, a copy and a zero one, top 2; for each row alone. Also its scores."""
    scores = torch.cat([x @ own["router.weight"].T, x @ own["router.free_weight"].T + own["router.free_offset"]], -1)
    if before is not None:
        scores = scores + before @ own["router.residual"].T
    y = torch.zeros_like(x)
    for row in range(x.shape[0]):
        odds, chosen = softmax(scores[row], -1), scores[row].topk(2).indices.tolist()
        whole = sum(float(odds[expert]) for expert in chosen if expert != 4)
        for expert in chosen:
            if expert < 2:
                gate, up = own["experts.gate"][expert] @ x[row], own["experts.up"][expert] @ x[row]
                given_ = own["experts.down"][expert] @ (silu(gate) * up)
            elif expert == 2:
                shares = softmax(own["free.0.shares"] @ x[row], -1)
                given_ = shares[0] * x[row] + shares[1] * own["free.0.vector"]
            else:
                given_ = x[row] if expert == 3 else torch.zeros_like(x[row])
            y[row] += float(odds[expert]) / whole * given_
    return y, scores


def test_the_recipe_is_the_paper_s_layer_and_trains() -> None:
    torch.manual_seed(0)
    model, x = Two(6, 10).eval(), torch.randn(60, 6)
    module, hook = sc.attach(model, (x,), sc.recipes.moe_plus_plus(experts=2, top_k=2, constants=1))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.7)
    own = {name.removesuffix("_folded"): tensor for name, tensor in module.named_parameters()}
    first, second = ({name.removeprefix(f"{side}."): tensor for name, tensor in own.items() if name.startswith(side)} for side in ("first", "second"))
    assert "router.residual" in second
    assert "router.residual" not in first
    with torch.no_grad():
        given_, scores = expected(x, first, None)
        added, after = expected(x + given_, second, scores)
        torch.testing.assert_close(module(x), x + given_ + added, rtol=1e-4, atol=1e-4)
        balance = Named.parse("router loss", "load_balance(free=3, tau=0.75)")  # of the choice that no kernel sees whole
        terms = [balance(each, each.topk(2, -1).indices) for each in (scores, after)]
        torch.testing.assert_close(hook.loss(), 0.01 * torch.stack(terms).mean(), rtol=1e-4, atol=1e-6)
    (module(x).square().mean() + hook.loss()).backward()
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in module.parameters())
    compiled = sc.compile(module, (x,), recipe="lower()")
    torch.testing.assert_close(compiled(x), module(x).detach(), rtol=1e-4, atol=1e-4)


def test_scores_of_other_rows_are_not_those_of_the_mixture_before() -> None:
    """Two dynamic sizes that the example has alike."""
    torch.manual_seed(0)

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = GatedFfn(6, 8), GatedFfn(6, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.second(y) + self.first(x).mean(0)
            return z

    x = torch.randn(9, 6)
    module, _ = sc.attach(Apart().eval(), (x, x.clone()), sc.recipes.moe_plus_plus(experts=2), dynamic={"x": {0: "rows"}, "y": {0: "others"}})
    assert module(x, x[:5]).shape == (5, 6)
    assert not any("residual" in name for name, _ in module.named_parameters())


def test_all_rows_may_take_a_free_expert() -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(6, 8).eval(), torch.randn(9, 6)
    split = SplitExperts(2, "contiguous", "random", "top_k(k=1)", 0.0, "weight_norm", repair="none", free=("zero", "copy"))
    module, _ = sc.attach(model, (x,), split)
    for place, wanted in ((0, torch.zeros_like(x)), (1, x)):
        with torch.no_grad():
            offset = next(tensor for name, tensor in module.named_parameters() if "free_offset" in name)
            offset.copy_(torch.full((2,), -1e4)), offset[place].fill_(1e4)
            torch.testing.assert_close(module(x), wanted)


def test_balance_counts_free_experts_by_tau() -> None:
    scores, chosen = torch.randn(30, 5), torch.randint(0, 5, (30, 2))
    loss = {tau: float(Named.parse("router loss", f"load_balance(free=2, tau={tau!r})")(scores, chosen)) for tau in (0.0, 0.5, 1.0)}
    assert loss[1.0] == pytest.approx(float(Named.parse("router loss", "load_balance")(scores, chosen)))
    shares = torch.bincount(chosen.flatten(), minlength=5) / 60
    assert loss[0.5] == pytest.approx(float(5 * (shares * scores.softmax(-1).mean(0) * torch.tensor([1, 1, 1, 0.5, 0.5])).sum()), rel=1e-5)


def test_what_does_not_fit_is_told() -> None:
    with pytest.raises(UnknownNameError):
        SplitExperts(free=("nil",))
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(9, 4)
    for name in ("copy", "constant"):
        with pytest.raises(ParseError, match="no output of 3"):
            sc.attach(model, (x,), SplitExperts(2, shared=0.0, free=(name,), density=0.5), calibration=[(x,)])
    assert set(catalog.names("free expert")) == {"zero", "copy", "constant"}


def test_dropping_experts_leaves_such_mixtures_alone() -> None:
    model, x = GatedFfn(6, 8).eval(), torch.randn(9, 6)
    ctx = Context(batches=[(x,)])
    Pipeline.parse("split_experts(experts=4, shared=0.0, free=('zero',), density=0.5) | drop_experts(density=0.5)").run(capture(model, (x,)), ctx)
    assert [miss.why for miss in ctx.misses] == ["its router knows experts that no kernel sees"]
