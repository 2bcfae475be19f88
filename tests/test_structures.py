"""Structures, scores and budgets: exact counts, deterministic ties, and refusals that say why."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.errors import ParseError, StructureError
from sparsify_compiler.passes.prune.budgets.erk import erk
from sparsify_compiler.passes.prune.budgets.uniform import uniform
from sparsify_compiler.passes.prune.scores.magnitude import magnitude
from sparsify_compiler.passes.prune.scores.random import random
from sparsify_compiler.passes.prune.scores.weight_times_input_norm import weight_times_input_norm
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.prune.structures.block import Block
from sparsify_compiler.passes.prune.structures.fan_in import FanIn
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured

quick = settings(max_examples=60, derandomize=True, deadline=None)
ALL = (Unstructured(), Unstructured("row"), FanIn(), NM(2, 4), NM(1, 3), Block(3, 2), Block(4, 1), Block(1, 1))


def exact(total: int, density: float) -> int:
    """ceil(density * total) in exact arithmetic on the decimal that the user wrote."""
    return math.ceil(Fraction(str(density)) * total)


@quick
@given(st.integers(1, 9), st.integers(1, 30), st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 1.0, 0.05, 0.999]), st.booleans(), st.integers(0, 99))
def test_exact_counts(rows: int, columns: int, density: float, many_ties: bool, seed: int) -> None:
    rand = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 3, (rows, columns), generator=rand).float() if many_ties else torch.rand(rows, columns, generator=rand)
    assert int(Unstructured().mask(score, density).sum()) == exact(rows * columns, density)
    for structure in (Unstructured("row"), FanIn()):
        assert structure.mask(score, density).sum(1).tolist() == [exact(columns, density)] * rows
    blocks = Block(2, 1).mask(score, density)
    assert int(blocks[::2].sum()) == exact(math.ceil(rows / 2) * columns, density)
    assert torch.equal(blocks[1::2], blocks[::2][: rows // 2])


@quick
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(2, 8), st.integers(0, 99))
def test_n_of_every_m(rows: int, groups: int, n: int, m: int, seed: int) -> None:
    n = min(n, m - 1)
    score = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    mask = NM(n, m).mask(score, n / m)
    assert bool((mask.view(rows, groups, m).sum(-1) == n).all())


@quick
@given(st.sampled_from(ALL), st.integers(0, 99))
def test_what_is_kept_scores_no_less_than_what_is_cut(structure: Structure, seed: int) -> None:
    score = torch.randint(0, 9, (12, 12), generator=torch.Generator().manual_seed(seed)).float()
    mask = structure.mask(score, structure.density or 0.5)
    groups = {"row": (12, 12), "fan_in": (12, 12), "2:4": (36, 4), "1:3": (48, 3)}.get(str(structure), (1, 144))
    if isinstance(structure, Block):
        rows, columns = structure.rows, structure.columns
        score = score.view(12 // rows, rows, 12 // columns, columns).sum((1, 3))
        mask = mask.view(12 // rows, rows, 12 // columns, columns).all(3).all(1)
        groups = (1, score.numel())
    for one, kept in zip(score.reshape(groups), mask.reshape(groups), strict=True):
        assert not kept.any() or kept.all() or one[kept].min() >= one[~kept].max()


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_masks_fit_the_formats_that_the_structure_names(structure: Structure) -> None:
    weight = torch.randn(10, 12)
    mask = structure.mask(weight.abs(), structure.density or 0.25)
    for name, attributes in structure.formats():
        assert catalog.get("format", name).fits(weight, mask, **attributes) is None, name


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_ties_and_zero_rows_are_deterministic(structure: Structure) -> None:
    score = torch.zeros(12, 12)
    first = structure.mask(score, structure.density or 0.5)
    assert torch.equal(first, structure.mask(score.clone(), structure.density or 0.5))
    assert abs(float(first.float().mean()) - (structure.density or 0.5)) < 0.05


def test_of_equal_scores_the_first_go_first() -> None:
    assert Unstructured().mask(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]
    assert NM(2, 4).mask(torch.tensor([[1.0, 1.0, 2.0, 1.0]]), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_short_last_block_and_convolutions_and_strides(structure: Structure) -> None:
    score = torch.rand(7, 12, 3, 3)
    mask = structure.mask(score, structure.density or 0.5)
    assert mask.shape == score.shape
    assert torch.equal(mask, structure.mask(score.reshape(7, -1), structure.density or 0.5).view_as(score))
    turned = torch.rand(12, 7).T
    assert torch.equal(structure.mask(turned, structure.density or 0.5), structure.mask(turned.contiguous(), structure.density or 0.5))


def test_a_lower_last_block_counts_by_its_mean() -> None:
    score = torch.tensor([[1.0, 9.0], [1.0, 9.0], [2.0, 2.0]])
    assert Block(2, 1).mask(score, 0.75).tolist() == [[False, True], [False, True], [True, True]]


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_density_one_keeps_all_and_empty_weights_pass(structure: Structure) -> None:
    if structure.density is None:
        assert bool(structure.mask(torch.rand(12, 12), 1.0).all())
    assert structure.mask(torch.rand(0, 12), structure.density or 0.5).shape == (0, 12)


@pytest.mark.parametrize(("structure", "shape", "density", "why"), [
    (NM(2, 4), (4, 6), 0.5, "6 inputs do not divide into groups of 4"),
    (NM(2, 4), (4, 8), 0.25, "keeps 0.5 of the weights, not 0.25"),
    (Block(2, 4), (4, 6), 0.5, "do not divide into blocks of 4"),
    (Unstructured(), (4, 4), 0.0, "above 0"),
    (Unstructured(), (4, 4), 1.5, "at most at 1"),
    (Unstructured(), (4, 4), float("nan"), "above 0"),
    (FanIn(), (4,), 0.5, "two dimensions"),
])
def test_check_refuses(structure: Structure, shape: tuple[int, ...], density: float, why: str) -> None:
    with pytest.raises(StructureError, match=why):
        structure.check(shape, density)
    with pytest.raises(StructureError, match=why):
        structure.mask(torch.rand(shape), density)


def test_scores_with_nan_are_refused_and_infinity_is_kept() -> None:
    score = torch.rand(4, 4)
    score[1, 1] = float("inf")
    assert bool(Unstructured().mask(score, 0.1)[1, 1])
    score[1, 1] = float("nan")
    with pytest.raises(StructureError, match="NaN"):
        Unstructured().mask(score, 0.5)


@pytest.mark.parametrize(("text", "structure"), [
    ("unstructured", Unstructured()), ("row", Unstructured("row")),
    ("fan_in", FanIn()), ("fan-in", FanIn()), ("2:4", NM(2, 4)), (" 4:8 ", NM(4, 8)), ("16x1", Block(16, 1)), ("32×32", Block(32, 32)),
    ("NM(n=2, m=4)", NM(2, 4)), ("Block(rows=4, columns=1)", Block(4, 1)),
])
def test_parse(text: str, structure: Structure) -> None:
    assert Structure.parse(text) == structure
    assert Structure.parse(str(structure)) == structure


@pytest.mark.parametrize("text", ["", "3", "2:4:8", "dense", "row x", "wanda()", "__import__('os')"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ParseError):
        Structure.parse(text)


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "0x1", "1:300"])
def test_structures_with_impossible_numbers(text: str) -> None:
    with pytest.raises(StructureError):
        Structure.parse(text)


# --- scores ---------------------------------------------------------------------------------------------------------------------------------


def test_magnitude_and_random() -> None:
    weight = torch.randn(3, 4).bfloat16()
    assert torch.equal(magnitude(weight, {}, 0), weight.float().abs())
    assert torch.equal(random(weight, {}, 5), random(weight, {}, 5))
    assert not torch.equal(random(weight, {}, 5), random(weight, {}, 6))


def wanda_transcribed(weight: Tensor, batches: list[Tensor], sparsity: float, n: int = 0, m: int = 0) -> Tensor:
    """What is pruned: Wanda's published procedure (sample by sample running mean of squared norms; stable ascending sort), written plainly."""
    scaler_row, samples = torch.zeros(weight.shape[1]), 0
    for batch in batches:
        scaler_row *= samples / (samples + batch.shape[0])
        samples += batch.shape[0]
        scaler_row += torch.norm(batch.reshape(-1, batch.shape[-1]).t(), p=2, dim=1) ** 2 / samples
    metric = weight.abs() * torch.sqrt(scaler_row.reshape(1, -1))
    pruned = torch.zeros_like(metric, dtype=torch.bool)
    if n:
        for start in range(0, metric.shape[1], m):
            lowest = torch.topk(metric[:, start : start + m], n, dim=1, largest=False)[1]
            pruned.scatter_(1, start + lowest, True)
        return pruned
    order = torch.sort(metric, dim=-1, stable=True)[1]
    return pruned.scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)


@pytest.mark.parametrize("sparsity", [0.25, 0.3, 0.5, 0.75])
def test_wanda_masks_are_those_of_its_procedure(sparsity: float) -> None:
    torch.manual_seed(1)
    weight, batches = torch.randn(48, 96), [torch.randn(2, 7, 96) * torch.rand(96) for _ in range(3)]
    weight[3] = 0.0
    norm = torch.cat([b.reshape(-1, 96) for b in batches]).double().square().sum(0).sqrt().float()
    score = weight_times_input_norm(weight, {"input_norm": norm}, 0)
    assert torch.equal(~Unstructured("row").mask(score, 1 - sparsity), wanda_transcribed(weight, batches, sparsity))
    weight[3] = torch.randn(96)  # its topk leaves the order of equal scores open
    score = weight_times_input_norm(weight, {"input_norm": norm}, 0)
    assert torch.equal(~NM(2, 4).mask(score, 0.5), wanda_transcribed(weight, batches, 0.5, 2, 4))


def test_input_norms_of_a_grouped_convolution_belong_to_their_group() -> None:
    weight, norm = torch.ones(4, 2, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0])
    score = weight_times_input_norm(weight, {"input_norm": norm}, 0)
    assert score[:, :, 0, 0].tolist() == [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]


# --- budgets --------------------------------------------------------------------------------------------------------------------------------

SHAPES = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=6)


@quick
@given(SHAPES, st.floats(0.01, 1.0))
def test_erk_spends_the_total_exactly(shapes: dict[str, tuple[int, ...]], density: float) -> None:
    found = erk(shapes, density)
    assert list(found) == list(shapes)
    assert all(0 < d <= 1 for d in found.values())
    total = sum(math.prod(s) for s in shapes.values())
    assert math.isclose(sum(found[k] * math.prod(s) for k, s in shapes.items()), density * total, rel_tol=1e-9)
    free = [(sum(s) / math.prod(s) / found[k]) for k, s in shapes.items() if found[k] < 1]
    assert not free or math.isclose(min(free), max(free), rel_tol=1e-9)


def test_erk_caps_small_layers_and_uniform_does_not_care() -> None:
    shapes = {"small": (4, 4), "large": (400, 400), "conv": (64, 32, 3, 3)}
    found = erk(shapes, 0.3)
    assert found["small"] == 1.0
    assert found["large"] < found["conv"] < 1
    assert uniform(shapes, 0.3) == dict.fromkeys(shapes, 0.3)
    assert erk({}, 0.5) == {}
    assert erk({"empty": (0, 4)}, 0.5) == {"empty": 1.0}
