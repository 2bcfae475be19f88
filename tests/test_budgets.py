"""Budgets: totals that are kept exactly, clamps, orders that the papers ask for, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify_compiler import catalog
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import BudgetError, CalibrationError, ParseError, StructureError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.budgets._base import scaled, shifted, sizes_of
from sparsify_compiler.passes.prune.budgets.cfsp import cfsp
from sparsify_compiler.passes.prune.budgets.curvature import curvature
from sparsify_compiler.passes.prune.budgets.erk import erk
from sparsify_compiler.passes.prune.budgets.global_threshold import global_threshold
from sparsify_compiler.passes.prune.budgets.owl import owl
from sparsify_compiler.passes.prune.budgets.uniform import uniform
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import get_tensor

quick = settings(max_examples=60, derandomize=True, deadline=None)
SHAPES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=6)
SMALL = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6)


@dataclass
class Made:
    """Evidence that is written down. Weights are drawn where none are given, all norms are 1."""

    scores: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    blocks: dict[str, str] = field(default_factory=dict)
    angles: dict[str, float] = field(default_factory=dict)
    slopes: dict[str, Tensor] = field(default_factory=dict)  # squared gradients

    def score(self, site: str) -> Tensor:
        return self.scores[site]

    def weight(self, site: str) -> Tensor:
        return self.weights[site]

    def statistic(self, site: str, name: str) -> Tensor:
        if name == "gradient_square":
            return self.slopes.get(site, torch.ones_like(self.weights[site]))
        return torch.tensor(self.angles[self.block(site)]) if name == "block_angle" else torch.ones(self.weights[site].shape[1])

    def block(self, site: str) -> str:
        return self.blocks.get(site, site)


def drawn(shapes: dict[str, tuple[int, ...]], seed: int, ties: bool = False) -> Made:
    rand = torch.Generator().manual_seed(seed)
    random = {s: torch.randn(shape, generator=rand) for s, shape in shapes.items()}
    scores = {s: (value * 2).round().abs() if ties else value.abs() for s, value in random.items()}
    weights = {s: torch.randn(shape, generator=rand) ** 3 for s, shape in shapes.items()}
    blocks = {s: f"block {i // 2}" for i, s in enumerate(shapes)}
    return Made(scores, weights, blocks, {block: float(torch.rand((), generator=rand)) for block in blocks.values()})


def spent(found: dict[str, float], shapes: dict[str, tuple[int, ...]]) -> float:
    sizes = sizes_of(shapes)
    return math.fsum(found[site] * size for site, size in sizes.items())


def total(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(sizes_of(shapes).values())


@quick
@given(st.sampled_from([uniform, erk, owl, cfsp]), SHAPES, st.floats(0.02, 1.0), st.integers(0, 99))
def test_the_total_is_spent_exactly(allocate: Callable[..., dict[str, float]], shapes: dict[str, tuple[int, ...]], density: float, seed: int) -> None:
    found = allocate(shapes, density, drawn(shapes, seed))
    assert list(found) == list(shapes)
    assert all(0 < value <= 1 for value in found.values())
    floor = sum(1 for site in shapes if found[site] * math.prod(shapes[site]) <= 1.0000001)  # each such layer may have been raised to one weight
    assert math.isclose(spent(found, shapes), density * total(shapes), rel_tol=1e-9, abs_tol=floor)
    if not floor:
        assert math.isclose(spent(found, shapes), density * total(shapes), rel_tol=1e-9)


@quick
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(st.floats(-2, 2), st.integers(1, 10**6)), min_size=1, max_size=8),
       st.floats(0.05, 1.0))
def test_shifting_keeps_order_and_total(layers: dict[str, tuple[float, int]], density: float) -> None:
    wanted, sizes = {s: w for s, (w, _) in layers.items()}, {s: n for s, (_, n) in layers.items()}
    found = shifted(wanted, sizes, density)
    room = density * sum(sizes.values()) >= len(sizes)
    assert not room or math.isclose(math.fsum(found[s] * sizes[s] for s in sizes), density * sum(sizes.values()), rel_tol=1e-9)
    assert all(1 / sizes[s] <= found[s] * (1 + 1e-9) and found[s] <= 1 for s in sizes)
    for one in wanted:
        for other in wanted:
            free = all(1 / sizes[s] < found[s] < 1 for s in (one, other))
            assert not free or math.isclose(found[one] - found[other], wanted[one] - wanted[other], abs_tol=1e-6)


@quick
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(st.floats(1e-3, 10), st.integers(1, 10**6)), min_size=1, max_size=8),
       st.floats(0.05, 1.0))
def test_scaling_keeps_proportion_and_total(layers: dict[str, tuple[float, int]], density: float) -> None:
    wanted, sizes = {s: w for s, (w, _) in layers.items()}, {s: n for s, (_, n) in layers.items()}
    found = scaled(wanted, sizes, density)
    assert math.isclose(math.fsum(found[s] * sizes[s] for s in sizes), density * sum(sizes.values()), rel_tol=1e-9)
    ratios = [found[s] / wanted[s] for s in sizes if found[s] < 1]
    assert not ratios or math.isclose(min(ratios), max(ratios), rel_tol=1e-6)


def test_erk_caps_small_layers_and_uniform_does_not_care() -> None:
    shapes = {"small": (4, 4), "large": (400, 400), "conv": (64, 32, 3, 3)}
    found = erk(shapes, 0.3)
    assert found["small"] == 1.0
    assert found["large"] < found["conv"] < 1
    free = [sum(s) / math.prod(s) / found[k] for k, s in shapes.items() if found[k] < 1]
    assert math.isclose(min(free), max(free), rel_tol=1e-9)
    assert uniform(shapes, 0.3) == dict.fromkeys(shapes, 0.3)
    assert erk({}, 0.5) == {}
    assert erk({"empty": (0, 4)}, 0.5) == {"empty": 1.0}


@pytest.mark.parametrize("name", [name for name in catalog.names("budget") if name != "given"])  # which is told, and shares nothing out
def test_no_layers_and_empty_layers(name: str) -> None:
    budget = Named.parse("budget", name)
    assert budget({}, 0.5, Made()) == {}
    shapes = {"empty": (0, 4), "full": (8, 4)}
    made = drawn(shapes, 0)
    assert budget(shapes, 0.5, made)["full"] == pytest.approx(0.5)


# --- OWL --------------------------------------------------------------------------------------------------------------------------------------


def owl_transcribed(weights: list[list[Tensor]], sparsity: float, times: float, spread: float) -> Tensor:
    """The authors' layer ratios (densities), from |W| of each block with all norms 1."""
    ratios = []
    for block in weights:
        metric = torch.cat([w.abs().flatten() for w in block])
        ratios.append(float((metric > metric.mean() * times).sum()) / metric.numel() * 100)
    found = torch.tensor(ratios, dtype=torch.float64)
    found = (found - found.min()) * (1 / (found.max() - found.min()) * spread * 2)
    return found - found.mean() + (1 - sparsity)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
@pytest.mark.parametrize(("times", "spread"), [(5.0, 0.08), (3.0, 0.15)])
def test_owl_gives_the_densities_of_the_authors(sparsity: float, times: float, spread: float) -> None:
    shapes = {f"{b}.{i}": (24, 32) for b in range(4) for i in range(2)}
    made = drawn(shapes, 5)
    made.weights = {site: torch.randn(24, 32, generator=torch.Generator().manual_seed(i)) ** (1 + i // 2) for i, site in enumerate(shapes)}
    made.blocks = {site: site.partition(".")[0] for site in shapes}
    found = owl(shapes, 1 - sparsity, made, outliers=times, spread=spread)
    expected = owl_transcribed([[made.weights[f"{b}.{i}"] for i in range(2)] for b in range(4)], sparsity, times, spread)
    for b in range(4):
        assert found[f"{b}.0"] == found[f"{b}.1"] == pytest.approx(float(expected[b]), abs=1e-9)
    assert max(found.values()) - min(found.values()) == pytest.approx(2 * spread)


def test_owl_without_differences_is_uniform() -> None:
    shapes = {"a": (4, 4), "b": (4, 4)}
    made = Made(weights=dict.fromkeys(shapes, torch.ones(4, 4)))
    assert list(owl(shapes, 0.4, made).values()) == pytest.approx([0.4, 0.4])


# --- CFSP -------------------------------------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(0.1, 0.9))
def test_cfsp_keeps_more_where_the_stream_turns_more(angles: list[float], density: float) -> None:
    shapes = {f"{i}.{k}": (16, 16) for i in range(len(angles)) for k in range(2)} | {"head": (16, 16)}
    made = Made(blocks={site: site[0] for site in shapes if site != "head"}, angles={str(i): a for i, a in enumerate(angles)})
    found = cfsp(shapes, density, made)
    for i, one in enumerate(angles):
        assert found[f"{i}.0"] == found[f"{i}.1"]
        for j, other in enumerate(angles):
            assert one < other or found[f"{i}.0"] >= found[f"{j}.0"] - 1e-12
    if all(value < 1 for value in found.values()):
        sigma = [1 / (1 + math.exp(-13.1072 * (a - sum(angles) / len(angles)))) for a in angles]
        assert found["0.0"] / found["1.0"] == pytest.approx(sigma[0] / sigma[1], rel=1e-6)
        assert found["head"] / found["0.0"] == pytest.approx(0.5 / sigma[0], rel=1e-6)


# --- global threshold -------------------------------------------------------------------------------------------------------------------------


@quick
@given(SMALL, st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]), st.booleans(), st.integers(0, 99))
def test_a_global_threshold_keeps_the_best_of_all_layers(shapes: dict[str, tuple[int, ...]], density: float, ties: bool, seed: int) -> None:
    made = drawn(shapes, seed, ties)
    found = global_threshold(shapes, density, made)
    masks = {site: Unstructured().mask(made.scores[site], found[site]) for site in shapes}
    flat, kept = torch.cat([made.scores[s].flatten() for s in shapes]), torch.cat([masks[s].flatten() for s in shapes])
    expected = Unstructured().mask(flat[None], density)[0]
    assert all(bool(mask.any()) for mask in masks.values())
    if all(bool(part.any()) for part in expected.split([math.prod(s) for s in shapes.values()])):
        assert torch.equal(kept, expected)
    else:  # a layer that would lose all keeps one: as many are kept, as far as one for each layer allows
        assert int(kept.sum()) == max(int(expected.sum()), len(shapes))


def test_curvature_gives_to_the_layers_that_the_loss_feels() -> None:
    """Layers that are alike but for their gradients: the steeper one gets more; with mix=0 all get the same, with mix=1 the threshold's share."""
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(4))
    made = Made(weights={"flat": weight, "steep": weight.clone()}, slopes={"steep": torch.full((20, 30), 9.0)})
    shapes = {"flat": (20, 30), "steep": (20, 30)}
    found = curvature(shapes, 0.5, made, mix=1.0)
    limit = torch.cat([weight.abs().flatten(), 3 * weight.abs().flatten()]).sort(descending=True).values[599]
    assert found["steep"] == pytest.approx(float((3 * weight.abs() >= limit).double().mean()))
    assert found["flat"] == pytest.approx(1 - found["steep"])
    assert curvature(shapes, 0.5, made, mix=0.0) == {"flat": 0.5, "steep": 0.5}
    assert curvature(shapes, 0.5, made)["steep"] == pytest.approx(0.6 * found["steep"] + 0.2)
    with pytest.raises(BudgetError, match="mix"):
        curvature(shapes, 0.5, made, mix=2.0)


@pytest.mark.parametrize("values", [[-1.5, -0.0, 0.0, 2.0], [2.0**-140, 2.0**127, float("inf"), 1.0], [-(2.0**127), float("-inf"), 5.0, 5.0]])
def test_thresholds_order_every_float(values: list[float]) -> None:
    scores = {"a": torch.tensor([values[:2]]), "b": torch.tensor([values[2:]])}
    found = global_threshold({"a": (1, 2), "b": (1, 2)}, 0.5, Made(scores))
    kept = [v for s in scores for v, m in zip(scores[s][0].tolist(), Unstructured().mask(scores[s], found[s])[0].tolist(), strict=True) if m]
    pairs = values[:2], values[2:]
    best = sorted(values)[2:]
    alone = any(not set(pair) & set(best) for pair in pairs)  # a layer that would lose both keeps its better one
    assert sorted(kept) == (sorted(map(max, pairs)) if alone else best)


def test_a_threshold_refuses_nan() -> None:
    with pytest.raises(StructureError, match=r"^b: .*NaN"):
        global_threshold({"a": (1, 2), "b": (1, 2)}, 0.5, Made({"a": torch.ones(1, 2), "b": torch.tensor([[1.0, float("nan")]])}))


def test_a_global_mask_over_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    with torch.no_grad():
        model[2].weight *= 3
    program = Pipeline((MaskWeights(budget="global_threshold", density=0.3),)).run(capture(model, (torch.randn(2, 16),)), Context())
    masks = {i: get_tensor(program.regions[""].module, f"{i}.weight_mask") for i in (0, 2)}
    limit = torch.cat([model[i].weight.detach().abs().flatten() for i in (0, 2)]).sort(descending=True).values[math.ceil(0.3 * 768) - 1]
    for i, mask in masks.items():
        assert torch.equal(mask, model[i].weight.detach().abs() >= limit)
    assert masks[2].float().mean() > masks[0].float().mean()


# --- in the pass ------------------------------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Residual blocks of which the last ones turn the stream more, and have other outliers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.ModuleList(nn.Linear(16, 16) for _ in range(3)) for _ in range(2))
        with torch.no_grad():
            for i, layer in enumerate(self.down):
                weight = layer.weight * layer.weight.abs() ** (3 * i)  # type: ignore[operator]
                layer.weight.copy_(weight * (0.05 + 0.15 * i) / weight.std())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


@pytest.mark.parametrize("budget", ["owl", "owl(outliers=3, spread=0.2)", "cfsp", "cfsp(steepness=30)"])
def test_budgets_that_need_calibration(budget: str) -> None:
    torch.manual_seed(0)
    model, batch = Stack().eval(), (torch.randn(32, 16),)
    program = capture(model, batch)
    ctx = Context(calibrate=lambda now, needs: calibrate(now, [batch], needs, cache=False))
    after = Pipeline((MaskWeights(budget=budget, density=0.5),)).run(program, ctx)
    budgets = {site: row.budget for site, row in after.decisions.items()}
    assert all(budgets[f"up.{i}"] == budgets[f"down.{i}"] for i in range(3))
    assert budgets["up.0"] < budgets["up.2"] if budget.startswith("cfsp") else budgets["up.0"] != budgets["up.2"]  # type: ignore[operator]
    assert sum(budgets.values()) / len(budgets) == pytest.approx(0.5)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError):
        Pipeline((MaskWeights(budget=budget, density=0.5),)).run(program, Context())


@pytest.mark.parametrize(("text", "words"), [
    ("owl(outlier=3)", "did you mean outliers"), ("erk(spread=1)", "no option"), ("owl(spread=wide)", "must be a float"),
])
def test_wrong_options_of_budgets(text: str, words: str) -> None:
    with pytest.raises(ParseError, match=words):
        MaskWeights(budget=text)
