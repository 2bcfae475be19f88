"""Layers in another dtype, and the planner that chooses it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import ParseError
from sparsify_compiler.normal_form_edit import is_call
from sparsify_compiler.passes.plan import _costs
from sparsify_compiler.passes.plan.choose_layers import ChooseLayers
from sparsify_compiler.passes.precision.cast_layers import CastLayers
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.survey import BYTES, SECONDS
from sparsify_compiler.target import host
from sparsify_compiler.work import Work


class Net(nn.Module):
    """Three projections of one value, and one that two calls share."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.out(self.out(self.q(x) * self.k(x))))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 32, generator=generator, dtype=torch.float32),) for _ in range(2)]


def test_each_layer_computes_in_the_dtype_and_gives_back_the_old_one(net: Net, batches: list[Any]) -> None:
    program = Pipeline((CastLayers(),)).run(capture(net, batches[0]), Context(), ())
    (x,) = batches[0]

    def half(layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.bfloat16()
        return nn.functional.linear(x.bfloat16(), layer.weight.bfloat16(), bias).float()

    with torch.no_grad():
        expected = half(net.out, half(net.out, half(net.q, x) * half(net.k, x)))
        assert torch.equal(instantiate(program)(x), expected)
    region = program.regions[""]
    casts = [node for node in region.graph.nodes if is_call(node, torch.ops.aten.to.dtype) and node.kwargs["dtype"] == torch.bfloat16]
    assert len(casts) == 3, "q and k share theirs"
    assert {row.dtype for row in program.decisions.values()} == {"bfloat16"}
    assert net.q.weight.dtype == torch.float32
    assert instantiate(program).out.weight_folded.dtype == torch.bfloat16
    again = Pipeline((CastLayers(),)).run(program, ctx := Context(), ())
    assert len(list(again.regions[""].graph.nodes)) == len(list(region.graph.nodes))
    assert all("already" in str(miss) for miss in ctx.misses)


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"density": 0.5}])
def test_bad_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParseError):
        CastLayers(**wrong)


def test_a_plan_mixes_dtypes_and_masks(net: Net, batches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def forms(work: Work, target: Any, again: float | None) -> dict[str, float]:
        sizes = dict(work.sizes)
        if work.op == "elementwise":
            return {"dense eager": 0.0}
        return {"dense": sizes["N"] * sizes["K"] * sizes.get("density", 1.0) * (0.5e-9 if work.dtype == "bfloat16" else 1e-9)}

    monkeypatch.setattr(_costs, "predict", forms)
    planner = ChooseLayers(choices=("mask_weights(score=weight_times_input_norm)", "cast_layers()"), densities=(0.1, 0.2, 0.3))
    ctx = Context(target=host(), example_inputs=batches[0], batches=batches)
    ctx.calibrate = lambda program, needs: calibrate(program, batches, needs, cache=False)
    survey = planner.survey(capture(net, batches[0]), ctx)
    dense, taken = survey.as_it_is(SECONDS), {}
    for share in (0.6, 0.4):
        plan = survey.plan(SECONDS, share * dense.cost)
        taken[share] = [offer.name for offer in plan.taken.values()]
    assert taken[0.6].count("bfloat16 100%") >= 2
    assert any("unstructured" in name for name in taken[0.4])
    assert math.isfinite(survey.offers["out"][1].loss), "a layer that is called twice is planned for"
    offer = next(offer for offer in survey.offers["q"] if offer.name.startswith("bfloat16"))
    assert 0 < offer.loss < 1e-4, "rounding to 8 bits moves little"
    assert survey.cost(BYTES, "q", offer) == pytest.approx(survey.costs(BYTES)["q"][0] / 2)
    assert Pipeline.parse(str(plan.pipeline)) == plan.pipeline
    compiled = sc.compile(net, batches[0], recipe=planner, budget=sc.Budget(bytes=int(0.6 * sum(p.numel() * 4 for p in net.parameters()))),
                          calibration=batches)
    assert {row.dtype for row in compiled.report().sites} == {"bfloat16"}
    assert compiled.report().quality[0].compiled > 0.9999  # type: ignore[operator]
