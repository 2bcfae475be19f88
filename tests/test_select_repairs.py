"""What stands in for skipped inputs: a low-rank part, out of the layer's density."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_help import check_lowered, rewritten
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.call import instantiate
from sparsify_compiler.errors import InputError, ParseError
from sparsify_compiler.passes.activation.repairs._base import Skipping
from sparsify_compiler.passes.activation.repairs.low_rank import low_rank
from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.passes.prune._low_rank import MARK
from sparsify_compiler.program import Program


def net(bias: bool = True) -> nn.Module:
    """A layer of nearly low rank, and one of full rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64, bias), nn.GELU(), nn.Linear(64, 40, bias)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 3) @ torch.randn(3, 48) + 0.01 * torch.randn(64, 48))
    return model


def batches() -> list[tuple[Tensor, ...]]:
    torch.manual_seed(1)
    return [(torch.randn(40, 48),) for _ in range(3)]


def beside(program: Program) -> int:
    return sum(node.kwargs["weight"].meta["val"].numel() for _, node in program.nodes() if MARK in node.meta)  # type: ignore[union-attr]


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.floats(0.05, 1.0), st.floats(0.0, 0.9), st.booleans())
def test_the_low_rank_part_is_paid_for_and_projects(outputs: int, width: int, rows: int, density: float, share: float, always: bool) -> None:
    weight, x = torch.randn(outputs, width), torch.randn(rows, width)
    found = low_rank(Skipping(weight, lambda density: x * (x.abs() < 1 - density)), density, share=share, always=always)
    if found.low_rank is None:
        assert found.density == density
        return
    reads, writes = found.low_rank
    assert found.density * outputs * width + reads.numel() + writes.numel() == pytest.approx(density * outputs * width, rel=1e-4)
    assert reads.numel() + writes.numel() <= share * density * outputs * width + 1e-3
    torch.testing.assert_close(writes.t() @ writes, torch.eye(writes.shape[1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(writes @ reads, writes @ (writes.t() @ weight))


@pytest.mark.parametrize("selector", [name for name in catalog.names("selector") if name != "nonzero"])
@pytest.mark.parametrize("scorer", catalog.names("scorer"))
def test_it_composes_and_lowers_the_error_where_the_weight_has_few_directions(selector: str, scorer: str) -> None:
    model, data = net(), batches()
    step = {repair: SelectInputs(scorer, selector, "uniform", 0.5, repair) for repair in ("none", "low_rank(share=0.4)")}
    programs = {repair: rewritten(one, model, data)[0] for repair, one in step.items()}
    with torch.no_grad():
        dense = model(data[0][0])
        errors = [float((instantiate(program)(data[0][0]) - dense).norm()) for program in programs.values()]
    assert errors[1] < 0.7 * errors[0]
    after = programs["low_rank(share=0.4)"]
    first = after.decisions["0"]
    assert " + rank " in first.structure
    read = sum(row.density * row.shape[0] * row.shape[1] for row in after.decisions.values()) + beside(after)
    assert read == pytest.approx(0.5 * (48 * 64 + 64 * 40), rel=0.05)


@pytest.mark.parametrize("center", ["zero", "mean"])
def test_density_1_is_the_dense_model_and_nan_reaches_the_output(center: Any) -> None:
    model, data = net(bias=False), batches()
    with torch.no_grad():
        whole = rewritten(SelectInputs(density=1.0, repair="low_rank", center=center), model, data)[0]
        torch.testing.assert_close(instantiate(whole)(data[0][0]), model(data[0][0]))
        assert not beside(whole)
        half = instantiate(rewritten(SelectInputs(density=0.5, repair="low_rank(always=True)", center=center), model, data)[0])
        x = data[0][0].clone()
        x[3, 5] = float("nan")
        assert bool(half(x)[3].isnan().all())
        assert not bool(half(x)[:3].isnan().any())
        with pytest.raises(InputError, match="1 or more"):
            half(x[:0])


def test_a_row_whose_inputs_are_all_selected_is_dense() -> None:
    model, data = nn.Sequential(net()[0]).eval(), batches()
    half = rewritten(SelectInputs(density=0.5, repair="low_rank(always=True)"), model, data)[0]
    assert beside(half)
    x = 100 + torch.rand(4, 48)
    with torch.no_grad():
        torch.testing.assert_close(instantiate(half)(x), model(x))


def test_bad_options_are_refused() -> None:
    for text in ("low_rank(share=2.0)", "low_rank(share=-0.1)"):
        with pytest.raises(ParseError, match="between 0 and 1"):
            rewritten(SelectInputs(density=0.5, repair=text), net(), batches())
    with pytest.raises(sc.errors.SparsifyError):
        SelectInputs(repair="low_rnk")


def test_packed_and_lowered_models_compute_the_same(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).eval()
    data = [(torch.randn(8, 512),) for _ in range(3)]
    check_lowered(SelectInputs(density=0.25, repair="low_rank(always=True)"), model, data, (1, 30), tmp_path)
