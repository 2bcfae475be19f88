"""Routers learn from choices: values stay, gradients come, and nothing of it is left in what is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import UnknownNameError
from sparsify_compiler.named import Named
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.moe._routing import example
from sparsify_compiler.passes.moe.routers.oracle import measured
from sparsify_compiler.passes.train.penalise_disagreement import disagreement
from sparsify_compiler.passes.train.route_gradients import RouteGradients
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline

SPLIT = "split_experts(experts=4, router='ridge', shared=0.0, density=0.5, repair='none')"


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.booleans(), st.floats(0.1, 4.0), st.integers(0, 99))
def test_straight_through_keeps_values_and_opens_what_is_chosen(experts: int, k: int, rows: int, weighted: bool, temperature: float,
                                                                seed: int) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(rows, experts, requires_grad=True)
    chosen = scores.detach().topk(min(k, experts), -1).indices
    chosen = torch.where(torch.rand(chosen.shape) < 0.2, -1, chosen)
    weights = torch.rand(chosen.shape) if weighted else None
    same, found = Named.parse("router gradient", f"straight_through(temperature={temperature!r})")(scores, chosen, weights)
    assert torch.equal(same, chosen)
    assert torch.equal(found, torch.ones_like(found) if weights is None else weights)
    narrow, alike = Named.parse("router gradient", f"straight_through(temperature={temperature!r})")(scores, chosen.int(), weights)
    assert narrow.dtype is torch.int32
    assert torch.equal(alike, found)
    found.sum().backward()
    assert scores.grad is not None
    named = torch.zeros(rows, experts + 1).scatter_(-1, chosen + 1, 1.0)[:, 1:]
    assert bool((scores.grad[named == 0] == 0).all())
    if experts > 1:  # one score alone has no deviation
        assert bool((scores.grad[named == 1] >= 0).all())
        assert bool((scores.grad[named == 1] > 0).any()) == bool((named == 1).any())
    assert bool(scores.grad.isfinite().all())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_straight_through_is_the_slope_of_its_gate(temperature: float) -> None:
    """By hand: s (1 - s) / width, s = sigmoid((score - limit) / width), limit between 2 and 1; where all or none are chosen it is the last one's."""
    scores = torch.tensor([[3.0, 2.0, 1.0, -2.0]] * 3, requires_grad=True)
    chosen = torch.tensor([[0, 1, -1, -1], [3, 2, 1, 0], [-1, -1, -1, -1]])
    _, found = Named.parse("router gradient", f"straight_through(temperature={temperature!r})")(scores, chosen, None)
    (found * torch.tensor([5.0, 7.0, 11.0, 13.0])).sum().backward()
    width = temperature * 3.5**0.5  # deviations of 2, 1, 0 and -3 from the mean
    gates = [torch.sigmoid((scores.detach()[0] - limit) / width) for limit in (1.5, -2.0)]
    slopes = [gate * (1 - gate) / width for gate in gates]
    wanted = [slopes[0] * torch.tensor([5.0, 7.0, 0, 0]), slopes[1] * torch.tensor([13.0, 11.0, 7.0, 5.0]), torch.zeros(4)]
    torch.testing.assert_close(scores.grad, torch.stack(wanted))


@pytest.mark.parametrize("estimator", catalog.names("router gradient"))
def test_routers_get_a_gradient_that_leaves_no_trace(estimator: str) -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    module, hook = sc.attach(model, (x,), f"{SPLIT} | route_gradients(estimator={estimator!r})", calibration=[(x,)])
    with torch.no_grad():
        plain = module(x)
    assert not hook.acts
    module(x).square().sum().backward()
    routers = [parameter.grad for name, parameter in module.named_parameters() if "router" in name]
    assert len(routers) == 2
    assert all((grad is not None and bool(grad.abs().sum() > 0)) == (estimator != "dice") for grad in routers)  # with dice no router learns
    compiled = sc.compile(module, (x,), recipe="lower()")
    torch.testing.assert_close(compiled(x), plain, rtol=1e-5, atol=1e-6)
    again = capture(module, (x,))
    assert [node.kwargs["weights"] for _, node in again.nodes() if node.target is experts_ffn.op] == [None]


def test_without_it_routers_of_weights_of_one_get_none() -> None:
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    module, _ = sc.attach(model, (x,), SPLIT, calibration=[(x,)])
    module(x).square().sum().backward()
    assert all(parameter.grad is None for name, parameter in module.named_parameters() if "router" in name)


def test_straight_through_finds_the_expert_that_helps() -> None:
    """Two experts, of which one gives what is wanted; the router begins with the other one."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(3, 2)
            self.router.weight.data.zero_()
            self.router.bias.data.copy_(torch.tensor([0.5, 0.0]))
            self.gate, self.down = nn.Buffer(torch.ones(2, 1, 3)), nn.Buffer(torch.tensor([-1.0, 1.0]).view(2, 1, 1).expand(2, 3, 1).contiguous())

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = experts_ffn.op(x, self.router(x).topk(1, -1).indices, None, self.gate, None, self.down, activation="relu")
            return y

    model, x = Two().eval(), torch.rand(20, 3)
    module, _ = sc.attach(model, (x,), RouteGradients())
    wanted = x.sum(1, keepdim=True).expand(20, 3)
    optimizer = torch.optim.SGD([parameter for name, parameter in module.named_parameters() if "router" in name], 0.1)
    for _ in range(20):
        loss = (module(x) - wanted).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(), optimizer.zero_grad()
    assert float((module(x) - wanted).detach().square().mean()) == 0


def test_agreement_is_one_for_a_router_that_knows_no_row_and_none_for_the_oracle() -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    pipeline = f"{SPLIT} | penalise_routing(loss='agreement', weight=1.0)"
    module, hook = sc.attach(model, (x,), pipeline, calibration=[(x,)])
    router, offset = (tensor for name, tensor in module.named_parameters() if "router" in name)
    own = {name.rpartition(".")[2].removesuffix("_folded"): tensor for name, tensor in module.named_parameters() if "experts" in name}
    importance = measured(x, own["gate"], own["down"], own["up"], activation="silu", criterion="output").detach()
    module(x)
    fitted = float(hook.loss().detach())
    assert 0 < fitted < 1
    with torch.no_grad():
        router.zero_(), offset.copy_(importance.mean(0))
    module(x)
    torch.testing.assert_close(hook.loss(), torch.tensor(1.0))
    optimizer = torch.optim.Adam([router, offset], 0.05)
    for _ in range(300):
        module(x)
        hook.loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step(), optimizer.zero_grad()
    assert float(hook.loss().detach()) < 1.2 * fitted
    assert all(tensor.grad is None for tensor in own.values())


def test_one_row_alone_says_nothing_about_agreement() -> None:
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    module, hook = sc.attach(model, (x,), f"{SPLIT} | penalise_routing(loss='agreement')", calibration=[(x,)], dynamic={"x": {0: "rows"}})
    module(x[:1])
    hook.loss().backward()  # type: ignore[no-untyped-call]
    assert float(hook.loss().detach()) == 0


def test_frozen_routers_still_have_their_experts_drawn() -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(16, 32).eval(), torch.randn(40, 16)
    module, _ = sc.attach(model, (x,), sc.recipes.thor())
    for name, parameter in module.named_parameters():
        if "router" in name:
            parameter.requires_grad_(False)
        elif "experts" in name:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    assert not torch.equal(module(x), module(x))


def test_routers_that_know_free_experts_are_left_alone() -> None:
    """An estimator would draw an expert that no kernel has."""
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    pipeline = Pipeline.parse("split_experts(experts=2, shared=0.0, free=('zero', 'copy'), density=0.5) | route_gradients(estimator='dice')")
    ctx = Context(batches=[(x,)])
    pipeline.run(capture(model, (x,)), ctx)
    assert [miss.why for miss in ctx.misses] == ["its router knows experts that no kernel sees"]


def test_both_act_on_one_mixture() -> None:
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    both = f"{SPLIT} | penalise_routing(loss='agreement') | route_gradients() | penalise_routing(loss='load_balance')"
    module, hook = sc.attach(model, (x,), both, calibration=[(x,)])
    module(x)
    first: Any = hook.loss()
    assert bool(first > 0)
    assert hook.acts


def test_what_is_wrong_is_told() -> None:
    with pytest.raises(UnknownNameError):
        RouteGradients("straight")
    model, (x,) = example()
    program, ctx = capture(model, (x,)), Context()
    Pipeline.parse("route_gradients() | route_gradients(estimator='straight_through(temperature=2.0)')").run(program, ctx)
    assert [miss.why for miss in ctx.misses] == ["its router has an estimator already"]
    ctx = Context()
    Pipeline((RouteGradients(),)).run(capture(nn.Linear(2, 2).eval(), (torch.zeros(1, 2),)), ctx)
    assert [miss.why for miss in ctx.misses] == ["the model has no experts"]


def test_the_load_is_that_of_the_experts_that_were_drawn() -> None:
    """Scores that always name expert 0 first, an estimator that draws: the loss is of the draw, whichever pass stands first."""
    torch.manual_seed(0)
    model, x = GatedFfn(8, 32).eval(), torch.randn(4000, 8)
    split = "split_experts(experts=4, partition='copies', router='random', selector='top_k(k=1)', shared=0.0, "\
            "importance='weight_norm', weight='softmax', repair='none')"
    for text in ("penalise_routing(loss='load_balance', weight=1.0) | route_gradients(estimator='dice')",
                 "route_gradients(estimator='dice') | penalise_routing(loss='load_balance', weight=1.0)"):
        module, hook = sc.attach(model, (x,), f"{split} | {text}")
        with torch.no_grad():
            next(one for name, one in module.named_parameters() if "router" in name).zero_()
        module(x)
        assert float(hook.loss().detach()) == pytest.approx(1.0, abs=0.02)
        assert float(module.eval()(x).sum()) == pytest.approx(float(module(x).sum()))


def test_an_estimator_rests_after_eval_and_acts_again_after_train() -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(8, 32).eval(), torch.randn(64, 8)
    split = "split_experts(experts=4, router='random', selector='top_k(k=1)', shared=0.0, repair='none')"
    module, _ = sc.attach(model, (x,), f"{split} | route_gradients(estimator='dice')", calibration=[(x,)])
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    with torch.no_grad():
        drawn_by_none = module.train()(x)
    assert torch.equal(module.eval()(x), drawn_by_none)
    assert not torch.equal(module.train()(x), module(x))


def test_two_passes_are_to_agree() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), torch.randn(64, 8)
    module, hook = sc.attach(model, (x,), "thor", calibration=[(x,)])
    with torch.no_grad():
        for name, one in module.named_parameters():
            if "experts" in name:
                one.add_(torch.randn_like(one) * 0.2)  # copies that came apart
    first = module(x)
    assert hook.loss() == 0
    second = module(x)
    p, q = first.softmax(-1), second.softmax(-1)
    wanted = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    assert float(hook.loss().detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert hook.loss() > 0
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    hook.loss().backward()
    assert all(one.grad is not None and bool(one.grad.ne(0).any()) for name, one in module.named_parameters() if "experts" in name)
    optimizer.step(), hook.step(optimizer)
    module(x)
    assert hook.loss() == 0, "a pass of the step before is none of this one"
    module(x[:7])
    assert hook.loss() == 0


def test_a_pass_whose_gradient_was_taken_is_compared_with_none() -> None:
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), [(torch.randn(64, 8),) for _ in range(4)]
    module, hook = sc.attach(model, batches[0], "thor", calibration=batches)
    for (x,) in batches[:2]:  # two batches of one step, each by itself
        (module(x).square().mean() + hook.loss()).backward()
        assert hook.loss() == 0
    both = module(batches[2][0]).square().mean() + module(batches[2][0]).square().mean()
    assert float((both + hook.loss()).detach()) >= float(both.detach())
    (both + hook.loss()).backward()
    _, record = sc.recover(module, model, batches, hook=hook, steps=2, accumulate=2, minutes=1.0)
    assert record.stopped == "all steps are done"


def test_recovery_runs_a_batch_twice_where_passes_are_to_agree() -> None:
    """Under the same dice the loss of a step is a line in the weight, and the copies come to agree."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), [(torch.randn(64, 8),)]

    def recovered(consistency: float, steps: int) -> tuple[nn.Module, list[float]]:
        torch.manual_seed(1)
        module, hook = sc.attach(model, batches[0], sc.recipes.thor(consistency=consistency), calibration=batches)
        assert hook.passes == 2
        with torch.no_grad():
            for name, one in module.named_parameters():
                if "experts" in name:
                    one.add_(torch.randn_like(one) * 0.2)
        module, record = sc.recover(module, model, batches, hook=hook, steps=steps, minutes=1.0, rate=1e-2)
        return module, [point.loss for point in record.points]

    losses = [recovered(weight, 1)[1][0] for weight in (0.0, 100.0, 300.0)]
    assert losses[1] > losses[0] * 1.01
    assert losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)

    def apart(module: nn.Module) -> float:
        module.train()
        with torch.enable_grad():
            return sum(float(disagreement(module(*batches[0]), module(*batches[0]), "probabilities")) for _ in range(20))

    assert apart(recovered(3000.0, 30)[0]) < 0.5 * apart(recovered(0.0, 30)[0])


def test_without_such_a_loss_one_pass_is_enough() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), GatedFfn(8, 32)).eval(), torch.randn(64, 8)
    assert sc.attach(model, (x,), SPLIT, calibration=[(x,)])[1].passes == 1
