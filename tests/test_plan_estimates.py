"""What makes a survey short: layers with some of their outputs, factors that are shared, probes of some layers of each family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.capture import capture
from sparsify_compiler.passes.plan._costs import Costs
from sparsify_compiler.passes.plan._evidence import Evidence
from sparsify_compiler.passes.plan._losses import filled, probed
from sparsify_compiler.passes.plan._thinned import MOST, RUN, can_be_thinned, sample, thin
from sparsify_compiler.passes.prune._layers import find_layers
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.repairs import obs
from sparsify_compiler.passes.prune.repairs._base import damped
from sparsify_compiler.passes.prune.repairs.obs import sweep_columns
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.survey import SECONDS, Offer
from sparsify_compiler.target import host
from sparsify_compiler.work import Work, is_predicted, predict

WIDE = 1000
OBS = MaskWeights("repair", "16x1", repair="obs")
NORMS = MaskWeights("weight_times_input_norm", "2:4")


class Wide(nn.Module):
    """A layer of many outputs, and two small ones that read the same value."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, WIDE), nn.Linear(WIDE, 16)
        self.one, self.other = nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(nn.functional.gelu(self.up(x)))
        return torch.as_tensor(self.one(y) + self.other(y))


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(64, 32, generator=generator, dtype=torch.float32),) for _ in range(2)]


@pytest.fixture(scope="module")
def evidence(batches: list[Any]) -> Evidence:
    torch.manual_seed(0)
    return evidence_of(Wide().eval(), batches)


def evidence_of(model: nn.Module, batches: list[Any]) -> Evidence:
    program = capture(model, batches[0])
    ctx = Context(target=host(), example_inputs=batches[0], batches=batches)
    ctx.calibrate = lambda program, needs: calibrate(program, batches, needs, cache=False)
    return Evidence(program, find_layers(program, ("linear",), ())[0], (OBS, NORMS), ctx)


@pytest.mark.parametrize("choice", [OBS, NORMS], ids=["16x1", "2:4"])
def test_some_outputs_say_what_all_would_lose(evidence: Evidence, choice: MaskWeights) -> None:
    some, whole = evidence.estimate(choice, 0.5), evidence.losses(evidence.rewritten(choice, 0.5))
    assert some["up"] == pytest.approx(whole["up"], rel=0.15)
    assert some["up"] != whole["up"]
    assert all(some[path] == pytest.approx(whole[path], rel=1e-6) for path in ("down", "one", "other")), "layers that are small are seen whole"
    misfit = evidence.estimate(MaskWeights(structure="3:7"), 3 / 7)
    assert all(math.isinf(loss) for loss in misfit.values())


def test_runs_of_outputs_and_the_remainder_stay(evidence: Evidence) -> None:
    alike = {layer.path: torch.ones(layer.weight.shape[0], dtype=torch.float64) for layer in evidence.layers}
    thinned = thin(evidence.program, evidence.layers, alike)
    rows, layer = thinned.rows["up"], thinned.layers[0]
    assert len(rows) == MOST + WIDE % RUN
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert rows[-1] == WIDE - 1
    assert rows[:RUN].tolist() == list(range(RUN))
    assert torch.equal(layer.weight, evidence.layers[0].weight[rows])
    assert thinned.program.regions[""].module.up.bias.shape == rows.shape
    assert evidence.layers[0].weight.shape == (WIDE, 32)


@pytest.mark.parametrize("place", [70, 500, WIDE - 1])
@pytest.mark.parametrize("choice", [OBS, NORMS, MaskWeights("repair", repair="obs")], ids=["16x1", "2:4", "unstructured"])
def test_an_output_that_outweighs_the_others_a_thousand_times_speaks_for_itself(batches: list[Any], choice: MaskWeights, place: int) -> None:
    torch.manual_seed(0)
    model = Wide().eval()
    with torch.no_grad():
        model.down.weight[:, place] *= 1000 ** 0.5
    found = evidence_of(model, batches)
    whole = found.losses(found.rewritten(choice, 0.5))
    assert found.estimate(choice, 0.5)["up"] == pytest.approx(whole["up"], rel=0.05)
    if choice is not NORMS:
        assert found.estimates(choice, [0.3, 0.5])[0.5]["up"] == pytest.approx(whole["up"], rel=0.05)


@given(st.integers(257, 4000), st.floats(0, 4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_sum_over_all_outputs_is_estimated_from_some(outputs: int, spread: float, seed: int) -> None:
    """Sizes over many orders of magnitude, of which the sum that is looked for is a share that varies from output to output."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = (spread * torch.randn(outputs, generator=drawn, dtype=torch.float64)).exp()
    rows, counts = sample(sizes)
    assert float((sizes[rows] * counts).sum()) == pytest.approx(float(sizes.sum())), "of what is known there is no error"
    assert len(rows) == MOST + outputs % RUN or outputs < MOST + RUN
    losses = sizes * (0.5 + 0.1 * torch.randn(outputs, generator=drawn, dtype=torch.float64))
    assert float((losses[rows] * counts).sum()) == pytest.approx(float(losses.sum()), rel=0.25)
    sizes[outputs // 2] = 1000 * float(sizes.sum())
    rows, counts = sample(sizes)
    assert counts[rows == outputs // 2].tolist() == [1]


def test_only_what_looks_at_a_layer_by_itself_is_shown_some_of_it(evidence: Evidence) -> None:
    (inputs,) = Pipeline.parse("select_inputs()").passes
    assert can_be_thinned(OBS, evidence.program)
    assert not can_be_thinned(inputs, evidence.program)
    assert not can_be_thinned(MaskWeights("gradient_times_weight"), evidence.program), "a statistic of each weight has the shape of all of them"


@pytest.mark.parametrize("structure", ["unstructured", "row", "16x1", "fan_in", "1:4"])
def test_densities_that_are_tried_together_lose_what_each_loses_alone(evidence: Evidence, structure: str) -> None:
    choice = MaskWeights("repair", structure, repair="obs(damping=0.02, columns=24)", inputs="pruned")
    densities = [0.25] if structure == "1:4" else [0.1, 0.5, 0.9]
    together = evidence.estimates(choice, densities)
    assert list(together) == densities
    for density in densities:
        assert together[density] == pytest.approx(evidence.estimate(choice, density), rel=2e-3)


def test_together_each_matrix_is_swept_once_and_what_does_not_fit_is_infinitely_dear(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = []
    monkeypatch.setattr(obs, "sweep_columns", lambda cut, *rest: (swept.append(rest[-1]), sweep_columns(cut, *rest))[1])
    evidence.estimates(OBS, [0.2, 0.7])
    assert swept == [[0.2, 0.7]] * 4
    found = evidence.estimates(MaskWeights("repair", "1x5", repair="obs"), [0.2, 0.7])
    assert all((loss < math.inf) == (path == "down") for each in found.values() for path, loss in each.items()), "only 1000 inputs divide by 5"
    assert set(evidence.estimates(NORMS, [0.5])) == {0.5}


def test_only_some_layers_are_cut_where_some_are_asked_for(evidence: Evidence) -> None:
    cut = evidence.rewritten(OBS, 0.5, ["up", "one"])
    assert {site for site, row in cut.decisions.items() if row.density < 1} == {"up", "one"}


def test_layers_that_read_one_value_share_its_factor(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counted(gram: Tensor, *rest: Any) -> Any:
        asked.append(gram.shape[0])
        return damped(gram, *rest)

    monkeypatch.setattr(obs, "damped", counted)
    monkeypatch.setattr(obs, "_FACTORS", type(obs._FACTORS)())
    for density in (0.3, 0.6):
        evidence.estimate(OBS, density)
    assert sorted(asked) == [16, 32, WIDE]


def test_ends_of_a_family_are_probed_and_the_rest_lies_between() -> None:
    paths = [f"layer.{block}.{name}" for block in range(9) for name in ("q", "ffn.0")] + ["head"]
    chosen = probed(paths)
    assert [path for path in chosen if path.endswith("q")] == [f"layer.{block}.q" for block in (0, 1, 4, 7, 8)]
    assert "head" in chosen
    known = {"layer.0.q": 8.0, "layer.1.q": 4.0, "layer.4.q": 0.5, "layer.8.q": 0.5, "head": 3.0}
    found = filled(paths, known)
    assert {path: found[path] for path in known} == pytest.approx(known)
    assert found["layer.2.q"] == pytest.approx(2.0)
    assert found["layer.3.q"] == pytest.approx(1.0)
    assert not any("ffn" in path for path in found), "of a family that was not probed nothing is known"


@pytest.mark.parametrize("size", [1, 7, 700])
def test_the_factor_is_that_of_the_inverse(size: int) -> None:
    rows = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upper, note = obs.inverse_factor(rows.T @ rows, 0.01, torch.float64)
    gram = rows.T @ rows + 0.01 * (rows.T @ rows).diagonal().mean() * torch.eye(size, dtype=torch.float64)
    assert torch.allclose(upper, torch.linalg.cholesky(torch.linalg.inv(gram), upper=True), rtol=1e-8, atol=1e-12)
    assert (note, torch.equal(upper, upper.triu())) == ("", True)


def test_seconds_are_predicted_where_there_is_a_formula(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_predicted(Work.of((64, 64), 8))
    assert not is_predicted(Work.of((64, 64), 8, dtype="float16"))
    offers = {layer.path: [Offer("dense"), Offer("cut", 0, 0.3), Offer("other", 0, 0.31)] for layer in evidence.layers}
    costs = Costs(evidence.layers, offers, [OBS], {0: [0.3]}, evidence.ctx)(SECONDS)
    forms = predict(Work.of((WIDE, 32), 64, OBS.structure, 0.31, between=sum(layer.weight.numel() * 4 for layer in evidence.layers)), host())
    assert costs["up"][2] == min(forms.values())
