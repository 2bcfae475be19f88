"""The parts that divide an FFN into experts mean what their docstrings say, each alone and on numbers that can be checked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.errors import ParseError, UnknownNameError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.moe._criteria import CRITERIA
from sparsify_compiler.passes.moe._evidence import Evidence, Ffn
from sparsify_compiler.passes.moe._split import Split, divided, filled, whole
from sparsify_compiler.passes.moe.routers._base import Task
from sparsify_compiler.passes.train._penalty import Penalty, check_weight


def numbers(*rows: Any) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def experts(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def evidence() -> Evidence:
    """Three neurons, two rows; the columns of down have lengths 5, 2 and 1, the rows of gate 1, 2 and 5."""
    ffn = Ffn(numbers([1, 0], [0, 2], [3, 4]), numbers([3, 0, 1], [4, 2, 0]), "relu", gate_bias=torch.tensor([1.0, 3.0, 5.0]))
    return Evidence(ffn, numbers([1, 1], [2, 0]), numbers([4, -1, 0], [2, 3, 0]), numbers([1, 2, 3], [0, 1, 1]))


@pytest.mark.parametrize(("name", "expected"), [
    ("contribution", [5 * math.sqrt(20), 2 * math.sqrt(10), 0]), ("taylor", [4, math.sqrt(13), 0]), ("activation_rate(share=0.3)", [0.5, 0.5, 0]),
    ("weight_norm", [5, 4, 5])])
def test_importances(name: str, expected: list[float]) -> None:
    torch.testing.assert_close(Named.parse("importance", name)(evidence()), torch.tensor(expected, dtype=torch.float32))


def test_the_most_important_neurons_are_shared() -> None:
    ffn = Ffn(torch.randn(4, 2), torch.randn(2, 4), "relu")
    always, routed = divided(Evidence(ffn, numbers(), numbers()), torch.tensor([3.0, 1.0, 2.0, 5.0]), 0.5, 2)
    assert (always.tolist(), routed.tolist()) == ([0, 3], [1, 2])


@pytest.mark.parametrize(("text", "expected"), [
    ("by_importance(of='weight_norm')", [[2, 3], [0, 1]]), ("by_importance(of='weight_norm', dealt=False)", [[0, 2], [1, 3]]),
    ("contiguous", [[0, 1], [2, 3]]), ("slices(width=0.75)", [[0, 1, 2], [2, 3, 0]])])
def test_partitions(text: str, expected: list[list[int]]) -> None:
    ffn = Ffn(numbers([3], [1], [4], [2]), torch.ones(1, 4), "relu")  # neurons 2, 0, 3, 1, the most important first
    table = Named.parse("partition", text)(Evidence(ffn, numbers(), numbers()), torch.arange(4), 2)
    assert table.tolist() == expected


@pytest.mark.parametrize(("text", "scores", "number", "expected"), [
    ("growing_k", [1, 3, 2], 2.0, [1, 2, -1]), ("threshold", [0.5, 0.25, 0.75], 0.5, [0, -1, 2]), ("top_k(k=2)", [1, 3, 2], 1.0, [1, 2]),
    ("top_p", [2, 0, -1], 0.8, [0, -1, -1]), ("top_p(temperature=10.0)", [2, 0, -1], 0.7, [0, 1, -1])])
def test_selectors(text: str, scores: list[float], number: float, expected: list[int]) -> None:
    assert Named.parse("expert selector", text)(numbers(scores), number).tolist() == [expected]


@pytest.mark.parametrize(("text", "share", "count"), [("growing_k", 0.5, 5), ("threshold", 0.3, 3), ("threshold", 1.0, 10), ("top_k", 0.7, 7),
                                                      ("top_k", 0.01, 1), ("top_p", 1.0, 10)])
def test_what_is_calibrated_takes_the_share(text: str, share: float, count: int) -> None:
    select, scores = Named.parse("expert selector", text), torch.arange(10, dtype=torch.float32)[None]
    assert int((select(scores, select.module.calibrate(scores, share)) >= 0).sum()) == count


@pytest.mark.parametrize(("name", "expected"), [("softmax", [0.75, 0.25, 0]), ("normalised", [0.75, 0.25, 0]), ("scaled", [2.5, 1.5, 0]),
                                                ("score", [2 * math.sqrt(2), 0, 0])])
def test_weights(name: str, expected: list[float]) -> None:
    formula = catalog.get("expert weight", name)(2)
    learned = {key: torch.full_like(value, 2.0) for key, value in formula.tensors.items()}
    scores = numbers([3, -4]) if name == "score" else numbers([math.log(3), 0])
    torch.testing.assert_close(formula.function(scores=scores, chosen=experts([0, 1, -1]), **learned), numbers(expected))


def test_weights_are_normalised_over_those_that_are_chosen() -> None:
    found = catalog.get("expert weight", "normalised")(3).function(scores=numbers([math.log(3), 0, 7]), chosen=experts([1, 0, -1]))
    torch.testing.assert_close(found, numbers([0.25, 0.75, 0]))


def test_criteria() -> None:
    torch.manual_seed(0)
    neurons, down = torch.randn(5, 2, 3), torch.randn(2, 4, 3)
    given = torch.einsum("res,ens->rens", neurons, down)
    torch.testing.assert_close(CRITERIA["output"](neurons, down), given.sum(3).norm(dim=2))
    torch.testing.assert_close(CRITERIA["norm"](neurons, down), given.square().sum((2, 3)).sqrt())
    torch.testing.assert_close(CRITERIA["positive"](neurons, down), torch.where(neurons > 0, neurons, 0).sum(2))


def repaired(text: str) -> Split:
    """Two experts of a neuron each; each row chose one."""
    ffn = Ffn(torch.randn(2, 1), numbers([1, 1]), "relu")
    seen = Evidence(ffn, torch.randn(2, 1), numbers([1, 10], [3, 20]))
    repair = Named.parse("expert repair", text)
    split: Split = repair(seen, Split.of(ffn, experts([0], [1]), torch.empty(0, dtype=torch.int64)), experts([0], [1]))
    return split


def test_the_mean_is_that_of_the_rows_that_skipped() -> None:
    split = repaired("mean")
    assert split.bias is not None
    assert split.base is not None
    assert (split.bias.tolist(), split.base.tolist()) == ([[-3.0], [-10.0]], [13.0])


def test_least_squares_that_may_change_little_is_the_mean() -> None:
    mean, fitted = repaired("mean"), repaired("least_squares(damp=1e9)")
    for name in ("down", "bias", "base"):
        torch.testing.assert_close(getattr(fitted, name), getattr(mean, name), atol=1e-4, rtol=1e-4)


def task(seen: Evidence, table: Tensor) -> Task:
    return Task(seen, table, 0.5, torch.zeros(0, table.shape[0]), "output")


def test_mean_weights_are_means_of_the_neurons_that_are_there() -> None:
    made = Named.parse("router", "mean_weights")(task(evidence(), experts([0, 1], [2, -1])))
    torch.testing.assert_close(made.tensors["weight"], numbers([0.5, 1], [3, 4]))
    torch.testing.assert_close(made.tensors["offset"], torch.tensor([2.0, 5.0]))


def test_the_representative_is_the_neuron_nearest_to_the_mean() -> None:
    gate = torch.arange(4, dtype=torch.float32)[:, None]
    neurons = numbers([0, 2, 2, 0], [0, 2, 2, 0], [2, 0, 0, 2], [2, 0, 0, 2])  # 1 and 2 are active together, 0 is not with them
    seen = Evidence(Ffn(gate, gate.T, "relu"), gate, neurons)
    made = Named.parse("router", "representative(share=0.5)")(task(seen, experts([0, 1, 2], [3, -1, -1])))
    assert made.tensors["router_gate"][:, 0].tolist() == [1, 3]


def test_hashed_scores_are_those_of_the_sides() -> None:
    made = Named.parse("router", "hashed")(task(evidence(), experts([0, 1], [2, -1])))
    x = torch.randn(1, 2, generator=torch.Generator().manual_seed(0))
    one, same, other = (made.function(x * factor, **made.tensors) for factor in (1, 3, -1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_losses_of_routers() -> None:
    z, importance, load = (catalog.get("router loss", name) for name in ("z_loss", "importance", "load_balance"))
    chosen = experts([0], [0])
    assert float(z(numbers([2, -90], [4, -90]), chosen)) == pytest.approx((4 + 16) / 2)
    assert float(importance(numbers([90, 0], [90, 0]), chosen)) == pytest.approx(1)  # 2 and 0: variance 1, mean 1
    assert float(importance(numbers([90, 0, 0, 0]), chosen)) == pytest.approx(3)
    assert float(importance(numbers([90, 0], [0, 90]), chosen)) == pytest.approx(0)
    assert float(load(numbers([0, 90]), experts([1, -1, -1]))) == pytest.approx(2)  # what is not chosen is nobody's share
    assert float(load(numbers([90, 0]), experts([1, -1, -1]))) == pytest.approx(0)


def test_a_penalty_is_the_mean_of_its_terms_by_a_schedule() -> None:
    asked: list[int] = []

    def terms() -> list[Tensor]:
        asked.append(1)
        return [torch.tensor(1.0), torch.tensor(3.0)]

    penalty = Penalty(5.0, "ramp(end=4)", terms)
    assert penalty.loss(0) is None
    assert not asked
    assert [float(term) for step in (1, 4) if (term := penalty.loss(step)) is not None] == [2.5, 10]
    assert Penalty(1.0, "constant", list).loss(0) is None


@pytest.mark.parametrize(("weight", "schedule", "error"), [(-0.1, "constant", ParseError), (math.inf, "constant", ParseError),
                                                           (math.nan, "constant", ParseError), (1.0, "rampe", UnknownNameError)])
def test_weights_of_penalties_are_checked(weight: float, schedule: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_weight(weight, schedule, "here")


@pytest.mark.parametrize(("size", "expected"), [(72.0, 64), (63.0, 64), (30.5, 32), (48.0, 48), (12.0, 12), (11.2, 12), (1408.0, 1408)])
def test_sizes_of_whole_vectors(size: float, expected: int) -> None:
    assert whole(size) == expected


def test_more_is_shared_where_experts_then_are_whole_vectors() -> None:
    ffn = Ffn(torch.randn(200, 2), torch.randn(2, 200), "relu")
    always, routed = divided(Evidence(ffn, numbers(), numbers()), torch.arange(200.0), 0.3, 4)
    assert (always.numel(), routed.numel()) == (72, 128)
    assert divided(Evidence(ffn, numbers(), numbers()), torch.arange(200.0), 0.0, 4)[1].numel() == 200
    assert filled(torch.zeros(4, 30, dtype=torch.int64))[:, 30:].tolist() == [[-1, -1]] * 4
    assert filled(torch.zeros(4, 50, dtype=torch.int64)).shape == (4, 50)
