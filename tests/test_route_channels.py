"""Rows keep the channels that a router chooses, beside those that all of them share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.calibrate_rows import collect_rows
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.passes.activation import _units
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.moe import route_channels
from sparsify_compiler.passes.moe.route_channels import RouteChannels
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline


@settings(max_examples=6, derandomize=True, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.floats(0.0, 0.9), st.floats(0.05, 1.0), st.sampled_from(["random", "ridge"]), st.booleans(),
       st.sampled_from([(7,), (2, 3), (1,)]), st.integers(0, 99))
def test_a_row_keeps_the_shared_channels_and_its_best_groups(width: int, groups: int, shared: float, density: float, router: str, scale: bool,
                                                             lead: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    model, x = nn.Linear(width, 4).eval(), torch.randn(*lead, width)
    seen = torch.randn(*lead[:-1], 9, width)
    ctx, one = Context(batches=[(seen,)], seed=seed), RouteChannels(density, shared, groups, router, scale=scale)
    program = Pipeline((one,)).run(capture(model, (seen,), {"input": {len(lead) - 1: "rows"}}), ctx)
    common = round(shared * width)
    if width - common < groups:
        assert "make no" in str(ctx.misses[0])
        return
    state = instantiate(program).state_dict()
    weight = next(value for key, value in state.items() if "router.weight" in key)
    offset = next((value for key, value in state.items() if "router.offset" in key), torch.zeros(groups))
    table = next(value for key, value in state.items() if "table" in key)
    k = min(max(round((density * width - common) / (width - common) * groups), 1), groups)
    assert int((table < 0).sum()) == common
    gives = (model.weight.detach().square().sum(0) * seen.flatten(0, -2).square()).mean(0)
    assert not common or float(gives[table < 0].min()) >= float(gives[table >= 0].max())
    best = (x @ weight.T + offset).topk(k, -1).indices
    part = x * ((table < 0) | (table == best[..., None]).any(-2))
    if scale:
        part = part * (x.norm(dim=-1, keepdim=True) / part.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(instantiate(program)(x), model(part), rtol=1e-4, atol=1e-5)
    if k == groups:
        torch.testing.assert_close(instantiate(program)(x), model(x), rtol=1e-4, atol=1e-5)


def test_linears_that_read_the_same_have_one_router_and_a_second_time_is_none() -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    ctx = Context(batches=[(x,)])
    program = Pipeline((RouteChannels(0.5, groups=4), RouteChannels(0.5, groups=4))).run(capture(model, (x,)), ctx)
    state = instantiate(program).state_dict()
    assert len([key for key in state if "router.weight" in key]) == 2  # of gate and up together, and of down
    assert [miss.why for miss in ctx.misses] == ["its channels are routed already"] * 3


def test_routers_learn_by_their_weights_and_what_is_left_out_is_not_read() -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(16, 64).eval(), torch.randn(64, 16)
    module, _ = sc.attach(model, (x,), sc.recipes.mohd(density=0.5, groups=6), calibration=[(x,)])
    optimizer, losses = torch.optim.Adam(module.parameters(), 3e-3), []
    for _ in range(60):
        loss = (module(x) - model(x).detach()).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    routers = [one.grad for name, one in module.named_parameters() if "router" in name]
    assert len(routers) == 2
    assert all(one is not None and bool(one.ne(0).any()) for one in routers)
    trained = module.eval()
    ctx = Context(batches=[(x,)])
    ctx.calibrate = lambda program, needs: calibrate(program, [(x,)], needs)
    program = Pipeline.parse("select_inputs(selector='nonzero')").run(capture(trained, (x,)), ctx)
    torch.testing.assert_close(instantiate(program)(x), trained(x), rtol=1e-4, atol=1e-5)
    found = {path: row.density for path, row in program.decisions.items()}
    assert all(abs(found[name] - 0.5) < 0.1 for name in ("gate", "up", "down")), found


def test_a_row_of_zeros_in_float16_has_a_gradient() -> None:
    torch.manual_seed(0)
    model, x = GatedFfn(16, 64).half().eval(), torch.randn(20, 16).half()
    x[3] = 0
    module, _ = sc.attach(model, (x,), sc.recipes.mohd(density=0.5, groups=4), calibration=[(x,)])
    y = module(x)
    y.float().square().sum().backward()
    assert bool(y.isfinite().all())
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in module.parameters())


def test_layers_whose_rows_do_not_fit_together_are_seen_one_after_the_other_in_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(GatedFfn(16, 64), GatedFfn(16, 64)).eval(), torch.randn(40, 16)
    seen: list[int] = []

    def counted(program: Any, batches: Any, places: Any) -> Any:
        seen.append(len(places))
        return collect_rows(program, batches, places)

    def routed() -> dict[str, torch.Tensor]:
        program = Pipeline((RouteChannels(0.5, groups=4, router="ridge"),)).run(capture(model, (x,)), Context(batches=[(x,)]))
        return instantiate(program).state_dict()

    monkeypatch.setattr(route_channels, "collect_rows", counted)
    together = routed()
    monkeypatch.setattr(_units, "MAX_BYTES", 1)
    alone = routed()
    assert seen == [4, 1, 1, 1, 1]
    assert all(torch.equal(value, alone[name]) for name, value in together.items())


def test_a_fitted_router_asks_for_rows() -> None:
    model, x = GatedFfn(16, 64).eval(), torch.randn(40, 16)
    with pytest.raises(CalibrationError):
        Pipeline((RouteChannels(0.5, router="ridge"),)).run(capture(model, (x,)), Context())


@pytest.mark.parametrize("options", [{"groups": 0}, {"shared": 1.0}, {"router": "oracle"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ParseError):
        RouteChannels(**options)
