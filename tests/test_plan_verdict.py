"""The whole model's word on a plan: of small models none is worse than the same density everywhere, and estimates that are wrong are found out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.passes.plan import choose_layers
from sparsify_compiler.passes.plan._verdict import FEWEST, Verdict, verdicts
from sparsify_compiler.passes.plan.choose_layers import ChooseLayers
from sparsify_compiler.passes.prune.repairs import obs
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program
from sparsify_compiler.quality import batch_losses
from sparsify_compiler.survey import WEIGHTS, Offer, Survey
from sparsify_compiler.target import host

WEIGHTS_CHOICE, INPUTS_CHOICE = "mask_weights(score=weight_times_input_norm)", "select_inputs()"


class Words(nn.Module):
    """Logits of the next token by a small residual network, whose second block adds next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.first, self.second = (nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Linear(96, 32)) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = x + self.first(x)
        return torch.as_tensor(self.head(x + 0.05 * self.second(x)))


@pytest.fixture(scope="module")
def words() -> Words:
    torch.manual_seed(0)
    return Words().eval()


@pytest.fixture(scope="module")
def texts(words: Words) -> list[dict[str, Tensor]]:
    """Written by the model itself, so that none knows better how they go on."""
    generator = torch.Generator().manual_seed(1)
    columns = [torch.randint(0, 40, (16, 1), generator=generator)]
    with torch.no_grad():
        for _ in range(31):
            columns.append(torch.multinomial(words(columns[-1])[:, 0].softmax(-1), 1, generator=generator))
    return [{"input_ids": rows} for rows in torch.cat(columns, 1).split(4)]


def context(batches: list[Any]) -> Context:
    ctx = Context(target=host(), example_inputs=batches[0], batches=batches)
    ctx.calibrate = lambda program, needs: calibrate(program, batches, needs, cache=False)
    return ctx


# --- which of two is better -----------------------------------------------------------------------------------------------------------------


def test_the_loss_decides_where_it_differs_by_more_than_chance_and_else_the_outputs() -> None:
    old = Verdict((0.1, 0.1, 0.1), (3.0, 2.0, 1.0), (10, 10, 10))
    assert replace(old, moved=(0.5,) * 3, lost=(2.9, 1.91, 0.9)).better(old)
    assert not old.better(replace(old, moved=(0.5,) * 3, lost=(2.9, 1.91, 0.9)))
    noisy = (2.5, 2.4, 1.05)  # lower in the mean, but not by more than it varies
    assert not replace(old, moved=(0.11, 0.1, 0.1), lost=noisy).better(old)
    assert replace(old, moved=(0.09, 0.1, 0.1), lost=noisy).better(old)


def test_one_batch_says_nothing_of_chance() -> None:
    old = Verdict((0.1,), (3.0,), (10,))
    assert not replace(old, moved=(0.2,), lost=(1.0,)).better(old)
    assert replace(old, moved=(0.05,), lost=(4.0,)).better(old)
    assert not replace(old, moved=(math.nan,)).better(old)


@given(st.lists(st.tuples(*[st.floats(0, 5, width=32)] * 4), min_size=1, max_size=5))
@settings(deadline=None)
def test_never_are_both_better(rows: list[tuple[float, float, float, float]]) -> None:
    counts = (7,) * len(rows)
    one, other = (Verdict(tuple(row[k] for row in rows), tuple(row[k + 1] for row in rows), counts) for k in (0, 2))
    assert not (one.better(other) and other.better(one))
    assert not one.better(one)


def test_batches_go_on_until_vectors_differ_by_more_than_chance() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    batches = [(torch.randn(32, 16, dtype=torch.float32),) for _ in range(6)]
    program = capture(net, batches[0])
    near, far = (Pipeline.parse(f"mask_weights(density={density})").run(program, context(batches)) for density in (0.9, 0.3))
    one, other = verdicts(program, [near, far], batches)
    assert len(one.moved) == len(other.moved) == FEWEST
    assert one.better(other)
    assert not other.better(one)
    (again,) = verdicts(program, [far], batches, None, one)
    assert again.moved == other.moved
    assert [len(each.moved) for each in verdicts(program, [near, near], batches)] == [6, 6], "what does not differ is looked at to the end"
    assert [len(each.moved) for each in verdicts(program, [near, far], batches, lambda output, batch: output.mean())] == [6, 6]
    short, long = Verdict((0.2, 0.2), (), ()), Verdict((0.1, 0.15, 0.9), (), ())
    assert long.better(short), "the third batch is known of one of them only"


def test_a_verdict_is_of_the_next_token_or_of_the_users_loss(words: Words, texts: list[Any]) -> None:
    program = capture(words, texts[0])
    cut = Pipeline.parse("mask_weights(score=magnitude, density=0.5)").run(program, context(texts), ())
    said, dense = verdicts(program, [cut, program], texts)
    losses, counts = batch_losses(instantiate(cut), texts)
    assert (said.lost, said.counts) == (pytest.approx(losses), tuple(counts))
    assert min(said.moved) > 0 == max(dense.moved)
    (own,) = verdicts(program, [cut], texts, lambda output, batch: output.sum() * 0 + len(batch))
    assert (own.lost, own.counts) == ((1.0,) * 4, (1,) * 4)
    x = (torch.ones(4, 8, dtype=torch.float32),)
    vectors = capture(nn.Linear(8, 8).eval(), x)
    assert verdicts(vectors, [vectors], [x]) == [Verdict((0.0,), (), ())]


# --- how far differences are believed -----------------------------------------------------------------------------------------------------------


def survey_of(losses: dict[str, list[float]], sizes: dict[str, float]) -> Survey:
    densities = [0.9, 0.5, 0.2]
    offers = {site: [Offer("dense"), *[Offer(f"{d}", 0, d, loss) for d, loss in zip(densities, row, strict=True)]] for site, row in losses.items()}
    costs = {site: [sizes[site] * offer.density for offer in row] for site, row in offers.items()}
    return Survey(offers, lambda kind: costs, lambda taken: Pipeline(), scale={"a": 2.0})


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.sampled_from([1.0, 3.0, 20.0])), min_size=2, max_size=5), st.floats(0, 1))
@settings(deadline=None)
def test_a_belief_moves_losses_towards_a_typical_weight(sites: list[tuple[float, float]], share: float) -> None:
    names = "abcde"[: len(sites)]
    losses = {name: [level, 5 * level, 50 * level] for name, (level, _) in zip(names, sites, strict=True)}
    sizes = {name: size for name, (_, size) in zip(names, sites, strict=True)}
    survey = survey_of(losses, sizes)
    own = {site: [survey.loss(site, offer) for offer in offers] for site, offers in survey.offers.items()}
    survey.believe(0.0)
    even = {site: [survey.loss(site, offer) for offer in offers] for site, offers in survey.offers.items()}
    for place in range(4):
        assert math.fsum(row[place] for row in even.values()) == pytest.approx(math.fsum(row[place] for row in own.values()))
        assert len({round(row[place] / sizes[site] / (even["a"][place] / sizes["a"] or 1), 9) for site, row in even.items()}) == 1
    survey.believe(share)
    for site, offers in survey.offers.items():
        for place, offer in enumerate(offers):
            low, high = sorted((own[site][place], even[site][place]))
            assert low * (1 - 1e-9) <= survey.loss(site, offer) <= high * (1 + 1e-9)
    survey.believe(1.0)
    assert own == {site: [survey.loss(site, offer) for offer in offers] for site, offers in survey.offers.items()}


def test_without_belief_all_sites_are_cut_alike() -> None:
    survey = survey_of({"a": [1e-5, 1e-4, 1e-3], "b": [1.0, 10.0, 1e3], "c": [0.1, 1.0, 20.0]}, {"a": 4.0, "b": 4.0, "c": 8.0})
    assert {offer.density for offer in survey.plan(WEIGHTS, 8.41).taken.values()} != {0.5}
    survey.believe(0.0)
    assert {offer.density for offer in survey.plan(WEIGHTS, 8.41).taken.values()} == {0.5}


# --- a plan and the same density everywhere ---------------------------------------------------------------------------------------------------


def moved(pipeline: Pipeline, program: Any, texts: list[Any]) -> float:
    return sum(verdicts(program, [pipeline.run(program, context(texts), ())], texts)[0].moved)


def even(choice: str, density: float) -> Pipeline:
    return Pipeline((replace(Pipeline.parse(choice).passes[0], density=density),))  # type: ignore[call-arg]


@pytest.mark.parametrize("density", [0.93, 0.75, 0.5])
@pytest.mark.parametrize("choice", [WEIGHTS_CHOICE, INPUTS_CHOICE], ids=["weights", "inputs"])
def test_a_plan_is_no_worse_than_one_density_for_all(words: Words, texts: list[Any], choice: str, density: float) -> None:
    program, ctx = capture(words, texts[0]), context(texts)
    planner = ChooseLayers(choices=(choice,))
    survey = planner.survey(program, ctx)
    plan = planner.settle(survey, WEIGHTS, survey.plan(WEIGHTS, density * survey.as_it_is(WEIGHTS).cost), program, ctx)
    assert plan.cost <= density * survey.as_it_is(WEIGHTS).cost * (1 + 1e-9)
    assert moved(plan.pipeline, program, texts) <= moved(even(choice, density), program, texts)


class Alike(nn.Module):
    """Layers of which none matters more than another, so that there is nothing to choose between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(48, 48) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


@pytest.mark.parametrize("density", [0.95, 0.9])
def test_between_dense_and_the_next_density_there_are_steps(density: float) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(64, 48, dtype=torch.float32),) for _ in range(2)]
    program, ctx = capture(Alike().eval(), batches[0]), context(batches)
    planner = ChooseLayers(choices=(INPUTS_CHOICE,))
    survey = planner.survey(program, ctx)
    plan = survey.plan(WEIGHTS, density * survey.as_it_is(WEIGHTS).cost)
    assert moved(plan.pipeline, program, batches) <= 1.2 * moved(even(INPUTS_CHOICE, density), program, batches)


def test_estimates_that_are_wrong_are_not_believed(words: Words, texts: list[Any]) -> None:
    program, ctx = capture(words, texts[0]), context(texts)
    planner = ChooseLayers(choices=(WEIGHTS_CHOICE,))
    survey = planner.survey(program, ctx)
    limit = 0.5 * survey.as_it_is(WEIGHTS).cost
    right = survey.plan(WEIGHTS, limit)
    assert planner.settle(survey, WEIGHTS, right, program, ctx) is right
    assert survey.belief == 1
    survey.scale = {site: 1e12 if site.startswith("second") else 1e-12 for site in survey.offers}
    wrong = survey.plan(WEIGHTS, limit)
    spent = survey.spent(WEIGHTS, wrong.taken)
    settled = planner.settle(survey, WEIGHTS, wrong, program, ctx)
    assert survey.belief == 0
    assert survey.plan(WEIGHTS, spent).taken == settled.taken, "the survey goes on so"
    assert survey.planned(WEIGHTS, settled, limit, 1, settled.pipeline).belief == 0
    assert moved(settled.pipeline, program, texts) < moved(wrong.pipeline, program, texts)


def test_estimates_of_a_model_in_parts_are_held_against_the_whole_of_it_too() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    batches = [{"input_ids": torch.randint(1, 96, (4, 12))} for _ in range(3)]
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 20  # what the estimates below think matters least
    program, ctx = capture(model, batches[0]), context(batches)
    assert program.skeleton is not None
    planner = ChooseLayers(choices=(WEIGHTS_CHOICE,), ignore=("lm_head",))
    survey = planner.survey(program, ctx)
    assert survey.scale == {}
    survey.scale = {site: 1e-12 if "layers.1.mlp" in site else 1e12 for site in survey.offers}
    wrong = survey.plan(WEIGHTS, 0.6 * survey.as_it_is(WEIGHTS).cost)
    settled = planner.refine(survey, WEIGHTS, wrong, program, ctx)
    assert survey.belief == 0
    assert settled.cost <= wrong.cost * (1 + 1e-9)
    assert moved(settled.pipeline, program, batches) < moved(wrong.pipeline, program, batches)


@pytest.mark.parametrize(("even", "between", "belief"), [(2.0, 0.1, 1), (0.5, 0.7, 0), (0.5, 0.2, 0.5)])
def test_a_plan_between_is_made_where_the_even_one_is_better(words: Words, texts: list[Any], monkeypatch: pytest.MonkeyPatch,
                                                             even: float, between: float, belief: float) -> None:
    program, ctx = capture(words, texts[0]), context(texts)
    planner = ChooseLayers(choices=(WEIGHTS_CHOICE,))
    survey = planner.survey(program, ctx)
    survey.scale = {site: 100.0**number for number, site in enumerate(survey.offers)}
    told = [(even, 1.0), (between,)]  # what is known of the even plan is not asked again
    monkeypatch.setattr(choose_layers, "verdicts", lambda program, models, *_: [Verdict((value,), (), ()) for value in _as_many(told.pop(0), models)])
    planner.settle(survey, WEIGHTS, survey.plan(WEIGHTS, 0.5 * survey.as_it_is(WEIGHTS).cost), program, ctx)
    assert survey.belief == belief
    assert len(told) == (belief == 1)


def _as_many(values: tuple[float, ...], models: Sequence[Program]) -> tuple[float, ...]:
    assert len(values) == len(models)
    return values


def test_what_a_plan_makes_of_the_model_is_made_once(words: Words, texts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    program, ctx = capture(words, texts[0]), context(texts)
    planner = ChooseLayers(choices=(WEIGHTS_CHOICE,))
    survey = planner.survey(program, ctx)
    plan = survey.plan(WEIGHTS, 0.5 * survey.as_it_is(WEIGHTS).cost)
    made: list[str] = []
    run = Pipeline.run

    def noted(self: Pipeline, *rest: Any) -> Any:
        made.append(str(self))
        return run(self, *rest)

    monkeypatch.setattr(Pipeline, "run", noted)
    planner.refine(survey, WEIGHTS, plan, program, ctx)
    assert any(one.startswith(str(plan.pipeline)[:-1]) for one in made)  # its layers cut each by itself
    assert len(made) == len(set(made)) > 1


def test_plans_are_compared_without_inverting_anything_again(words: Words, texts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    program, ctx = capture(words, texts[0]), context(texts)
    made = "mask_weights(score=repair, structure={!r}, repair=obs, inputs=pruned)"
    planner = ChooseLayers(choices=(made.format("unstructured"), made.format("2:4")))
    survey = planner.survey(program, ctx)
    survey.scale = {site: 100.0**number for number, site in enumerate(survey.offers)}
    plan = survey.plan(WEIGHTS, 0.5 * survey.as_it_is(WEIGHTS).cost)
    compared: list[Program] = []
    monkeypatch.setattr(choose_layers, "verdicts", lambda *given: (compared.extend(given[1]), verdicts(*given))[1])
    monkeypatch.setattr(obs, "damped", None)
    planner.refine(survey, WEIGHTS, plan, program, ctx)
    kept = [{site: row.density for site, row in one.decisions.items()} for one in compared]
    assert {site: offer.density for site, offer in plan.taken.items()} == pytest.approx(kept[-1], abs=0.01)
    assert kept[0] != kept[-1]


def test_where_nothing_is_probed_or_nothing_was_cut_the_plan_stands(words: Words, texts: list[Any]) -> None:
    program, ctx = capture(words, texts[0]), context(texts)
    planner = ChooseLayers(choices=(WEIGHTS_CHOICE,), probes=0)
    survey = planner.survey(program, ctx)
    plan = survey.plan(WEIGHTS, 0.5 * survey.as_it_is(WEIGHTS).cost)
    assert planner.settle(survey, WEIGHTS, plan, program, ctx) is plan
    assert replace(planner, probes=1).settle(survey, WEIGHTS, survey.as_it_is(WEIGHTS), program, ctx).taken == survey.as_it_is(WEIGHTS).taken
