"""Experts that go: removed or merged, of a library's model and of our own, once and again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import BudgetError, CalibrationError, ParseError, SelectorError
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe import _merge
from sparsify_compiler.passes.moe._observed import Observed
from sparsify_compiler.passes.moe.drop_experts import DropExperts, _shared_out
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program

EXPERTS, WIDTH, HIDDEN, TOP = 6, 8, 10, 2


class Mixture(nn.Module):
    """Six experts; the router scores them by x, and two are weighted by the softmax of all."""

    def __init__(self, gated: bool = True, biased: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.gate, self.down = (nn.Parameter(torch.randn(sizes) / 2) for sizes in ((EXPERTS, HIDDEN, WIDTH), (EXPERTS, WIDTH, HIDDEN)))
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / 2) if gated else None
        self.bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TOP, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        y: Tensor = experts_ffn.op(x, chosen, weights, self.gate, self.up, self.down, None, None, self.bias, activation="silu")
        return y


@pytest.fixture
def model() -> Mixture:
    torch.manual_seed(0)
    return Mixture().eval()


@pytest.fixture
def batches() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(3, 20, WIDTH),) for _ in range(2)]


def dropped(model: nn.Module, batches: list[tuple[Tensor]], *passes: DropExperts) -> Program:
    return sc.Pipeline(passes).run(capture(model, batches[0]), Context(batches=batches, density=0.5))


def wanted(model: Mixture, x: Tensor, kept: list[int]) -> Tensor:
    """The same mixture with no other experts."""
    weights, places = model.router(x)[..., kept].softmax(-1).topk(min(TOP, len(kept)), -1)
    weights = weights / weights.sum(-1, keepdim=True)
    up = None if model.up is None else model.up[kept]
    bias = None if model.bias is None else model.bias[kept]
    y: Tensor = experts_ffn.reference(x, places, weights, model.gate[kept], up, model.down[kept], None, None, bias, activation="silu")
    return y


def most_routed(model: Mixture, batches: list[tuple[Tensor]], count: int) -> list[int]:
    total = torch.zeros(EXPERTS, dtype=torch.float64)
    for (x,) in batches:
        weights, chosen = model.router(x).softmax(-1).topk(TOP, -1)
        total.index_add_(0, chosen.flatten(), (weights / weights.sum(-1, keepdim=True)).double().flatten())
    return total.argsort(descending=True)[:count].sort().values.tolist()


@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True)])
@torch.no_grad()
def test_what_is_left_is_a_mixture_of_the_others(gated: bool, biased: bool, batches: list[tuple[Tensor]]) -> None:
    torch.manual_seed(0)
    model = Mixture(gated, biased).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    program = dropped(model, batches, DropExperts())
    kept, x = most_routed(model, batches, 3), torch.randn(3, 20, WIDTH)
    torch.testing.assert_close(instantiate(program)(x), wanted(model, x, kept))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    op = next(node for _, node in program.nodes() if node.target is experts_ffn.op)
    assert op.kwargs["gate"].meta["val"].shape[0] == 3
    assert sum(tensor.numel() for tensor in instantiate(program).parameters()) < sum(tensor.numel() for tensor in model.parameters()) * 0.6
    (row,) = program.decisions.values()
    assert (row.structure, row.density) == ("3 of 6 experts kept", 0.5)
    assert row.bytes == row.dense_bytes // 2  # type: ignore[operator]


@torch.no_grad()
def test_a_second_time_drops_of_those_that_are_left(model: Mixture, batches: list[tuple[Tensor]]) -> None:
    program = dropped(model, batches, DropExperts(density=0.67), DropExperts(density=0.5))
    first = most_routed(model, batches, 4)
    total = torch.zeros(EXPERTS, dtype=torch.float64)
    for (x,) in batches:
        weights, places = model.router(x)[..., first].softmax(-1).topk(TOP, -1)
        total.index_add_(0, torch.tensor(first)[places.flatten()], (weights / weights.sum(-1, keepdim=True)).double().flatten())
    x = torch.randn(3, 20, WIDTH)
    torch.testing.assert_close(instantiate(program)(x), wanted(model, x, total.argsort(descending=True)[:2].sort().values.tolist()))


@torch.no_grad()
def test_a_third_time_experts_are_still_called_by_their_first_names(model: Mixture, batches: list[tuple[Tensor]]) -> None:
    program = dropped(model, batches, *(DropExperts(density=density) for density in (0.84, 0.8, 0.5)))
    left = list(range(EXPERTS))
    for count in (5, 4, 2):
        total = torch.zeros(EXPERTS, dtype=torch.float64)
        for (x,) in batches:
            weights, places = model.router(x)[..., left].softmax(-1).topk(TOP, -1)
            total.index_add_(0, torch.tensor(left)[places.flatten()], (weights / weights.sum(-1, keepdim=True)).double().flatten())
        total[[e for e in range(EXPERTS) if e not in left]] = -1.0
        left = total.argsort(descending=True)[:count].sort().values.tolist()
    x = torch.randn(3, 20, WIDTH)
    torch.testing.assert_close(instantiate(program)(x), wanted(model, x, left))


class Thresholded(Mixture):
    """A second expert of little weight is none."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TOP, -1)
        y: Tensor = experts_ffn.op(x, torch.where(weights < 0.2, -1, chosen), weights, self.gate, self.up, self.down, activation="silu")
        return y


@torch.no_grad()
def test_none_stays_none(batches: list[tuple[Tensor]]) -> None:
    torch.manual_seed(0)
    model = Thresholded().eval()
    total = torch.zeros(EXPERTS, dtype=torch.float64)
    for (x,) in batches:
        weights, chosen = model.router(x).softmax(-1).topk(TOP, -1)
        total.index_add_(0, chosen[weights >= 0.2], weights[weights >= 0.2].double())
    kept, x = total.argsort(descending=True)[:3].sort().values, torch.randn(3, 20, WIDTH)
    weights, places = model.router(x)[..., kept].softmax(-1).topk(TOP, -1)
    none = weights < 0.2
    assert none.any()
    assert model.up is not None
    expected = experts_ffn.reference(x, torch.where(none, -1, places), weights, model.gate[kept], model.up[kept], model.down[kept], activation="silu")
    torch.testing.assert_close(instantiate(dropped(model, batches, DropExperts()))(x), expected)


class Computed(Mixture):
    """Gates are made anew in each call."""

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(TOP, -1)
        y: Tensor = experts_ffn.op(x, chosen, weights, self.gate * x.mean(), self.up, self.down, activation="silu")
        return y


@torch.no_grad()
def test_weights_that_are_not_stored_are_left_alone(batches: list[tuple[Tensor]]) -> None:
    torch.manual_seed(0)
    model, ctx = Computed().eval(), Context(batches=batches, density=0.5)
    program = sc.Pipeline([DropExperts()]).run(capture(model, batches[0]), ctx)
    assert "not stored" in str(ctx.misses[0])
    torch.testing.assert_close(instantiate(program)(*batches[0]), model(*batches[0]))


class Two(nn.Module):
    """Two mixtures, the second of which has a favourite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixture(), Mixture()
        self.second.router.weight.data *= 0.05
        self.second.router.bias.data = torch.tensor([9.0, 3.0, 0.0, 0.0, 0.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) + self.second(x)
        return y


@torch.no_grad()
def test_a_global_budget_takes_from_the_mixture_that_needs_fewer(batches: list[tuple[Tensor]]) -> None:
    torch.manual_seed(0)
    model = Two().eval()
    program, x = dropped(model, batches, DropExperts(budget="global")), torch.randn(3, 20, WIDTH)
    kept = [int(row.structure.split()[0]) for row in program.decisions.values() if row.structure]
    assert sum(kept) == EXPERTS
    assert kept[0] > kept[1]
    parts = (wanted(one, x, most_routed(one, batches, count)) for one, count in zip((model.first, model.second), kept, strict=True))
    torch.testing.assert_close(instantiate(program)(x), sum(parts))
    even = dropped(model, batches, DropExperts())
    assert [row.structure for row in even.decisions.values()] == ["3 of 6 experts kept"] * 2


@torch.no_grad()
def test_one_expert_is_a_dense_ffn(model: Mixture, batches: list[tuple[Tensor]]) -> None:
    program = dropped(model, batches, DropExperts(density=0.01))
    x = torch.randn(3, 20, WIDTH)
    torch.testing.assert_close(instantiate(program)(x), wanted(model, x, most_routed(model, batches, 1)))


@torch.no_grad()
def test_copies_merge_without_a_loss(model: Mixture, batches: list[tuple[Tensor]]) -> None:
    """Three experts, each there twice, one of the two with its neurons in another order."""
    order = torch.randperm(HIDDEN)
    assert model.up is not None
    for name in ("gate", "up"):
        getattr(model, name)[3:] = getattr(model, name)[:3][:, order]
    model.down[3:] = model.down[:3][:, :, order]
    model.router.weight[3:], model.router.bias[3:] = model.router.weight[:3] + 0.01, model.router.bias[:3]
    program = dropped(model, batches, DropExperts(instead="merged"))
    x = torch.randn(3, 20, WIDTH)
    torch.testing.assert_close(instantiate(program)(x), model(x))
    other = instantiate(dropped(model, batches, DropExperts()))(x)
    assert float((other - model(x)).norm()) > 0.1 * float(model(x).norm())


@torch.no_grad()
def test_the_mean_of_merged_experts_is_weighted_with_their_rows() -> None:
    gate, down = torch.randn(3, 4, 5), torch.randn(3, 2, 4)
    gate[2], down[2] = gate[0] * 1.1, down[0] * 1.1
    chosen = torch.tensor([[0], [0], [0], [2], [1]])
    seen = Observed(torch.randn(5, 5), chosen, torch.ones(5, 1), {"gate": gate, "down": down}, "relu", 0)
    kept, groups = _merge.alike(seen, torch.tensor([1.0, 0.0, 0.5]), 2)
    assert (kept.tolist(), groups.tolist()) == ([0, 1], [0, 1, 0])
    assert _merge.alike(seen, torch.tensor([0.0, 0.1, 0.5]), 2)[0].tolist() == [1, 2], "of a group the one of highest score"
    made = _merge.merged(seen, kept, groups)
    torch.testing.assert_close(made["gate"][0], gate[0] * (3 + 1.1) / 4)
    assert torch.equal(made["down"][1], down[1])
    unseen = Observed(torch.randn(1, 5), torch.tensor([[1]]), torch.ones(1, 1), seen.tensors, "relu", 0)
    torch.testing.assert_close(_merge.merged(unseen, kept, groups)["gate"][0], gate[0] * (1 + 1.1) / 2)   # that nobody chose: each counts once


@torch.no_grad()
def test_scores(model: Mixture, batches: list[tuple[Tensor]]) -> None:
    from sparsify_compiler.passes.moe.expert_scores.output import output
    from sparsify_compiler.passes.moe.expert_scores.routed import routed

    x = torch.randn(7, WIDTH)
    chosen, weights = torch.randint(0, 4, (7, TOP)), torch.rand(7, TOP)
    chosen[0, 1] = -1
    tensors = {name: tensor for name in ("gate", "up", "down") if (tensor := getattr(model, name)) is not None}
    seen = Observed(x, chosen, weights, tensors, "silu", 0)
    alone = torch.stack([(torch.nn.functional.silu(x @ model.gate[e].T) * (x @ model.up[e].T)) @ model.down[e].T  # type: ignore[index]
                         for e in range(EXPERTS)])
    for e in range(EXPERTS):
        mine = chosen == e
        assert float(routed(seen)[e]) == pytest.approx(float(weights[mine].sum()), abs=1e-5)
        lengths = (weights * alone[e].norm(dim=-1)[:, None])[mine]
        assert float(output(seen, mean=False)[e]) == pytest.approx(float(lengths.sum()), rel=1e-4, abs=1e-5)
        assert float(output(seen)[e]) == pytest.approx(float(lengths.mean()) if mine.any() else 0.0, rel=1e-4, abs=1e-5)


def test_a_global_budget_keeps_one_of_each() -> None:
    high, low = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([10.0, 0.0, 0.0, 0.0])
    assert _shared_out([high, low], 4) == [3, 1]
    assert _shared_out([high, low], 2) == [1, 1]
    assert _shared_out([high, torch.tensor([2.0, 2.0, 0.0, 0.0])], 2) == [1, 1], "though both of the second score higher"


@torch.no_grad()
def test_compiled_models_have_fewer_experts(model: Mixture, batches: list[tuple[Tensor]]) -> None:
    compiled = sc.compile(model, batches[0], recipe=sc.recipes.task_expert_pruning(), budget=sc.Budget(density=0.5), calibration=batches)
    torch.testing.assert_close(compiled(*batches[0]), wanted(model, batches[0][0], most_routed(model, batches, 3)), rtol=1e-4, atol=1e-5)
    assert [row.structure for row in compiled.report().sites if row.kind == "experts"] == ["3 of 6 experts kept"]


@torch.no_grad()
def test_a_mixture_of_the_library() -> None:
    from test_library_experts import deepseek, mixtral

    for make in (mixtral, deepseek):
        torch.manual_seed(0)
        lm = make().eval()
        prompt = torch.randint(3, 64, (2, 9))
        compiled = sc.compile(lm, {"input_ids": prompt}, recipe="merged_experts", budget=sc.Budget(density=0.5), calibration=[{"input_ids": prompt}],
                              dynamic={"input_ids": {0: "batch", 1: "tokens"}})
        assert compiled.generate(prompt, max_new_tokens=3, do_sample=False).shape == (2, 12)
        (row,) = [site for site in compiled.report().sites if site.kind == "experts"]
        assert (row.structure, row.density) == (f"{row.shape[0] // 2} of {row.shape[0]} experts kept", 0.5)


def test_bad_input(model: Mixture, batches: list[tuple[Tensor]]) -> None:
    with pytest.raises(ParseError, match="instead is one of nothing, merged"):
        DropExperts(instead="else")  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="density lies above 0"):
        DropExperts(density=0)
    program = capture(model, batches[0])
    with pytest.raises(CalibrationError, match="there are none"):
        DropExperts(density=0.5).run(program.clone(), Context())
    with pytest.raises(SelectorError):
        DropExperts(density=0.5, targets="nowhere").run(program.clone(), Context(batches=batches))
    ctx = Context(density=0.5, batches=[(torch.randn(3, 4),)])
    DropExperts().run(capture(nn.Linear(4, 4).eval(), (torch.randn(3, 4),)), ctx)
    assert "no experts" in str(ctx.misses[0])
