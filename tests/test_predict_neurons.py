"""Neurons and heads chosen by a small trained network before they are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.calibrate_rows import collect_rows
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import BudgetError, CalibrationError, InputError, ParseError
from sparsify_compiler.ops import select
from sparsify_compiler.passes.activation._copy import copied
from sparsify_compiler.passes.activation._predictor import fit, hidden, margins, scored, top
from sparsify_compiler.passes.activation.estimate_neurons import EstimateNeurons
from sparsify_compiler.passes.activation.predict_neurons import PredictNeurons
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program


def rewritten(step: Pass, net: nn.Module, data: list[Any], dynamic: Any = None) -> tuple[Program, Context]:
    ctx = Context(batches=data)
    return Pipeline((step,)).run(capture(net, data[0], dynamic), ctx, ()), ctx


def clustered(bias: bool = False) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """An FFN, and rows of four kinds: which neurons matter can be learned."""
    torch.manual_seed(0)
    centers = torch.randn(4, 32) * 3
    data = [(centers[torch.randint(0, 4, (256,))] + 0.3 * torch.randn(256, 32),) for _ in range(3)]
    return GatedFfn(32, 64, bias).eval(), data


@pytest.fixture(scope="module")
def llama() -> tuple[nn.Module, list[dict[str, Any]]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    lm = transformers.LlamaForCausalLM(config).eval()
    return lm, [{"input_ids": torch.randint(1, 96, (4, 12)), "use_cache": False} for _ in range(4)]


def test_a_predictor_finds_what_can_be_learned_and_is_its_formula() -> None:
    net, data = clustered()
    program, ctx = rewritten(PredictNeurons(density=0.25, epochs=20), net, data)
    row, = program.decisions.values()
    assert ctx.rewrites == 1
    assert row.structure == "neurons by prediction"
    assert row.density == pytest.approx(0.25, abs=0.02)
    assert int(row.reason.partition("%")[0].rpartition(" ")[2]) > 80, "chance is 25 %"
    module, x = instantiate(program), data[0][0]
    state = module.state_dict()
    inner = hidden(x, state["predictor_first_folded"], state["predictor_bias_folded"])
    scores = scored(inner, state["predictor_second_folded"], state["predictor_odds_folded"])
    kept = scores >= state["input_limit_folded"]
    gate = torch.where(kept, nn.functional.silu(net.gate(x)), 0)  # type: ignore[operator]
    torch.testing.assert_close(module(x), net.down(gate * net.up(x)))  # type: ignore[operator]
    with torch.no_grad():
        assert float((module(x) - net(x)).norm() / net(x).norm()) < 0.5


@pytest.mark.parametrize("source", ["site", "model"])
@pytest.mark.parametrize("criterion", ["magnitude", "gradient"])
def test_all_kept_is_the_dense_model_on_a_language_model(llama: tuple[nn.Module, Any], source: Any, criterion: Any) -> None:
    lm, data = llama
    step = PredictNeurons(1.0, source, criterion, rank=8, epochs=1, targets=("ffn", "attention"))
    program, ctx = rewritten(step, lm, data)
    assert ctx.rewrites == 4
    with torch.no_grad():
        assert torch.equal(instantiate(program)(**data[0]).logits, lm(**data[0]).logits)
    half, _ = rewritten(PredictNeurons(0.5, source, criterion, rank=8, epochs=1, targets=("ffn", "attention")), lm, data)
    assert {row.structure for row in half.decisions.values()} == {"neurons by prediction", "heads by prediction"}
    assert all(row.density == pytest.approx(0.5, abs=0.15) for row in half.decisions.values())
    firsts = [name for name in instantiate(half).state_dict() if "predictor_first" in name]
    assert len(firsts) == (1 if source == "model" else 4)
    with torch.no_grad():
        assert not torch.equal(instantiate(half)(**data[0]).logits, lm(**data[0]).logits)


def test_whole_heads_go() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (4, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
            y: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return y

    torch.manual_seed(0)
    data = [(torch.randn(8, 6, 16),) for _ in range(2)]
    program, _ = rewritten(PredictNeurons(0.5, rank=4, epochs=1, targets=("attention",)), Attention().eval(), data)
    node = next(node for _, node in program.nodes() if node.target is select.op)
    place = ("", node.name)
    rows, _ = collect_rows(program, data, [place])
    zeros = (rows[place] == 0).unflatten(-1, (4, 4))
    assert bool((zeros.all(-1) == zeros.any(-1)).all())
    assert 0.3 < float(zeros.float().mean()) < 0.7


def test_rows_and_gradients_are_collected() -> None:
    net, data = clustered()
    program = capture(net, data[0])
    silu = next(node.name for _, node in program.nodes() if "silu" in node.name)
    rows, slopes = collect_rows(program, data, [("", "x")], [("", silu)])
    torch.testing.assert_close(rows["", "x"], torch.cat([x for x, in data]))
    x = data[0][0]
    gate = nn.functional.silu(net.gate(x)).detach().requires_grad_()  # type: ignore[operator]
    net.down(gate * net.up(x)).square().mean().backward()  # type: ignore[operator]
    torch.testing.assert_close(slopes["", silu][:256], gate.grad)
    frozen = GatedFfn(32, 64).requires_grad_(False).eval()
    with torch.no_grad():
        _, slopes = collect_rows(capture(frozen, data[0]), data, [], [("", silu)])
    assert float(slopes["", silu].abs().sum()) > 0


def test_several_sets_of_labels_share_the_first_layer() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 8)
    wanted = torch.stack([margins(x @ torch.randn(8, 12), 0.25) for _ in range(3)])
    made = fit(x, wanted, rank=16, epochs=100, seed=0)
    assert all(one.first is made[0].first for one in made)
    assert all(one.recall > 0.5 for one in made), [one.recall for one in made]
    again = fit(x, wanted, rank=16, epochs=100, seed=0)
    assert torch.equal(made[2].second, again[2].second)
    assert top(torch.zeros(3, 5), 0.01).sum() == 3


def test_compiled_it_is_dense_and_says_so() -> None:
    net, data = clustered(bias=True)
    compiled = sc.compile(net, data[0], recipe=sc.recipes.deja_vu(0.25, epochs=1), calibration=data)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*data[0]), net(*data[0]))
    row = next(row for row in compiled.report().sites if row.site == "down")
    assert "reads everything" in row.reason
    assert row.density == 1


def test_a_selection_that_came_with_the_model_stays() -> None:
    net, data = clustered()
    own = instantiate(rewritten(PredictNeurons(density=0.25, epochs=2), net, data)[0]).eval()
    x = data[0][0]
    with torch.no_grad():
        assert not torch.allclose(own(x), net(x), atol=1e-2)
        torch.testing.assert_close(sc.compile(own, (x,), recipe="lower()")(x), own(x), rtol=1e-4, atol=1e-5)


def test_a_nan_reaches_the_output() -> None:
    net, data = clustered()
    module = instantiate(rewritten(PredictNeurons(density=0.25, epochs=1), net, data)[0])
    x = data[0][0].clone()
    x[0, 3] = float("nan")
    with torch.no_grad():
        assert bool(module(x)[0].isnan().all())
        assert bool(module(x)[1:].isfinite().all())


def test_bad_input_is_refused() -> None:
    net, data = clustered()
    for wrong in ({"source": "layer"}, {"criterion": "size"}, {"rank": 0}, {"epochs": 0}):
        with pytest.raises(ParseError):
            PredictNeurons(**wrong)  # type: ignore[arg-type]
    with pytest.raises(BudgetError):
        rewritten(PredictNeurons(), net, data)
    with pytest.raises(CalibrationError, match="no calibration"):
        Pipeline((PredictNeurons(0.5),)).run(capture(net, data[0]), Context(), ())
    with pytest.raises(CalibrationError, match="NaN"):
        rewritten(PredictNeurons(0.5), net, [data[0], (torch.full((256, 32), float("nan")),)])
    with pytest.raises(InputError, match="batch 1"):
        rewritten(PredictNeurons(0.5), net, [data[0], (torch.randn(3, 31),)])
    selected, ctx = rewritten(PredictNeurons(0.5, epochs=1), net, data)
    Pipeline((PredictNeurons(0.5, epochs=1),)).run(selected, ctx, ())
    assert "selected already" in ctx.misses[-1].why


@pytest.mark.parametrize("net", [GatedFfn(32, 64, True), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))], ids=["gated", "plain"])
def test_a_copy_of_full_rank_knows_what_each_neuron_gives(net: nn.Module) -> None:
    """Its scores are then the neurons' own, times the length of their weights, so that as many of the largest are selected."""
    torch.manual_seed(0)
    data = [(torch.randn(200, 32),)]
    program, ctx = rewritten(EstimateNeurons(density=0.3, rank=32, selector="top_k"), net.eval(), data)
    row, = program.decisions.values()
    assert ctx.rewrites == 1
    assert int(row.reason.partition("%")[0].rpartition(" ")[2]) >= 99
    up, down = (net.up, net.down) if isinstance(net, GatedFfn) else (net[0], net[2])
    x = torch.randn(200, 32)
    with torch.no_grad():
        made = nn.functional.silu(net.gate(x)) * up(x) if isinstance(net, GatedFfn) else nn.functional.gelu(up(x))
        score = made.abs() * down.weight.norm(dim=0)
        kept = made * (score >= score.topk(round(0.3 * 64)).values[:, -1:])
        assert float((instantiate(program)(x) - down(kept)).norm() / down(kept).norm()) < 0.03, "but for neurons at the limit"


def test_a_thin_copy_knows_more_than_chance_and_what_it_misses() -> None:
    net, data = clustered()
    program, _ = rewritten(EstimateNeurons(density=0.25, rank=4), net, data)
    row, = program.decisions.values()
    assert int(row.reason.partition("%")[0].rpartition(" ")[2]) > 60, "chance is 25 %"
    assert row.density == pytest.approx(0.25, abs=0.02)
    copy = copied(torch.zeros(3, 4), torch.rand(3, 6), [(torch.randn(6, 4), torch.ones(6))], [torch.relu], torch.ones(6), 2, 0.5)  # no row differs
    torch.testing.assert_close(copy.scores, torch.ones(3, 6), rtol=1e-3, atol=1e-3)
    with pytest.raises(ParseError):
        EstimateNeurons(rank=0)
    with pytest.raises(CalibrationError, match="there are none"):
        Pipeline((EstimateNeurons(0.5),)).run(capture(net, data[0]), Context(), ())


@pytest.mark.parametrize(("after", "structure"), [("select_inputs(density=0.5)", "inputs"), ("mask_weights(density=0.5)", "unstructured")])
def test_predictors_are_no_layers_of_the_model(after: str, structure: str) -> None:
    """A pass behind finds the FFN's own linears, and the report says what became of the prediction."""
    torch.manual_seed(0)
    model, data = GatedFfn(64, 128).eval(), [(torch.randn(40, 64),) for _ in range(2)]
    recipe = Pipeline.parse(f"predict_neurons(density=0.5) | {after} | pack() | lower(margin=-1000.0, rounds=1)")
    rows = sc.compile(model, (torch.randn(1, 64),), recipe=recipe, calibration=data, dynamic={"x": {0: "rows"}}).report().sites
    assert {row.site for row in rows} == {"gate", "up", "down"}
    assert all(row.structure.startswith(structure) for row in rows)
    assert any("what was predicted is read all the same" in row.reason for row in rows), [row.reason for row in rows]
