"""Structures: exact counts, the best score kept, deterministic ties, and refusals that say why."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify_compiler import catalog
from sparsify_compiler.errors import ParseError, StructureError
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.prune.structures.block import Block
from sparsify_compiler.passes.prune.structures.columns import Columns
from sparsify_compiler.passes.prune.structures.fan_in import FanIn
from sparsify_compiler.passes.prune.structures.grouped_nm import GroupedNM
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.prune.structures.rows import Rows
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.passes.prune.structures.vnm import VNM
from sparsify_compiler.pipeline import Pipeline

quick = settings(max_examples=60, derandomize=True, deadline=None)
SIMPLE = (Unstructured(), Unstructured("row"), FanIn(), NM(2, 4), NM(1, 3), Block(3, 2), Block(4, 1), Block(1, 1))
COMPOSED = (Unstructured("column"), NM(2, 4, along="outputs", padded=True), NM(2, 5, padded=True), VNM(4, 2, 6), VNM(3, 1, 4, columns=2),
            GroupedNM(2, 4, 1), GroupedNM(1, 3, 2), Rows(), Rows(5), Columns(), Columns(5))
ALL = (*SIMPLE, *COMPOSED)


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
@given(st.sampled_from(SIMPLE), st.integers(0, 99))
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
    misfits = [name for name, attributes in structure.formats() if catalog.get("format", name).fits(weight, mask, **attributes) is not None]
    assert misfits == (["nm"] if "padded" in str(structure) and "inputs" in repr(structure) else [])  # the format has no shorter last group


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_ties_and_zero_rows_are_deterministic(structure: Structure) -> None:
    score = torch.zeros(12, 12)
    first = structure.mask(score, structure.density or 0.5)
    assert torch.equal(first, structure.mask(score.clone(), structure.density or 0.5))
    assert abs(float(first.float().mean()) - (structure.density or 0.5)) < 0.1


def test_of_equal_scores_the_first_go_first() -> None:
    assert Unstructured().mask(torch.ones(1, 4), 0.5).tolist() == [[False, False, True, True]]
    assert NM(2, 4).mask(torch.tensor([[1.0, 1.0, 2.0, 1.0]]), 0.5).tolist() == [[False, False, True, True]]


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_short_last_block_and_convolutions_and_strides(structure: Structure) -> None:
    score = torch.rand(7, 12, 3, 3)  # 108 inputs
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
    (NM(2, 4, along="outputs"), (6, 4), 0.5, "6 outputs do not divide into groups of 4"),
    (VNM(2, 2, 8), (4, 12), 0.25, "12 inputs do not divide into groups of 8"),
    (GroupedNM(2, 4), (4, 6), 0.5, "6 inputs do not divide"),
])
def test_check_refuses(structure: Structure, shape: tuple[int, ...], density: float, why: str) -> None:
    with pytest.raises(StructureError, match=why):
        structure.check(shape, density)
    with pytest.raises(StructureError, match=why):
        structure.mask(torch.rand(shape), density)


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_every_structure_refuses_nan_and_keeps_infinity(structure: Structure) -> None:
    score = torch.rand(12, 12)
    score[7, 7] = float("inf")
    assert bool(structure.mask(score, structure.density or 0.5)[7, 7])
    score[7, 7] = float("nan")
    with pytest.raises(StructureError, match="NaN"):
        structure.mask(score, structure.density or 0.5)


def test_a_misfit_says_how_to_pad() -> None:
    with pytest.raises(StructureError) as caught:
        NM(2, 4).check((4, 6), 0.5)
    assert "padded=True" in caught.value.hint


@quick
@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 4), st.integers(2, 8), st.booleans(), st.integers(0, 99))
def test_padded_groups_keep_what_they_have(rows: int, columns: int, n: int, m: int, outputs: bool, seed: int) -> None:
    n = min(n, m - 1)
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = NM(n, m, "outputs" if outputs else "inputs", padded=True).mask(score, n / m)
    for group, values in zip((mask.T if outputs else mask).split(m, 1), (score.T if outputs else score).split(m, 1), strict=True):
        assert (group.sum(1) == min(n, group.shape[1])).all()
        best = values.sort(1, descending=True).values[:, : min(n, group.shape[1])]
        torch.testing.assert_close((values * group).sum(1), best.sum(1))


@quick
@given(st.integers(1, 9), st.integers(1, 12), st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.0]), st.integers(0, 99))
def test_columns_of_scores_are_compared_alone(rows: int, columns: int, density: float, seed: int) -> None:
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = Unstructured("column").mask(score, density)
    assert mask.sum(0).tolist() == [exact(rows, density)] * columns
    assert torch.equal(mask, Unstructured("row").mask(score.T, density).T)


@quick
@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from([(2, 2, 6, 4), (4, 1, 4, 2), (3, 2, 5, 3), (1, 2, 4, 4)]), st.integers(0, 99))
def test_vnm_keeps_the_best_choice_of_columns(rows: int, groups: int, sizes: tuple[int, int, int, int], seed: int) -> None:
    v, n, m, wide = sizes
    score = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    mask = VNM(v, n, m, wide).mask(score, n / m)
    assert (mask.view(rows, groups, m).sum(2) == n).all()
    for block, values in zip(mask.split(v), score.split(v), strict=True):
        for group, value in zip(block.split(m, 1), values.split(m, 1), strict=True):
            assert int(group.any(0).sum()) <= wide
            best = max(float(value[:, list(c)].topk(n, 1).values.sum()) for c in combinations(range(m), wide))
            assert float(value[group].sum()) == pytest.approx(best, rel=1e-5)


def test_vnm_searched_by_swaps_comes_close_to_trying_all(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) ** 3
    structure = VNM(8, 2, 12)
    best = float(score[structure.mask(score, 2 / 12)].sum())
    monkeypatch.setattr("sparsify_compiler.passes.prune.structures.vnm.EXACT", 0)
    searched = structure.mask(score, 2 / 12)
    assert (searched.view(64, 8, 12).sum(2) == 2).all()
    assert 0.98 * best < float(score[searched].sum()) <= best + 1e-3


@quick
@given(st.integers(1, 20), st.integers(1, 3), st.sampled_from([(2, 4, 1), (1, 3, 2), (1, 2, 3)]), st.booleans(), st.integers(0, 99))
def test_grouped_patterns_come_equally_often(rows: int, groups: int, sizes: tuple[int, int, int], ties: bool, seed: int) -> None:
    n, m, group = sizes
    rand = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 3, (rows, groups * m), generator=rand).float() if ties else torch.rand(rows, groups * m, generator=rand)
    mask = GroupedNM(n, m, group).mask(score, n / m)
    assert (mask.view(rows, groups, m).sum(2) == n).all()
    chunk = math.comb(m, n) * group
    for part in mask.split(chunk):
        for column in part.split(m, 1):
            counts = column.unique(dim=0, return_counts=True)[1]
            assert counts.max() <= group
            assert part.shape[0] < chunk or counts.tolist() == [group] * math.comb(m, n)


def test_grouped_patterns_are_matched_best_first() -> None:
    score = torch.tensor([[5.0, 4.0], [9.0, 1.0]])  # both rows want the first place; the one that loses more gets it
    assert GroupedNM(1, 2, 1).mask(score, 0.5).tolist() == [[False, True], [True, False]]


@quick
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([0.2, 0.5, 0.9]), st.integers(0, 99))
def test_rows_and_columns_go_whole(rows: int, columns: int, size: int, density: float, seed: int) -> None:
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = Rows(size).mask(score, density)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    runs = [bool(run.all()) for run in mask[:, 0].split(size)]
    assert sum(runs) == exact(len(runs), density)
    means = [float(run.mean()) for run in score.split(size)]
    assert min(m for m, kept in zip(means, runs, strict=True) if kept) >= max([m for m, kept in zip(means, runs, strict=True) if not kept], default=0)
    assert torch.equal(Columns(size).mask(score.T, density), mask.T)


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
    ("NM(n=2, m=4)", NM(2, 4)), ("Block(rows=4, columns=1)", Block(4, 1)), ("column", Unstructured("column")),
    ("NM(n=2, m=4, along=outputs)", NM(2, 4, "outputs")), ("VNM(v=16, n=2, m=8)", VNM(16, 2, 8)), ("VNM(v=4, n=1, m=8, columns=2)", VNM(4, 1, 8, 2)),
    ("GroupedNM(n=2, m=4, group=8)", GroupedNM(2, 4, 8)), ("Rows()", Rows()), ("Rows(size=64)", Rows(64)), ("Columns(size=2)", Columns(2)),
])
def test_parse(text: str, structure: Structure) -> None:
    assert Structure.parse(text) == structure
    assert Structure.parse(str(structure)) == structure


@pytest.mark.parametrize("text", ["", "3", "2:4:8", "dense", "row x", "wanda()", "__import__('os')"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ParseError):
        Structure.parse(text)


@pytest.mark.parametrize("structure", ALL, ids=str)
def test_every_structure_prints_and_parses(structure: Structure) -> None:
    assert Structure.parse(str(structure)) == structure
    pipeline = Pipeline((MaskWeights(structure=structure),))
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline


@pytest.mark.parametrize("text", ["4:4", "5:4", "0:4", "0x1", "1:300", "VNM(v=0, n=2, m=8)", "VNM(v=1, n=5, m=8)", "VNM(v=1, n=2, m=3)",
                                  "GroupedNM(n=4, m=8, group=0)", "GroupedNM(n=8, m=16)", "Rows(size=0)", "Columns(size=-1)"])
def test_structures_with_impossible_numbers(text: str) -> None:
    with pytest.raises(StructureError):
        Structure.parse(text)
