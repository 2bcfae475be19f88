"""Repairs: each does what its formula says, and none is worse than what it mends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler import catalog
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, ModelError, ParseError, SparsifyError, StructureError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.repairs._base import Cut, Repaired
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import Preserves, check_preserves
from sparsify_compiler.program import Program, get_tensor

REPAIRS = catalog.names("repair")
CHOOSING = [name for name in REPAIRS if __import__(catalog.get("repair", name).__module__, fromlist=["x"]).CHOOSES]
STRUCTURES = ["unstructured", "row", "fan_in", "2:4", "8x1", "VNM(v=4, n=2, m=8)", "Rows(size=2)"]
every_repair = pytest.mark.parametrize("name", REPAIRS)


def rows(count: int = 400, width: int = 32) -> Tensor:
    """Correlated inputs with a mean."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(width) + 0.15 * torch.randn(width, width, generator=generator)
    scale, mean = 0.5 + torch.rand(width, generator=generator), torch.randn(width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mix * scale + mean


def statistics(x: Tensor) -> dict[str, Tensor]:
    return {"patch_gram": x.T @ x, "patch_mean": x.mean(0), "patch_norm": x.norm(dim=0), "patch_rows": torch.tensor(len(x)), "cross": x.T @ x,
            "residual": torch.zeros(0, x.shape[1])}


def cut(structure: str = "unstructured", density: float = 0.5, x: Tensor | None = None, chosen: bool = True) -> Cut:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 32, generator=generator)
    x = rows() if x is None else x
    shape = Structure.parse(structure)
    density = shape.density or density
    mask = shape.mask(weight.abs() * x.norm(dim=0), density) if chosen else None
    return Cut(weight, mask, shape, density, statistics(x))


def mend(name: str, given: Cut) -> Repaired:
    found: Repaired = Named.parse("repair", name)(given)
    return found


def whole(found: Repaired) -> Tensor:
    """The weight that the layer computes with in effect."""
    return found.weight if found.low_rank is None else found.weight + found.low_rank[1] @ found.low_rank[0]


def error(given: Cut, weight: Tensor, x: Tensor | None = None, bias: Tensor | None = None) -> float:
    x = rows() if x is None else x
    off = x @ (weight - given.weight).T
    return float((off if bias is None else off + bias).square().sum())


@every_repair
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_repair_keeps_to_the_mask_and_is_not_worse_than_none(name: str, structure: str) -> None:
    given = cut(structure)
    if name in ("dsnot", "exchange") and structure in STRUCTURES[4:]:
        with pytest.raises(StructureError):
            mend(name, given)
        return
    before = given.weight.clone(), given.statistics["patch_gram"].clone()
    found = mend(name, given)
    assert torch.equal(found.weight * found.mask, found.weight)
    if name not in ("dsnot", "exchange"):
        assert torch.equal(found.mask, given.given_mask())
        assert error(given, whole(found), bias=found.bias) <= error(given, mend("none", given).weight) * 1.0001
    else:
        assert int(found.mask.sum()) == int(given.given_mask().sum())
        assert torch.equal(found.mask.sum(1), given.given_mask().sum(1))
        assert structure != "2:4" or bool(found.mask.view(16, -1, 4).sum(2).eq(2).all())
    assert torch.equal(before[0], given.weight)
    assert torch.equal(before[1], given.statistics["patch_gram"])


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_repair_that_chooses_keeps_to_the_structure(name: str, structure: str) -> None:
    given = cut(structure, chosen=False)
    found = mend(name, given)
    wanted = given.structure.mask(torch.rand(16, 32), given.density)
    besides = sum(part.numel() for part in found.low_rank or ())
    if not besides or given.structure.density is not None:
        assert int(found.mask.sum()) == int(wanted.sum())
    else:
        assert int(found.mask.sum()) < int(found.mask.sum()) + besides < int(wanted.sum()) + (64 if structure == "Rows(size=2)" else 16)
    if structure in ("row", "fan_in") and not besides:
        assert torch.equal(found.mask.sum(1), wanted.sum(1))
    elif structure not in ("unstructured", "Rows(size=2)"):
        again = given.structure.mask(found.mask.float() + torch.rand(16, 32) * 1e-3, float(found.mask.double().mean()))
        assert torch.equal(again, found.mask)
    if structure != "Rows(size=2)" and name != "sparse_low_rank":  # random weights have no low-rank part to find
        assert error(given, whole(found)) < error(given, mend("none", cut(structure)).weight)


def test_least_squares_is_the_exact_optimum() -> None:
    given = cut()
    found = mend("least_squares(damping=0.0)", given)
    x = rows().double()
    for n in (0, 7, 15):
        kept = given.given_mask()[n]
        best = torch.linalg.lstsq(x[:, kept], x @ given.weight[n].double()).solution
        assert torch.allclose(found.weight[n, kept].double(), best, rtol=2e-3, atol=2e-3)


def test_least_squares_with_rows_that_keep_all_or_nothing() -> None:
    given = cut()
    mask = given.given_mask().clone()
    mask[3], mask[5] = False, True
    found = mend("least_squares", Cut(given.weight, mask, given.structure, 0.5, given.statistics))
    assert not found.weight[3].any()
    assert torch.allclose(found.weight[5], given.weight[5], atol=1e-3)


def test_least_squares_follows_the_dense_output() -> None:
    """With inputs that are off, it finds the weights that bring the dense output back."""
    dense, x = rows(), rows() * 1.25
    given = cut(x=x)
    full = Cut(given.weight, torch.ones_like(given.given_mask()), given.structure, 1.0, statistics(x) | {"cross": dense.T @ x})
    assert torch.allclose(mend("least_squares(damping=0.0)", full).weight, given.weight / 1.25, atol=2e-3)


def obs_by_hand(weight: Tensor, gram: Tensor, mask: Tensor, damping: float) -> Tensor:
    """Column by column with the inverse of what is left, without factor or blocks: OBS as the formula says it."""
    weight, gram = weight.double().clone(), gram.double()
    gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(gram[i:, i:])
        gone = torch.where(mask[:, i], 0.0, weight[:, i])
        weight[:, i:] -= torch.outer(gone / inverse[0, 0], inverse[0])
    return weight * mask


@pytest.mark.parametrize("columns", [4, 12, 128])
def test_obs_is_the_formula_whatever_the_blocks(columns: int) -> None:
    given = cut()
    expected = obs_by_hand(given.weight, given.statistics["patch_gram"], given.given_mask(), 0.01)
    assert torch.allclose(mend(f"obs(columns={columns})", given).weight.double(), expected, atol=1e-3)


def test_admm_and_obs_come_near_the_optimum() -> None:
    given = cut()
    best = error(given, mend("least_squares(damping=0.0)", given).weight)
    nothing = error(given, mend("none", given).weight)
    for name in ("obs", "admm"):
        assert best <= error(given, mend(name, given).weight) < best + 0.65 * (nothing - best)


def test_bias_makes_up_for_the_mean() -> None:
    given = cut()
    found = mend("bias", given)
    assert found.bias is not None
    off = rows() @ (found.weight - given.weight).T + found.bias
    assert float(off.mean(0).abs().max()) < 1e-3 * float((rows() @ given.weight.T).abs().mean())


def test_sparse_and_low_rank_parts_are_found_again() -> None:
    """A sum of the two is split within its budget, where a mask alone of that budget is far off; inputs that are always zero do no harm."""
    generator = torch.Generator().manual_seed(2)
    sparse = torch.randn(64, 96, generator=generator) * 4 * (torch.rand(64, 96, generator=generator) < 0.08)
    weight = sparse + torch.randn(64, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    x = torch.randn(500, 96, generator=generator)
    x[:, 5] = 0
    given = Cut(weight, None, Structure.parse("unstructured"), 0.25, statistics(x))
    found = mend("sparse_low_rank(share=0.5, rounds=60)", given)
    assert found.low_rank is not None
    assert int(found.mask.sum()) + sum(part.numel() for part in found.low_rank) <= 0.25 * weight.numel() + 1
    masked = weight * given.structure.mask(weight.abs(), 0.25)
    assert error(given, whole(found), x) < 0.02 * error(given, masked, x)
    with pytest.raises(StructureError, match="share"):
        mend("sparse_low_rank(share=1.5)", given)


def test_a_layer_with_a_low_rank_part_computes_both_and_is_not_cut_again() -> None:
    model = nn.Sequential(nn.Linear(16, 32)).eval()
    recipe = MaskWeights("repair", "row", density=0.5, repair="sparse_low_rank", inputs="pruned")
    after, _, _ = run(model, recipe)
    module = after.regions[""].module
    weight, mask, reads, writes = (get_tensor(module, f"0.{name}") for name in ("weight", "weight_mask", "low_rank_reads", "low_rank_writes"))
    x = BATCHES[0][0]
    torch.testing.assert_close(instantiate(after)(x), nn.functional.linear(x, weight * mask + writes @ reads, model[0].bias))
    assert after.decisions["0"].density == pytest.approx((int(mask.sum()) + reads.numel() + writes.numel()) / weight.numel())
    ctx = Context(density=0.5)
    Pipeline((MaskWeights(),)).run(after, ctx, ())
    assert ctx.rewrites == 0
    assert sum("low-rank part of 0" in miss.why for miss in ctx.misses) == 2


def test_dsnot_lowers_the_mean_error() -> None:
    x, weight, shape = rows(2000, 256), torch.randn(16, 256, generator=torch.Generator().manual_seed(3)), Structure.parse("row")
    given = Cut(weight, shape.mask(weight.abs() * x.norm(dim=0), 0.5), shape, 0.5, statistics(x))
    mean = given.statistics["patch_mean"]
    before = ((given.weight * given.given_mask() - given.weight) @ mean).abs().sum()
    found = mend("dsnot", given)
    assert not torch.equal(found.mask, given.given_mask())
    assert float(((found.weight - given.weight) @ mean).abs().sum()) < 0.5 * float(before)
    assert torch.equal(found.weight[found.mask], given.weight[found.mask])


# --- bad Gram matrices -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in REPAIRS if name not in ("none", "bias", "dsnot", "exchange", "sparse_low_rank")])
@pytest.mark.parametrize("case", ["one row", "dead inputs", "twins", "zero", "huge", "tiny"])
def test_singular_gram_matrices_are_damped(name: str, case: str) -> None:
    x = rows()
    if case == "one row":
        x = x[:1]
    elif case == "dead inputs":
        x[:, 3:9] = 0
    elif case == "twins":
        x[:, 1::2] = x[:, ::2]
    elif case == "zero":
        x = torch.zeros_like(x)
    else:
        x = x * (1e15 if case == "huge" else 1e-15)
    given = cut(x=x)
    found = mend(name, given)
    assert bool(found.weight.isfinite().all())
    assert case not in ("dead inputs", "zero") or "zero" in found.note
    if case != "zero":
        assert error(given, found.weight, x) <= error(given, mend("none", given).weight, x) * 1.001


def test_a_gram_matrix_that_cholesky_refuses_is_damped_more_and_told() -> None:
    x = rows()[:8]
    found = mend("least_squares(damping=0.0)", cut(x=x))
    assert "singular" in found.note


def test_a_gram_matrix_that_is_not_finite_is_refused() -> None:
    given = cut()
    broken = given.statistics["patch_gram"].clone()
    broken[0, 0] = float("nan")
    for name in ("obs", "admm", "least_squares"):
        with pytest.raises(CalibrationError, match="finite"):
            mend(name, Cut(given.weight, given.mask, given.structure, 0.5, given.statistics | {"patch_gram": broken}))


# --- in the pass -----------------------------------------------------------------------------------------------------------------------


def mlp(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32, bias), nn.ReLU(), nn.Linear(32, 32, bias), nn.ReLU(), nn.Linear(32, 8, bias)).eval()


BATCHES = [(torch.randn(40, 16, generator=torch.Generator().manual_seed(i)) + 0.5,) for i in range(4)]


def run(model: nn.Module, item: MaskWeights, batches: Any = None) -> tuple[Program, Context, Program]:
    batches = BATCHES if batches is None else batches
    captured = capture(model, batches[0])
    ctx = Context(density=0.5, batches=batches)
    ctx.calibrate = lambda program, needs: calibrate(program, batches, needs, cache=False)
    return Pipeline((item,)).run(captured, ctx, ()), ctx, captured


def distance(one: Program, other: Program) -> float:
    a, b = instantiate(one), instantiate(other)
    with torch.no_grad():
        return sum(float((a(*batch) - b(*batch)).square().sum()) for batch in BATCHES)


@every_repair
@pytest.mark.parametrize("inputs", ["dense", "block", "pruned"])
def test_every_repair_in_the_pass(name: str, inputs: Any) -> None:
    model = mlp()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain, _, captured = run(model, MaskWeights("weight_times_input_norm"))
    after, ctx, _ = run(model, MaskWeights("weight_times_input_norm", repair=name, inputs=inputs))
    if name != "sparse_low_rank":  # under a given mask, its low-rank part comes on top, and the report counts it
        assert [row.density for row in after.decisions.values()] == [0.5, 0.5, 0.5]
    assert ctx.rewrites == 3
    check_preserves(captured, after, BATCHES[0], Preserves.SIGNATURE)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if name not in ("none", "dsnot"):
        assert distance(after, captured) < distance(plain, captured)


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("inputs", ["dense", "block", "pruned"])
def test_the_repair_chooses(name: str, inputs: Any) -> None:
    model = mlp()
    plain, _, captured = run(model, MaskWeights())
    after, _, _ = run(model, MaskWeights("repair", "2:4", repair=name, inputs=inputs))
    assert distance(after, captured) < distance(plain, captured)
    for region, node in after.nodes():
        if str(node.target).endswith("_mask"):
            assert get_tensor(region.module, str(node.target)).view(-1, 4).sum(1).eq(2).all()


def test_a_bias_is_made_where_there_was_none() -> None:
    model = mlp(bias=False)
    after, _, captured = run(model, MaskWeights(repair="bias"))
    assert {str(n.target) for _, n in after.nodes() if str(n.target).endswith(".bias")} == {"0.bias", "2.bias", "4.bias"}
    assert distance(after, captured) < distance(run(model, MaskWeights())[0], captured)


def test_a_bias_that_others_read_is_not_changed_for_them() -> None:
    model = mlp()
    model[2].bias = model[0].bias
    after, _, _ = run(model, MaskWeights(targets=("2",), repair="bias"))
    first, second = (n for _, n in after.nodes() if str(n.target) == "aten.linear.default" and n.meta["path"] in ("0", "2"))
    module = after.regions[""].module
    assert torch.equal(get_tensor(module, first.kwargs["bias"].target), model[0].bias)  # type: ignore[union-attr]
    assert not torch.equal(get_tensor(module, second.kwargs["bias"].target), model[0].bias)  # type: ignore[union-attr]


class Twice(nn.Module):
    """One module called twice, and an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shared, self.head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.embed(tokens)).relu()).relu())


@every_repair
@pytest.mark.parametrize("inputs", ["dense", "pruned"])
def test_shared_modules_are_repaired_once_and_tied_weights_are_left(name: str, inputs: Any) -> None:
    torch.manual_seed(0)
    tokens = [(torch.randint(0, 24, (2, 9)),) for _ in range(3)]
    after, ctx, _ = run(Twice().eval(), MaskWeights(repair=name, inputs=inputs), tokens)
    assert ctx.rewrites == 1
    assert any("tied" in miss.why for miss in ctx.misses)
    linears = [n for _, n in after.nodes() if str(n.target) == "aten.linear.default"]
    assert ("low_rank_reads" in after.text()) == (name == "sparse_low_rank")
    one, other = (node for node in linears if node.meta["path"].startswith("shared") and "low_rank" not in node.meta["path"])
    assert one.kwargs == {**other.kwargs, "input": one.kwargs["input"]}


@every_repair
def test_convolutions(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 8, 1)).eval()
    images = [(torch.rand(2, 8, 8, 8),) for _ in range(3)]
    if name == "sparse_low_rank":
        with pytest.raises(StructureError, match="linear layers only"):
            run(model, MaskWeights(targets=("conv",), repair=name, inputs="pruned"), images)
        return
    after, ctx, captured = run(model, MaskWeights(targets=("conv",), repair=name, inputs="pruned"), images)
    plain, _, _ = run(model, MaskWeights(targets=("conv",)), images)
    assert name == "none" or [miss.at for miss in ctx.misses] == ["2"]
    x = images[0]
    with torch.no_grad():
        expected = instantiate(captured)(*x)
        one, other = (float((instantiate(p)(*x) - expected).square().sum()) for p in (plain, after))
    assert name in ("none", "dsnot") or other < one


def test_zero_layers_one_sample_and_broken_activations() -> None:
    model = mlp()
    nn.init.zeros_(model[2].weight)
    after, ctx, _ = run(model, MaskWeights("repair", repair="obs", inputs="pruned"), BATCHES[:1])
    assert [miss.at for miss in ctx.misses if "zero" in miss.why][:1] == ["2"]
    model = mlp()
    model[0].weight.data[4:9] = 0
    model[0].bias.data[4:9] = -1
    one = [(BATCHES[0][0][:1],)]
    after, ctx, _ = run(model, MaskWeights("repair", repair="obs", inputs="pruned"), one)
    assert any("zero" in miss.why and miss.at == "2" for miss in ctx.misses)
    assert bool(instantiate(after)(*one[0]).isfinite().all())
    with pytest.raises(CalibrationError, match=r"0.*NaN"):
        run(mlp(), MaskWeights(repair="obs", inputs="pruned"), [(torch.full((2, 16), float("inf")),)])
    model[4].weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError):
        run(model, MaskWeights(repair="obs", inputs="pruned"))


@pytest.mark.parametrize("options", [{"repair": "obz"}, {"repair": "obs(damp=1)"}, {"score": "repair"}, {"score": "repair", "repair": "bias"},
                                     {"inputs": "x"}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(SparsifyError) as caught:
        MaskWeights(**options)
    assert isinstance(caught.value, ParseError | LookupError)


def test_layer_by_layer_needs_batches() -> None:
    captured = capture(mlp(), BATCHES[0])
    with pytest.raises(CalibrationError, match="batches"):
        Pipeline((MaskWeights(inputs="pruned"),)).run(captured, Context(density=0.5), ())


@pytest.mark.parametrize("text", ["mask_weights(score=repair, repair='obs(damping=0.1, columns=64)', inputs=block)", "mask_weights(repair=bias)"])
def test_text(text: str) -> None:
    assert Pipeline.parse(str(Pipeline.parse(text))) == Pipeline.parse(text)


@pytest.mark.parametrize("budget", ["erk", "owl", "global_threshold"])
def test_budgets_look_at_the_dense_model_before_anything_is_cut(budget: str) -> None:
    after, _, _ = run(mlp(), MaskWeights("repair", repair="obs", inputs="pruned", budget=budget))
    sizes = {"0": 16 * 32, "2": 32 * 32, "4": 32 * 8}
    kept = sum(row.density * sizes[site] for site, row in after.decisions.items())
    assert abs(kept / sum(sizes.values()) - 0.5) < 0.01


def test_the_fuel_stops_between_layers() -> None:
    captured = capture(mlp(), BATCHES[0])
    program = Pipeline((MaskWeights("repair", repair="obs", inputs="pruned"),)).run(captured, Context(density=0.5, batches=BATCHES, fuel=2), ())
    assert [row.structure for row in program.decisions.values()] == ["unstructured", "unstructured"]


def test_compile_hands_the_batches_over() -> None:
    import sparsify_compiler as sc

    compiled = sc.compile(mlp(), BATCHES[0], recipe=sc.recipes.sparsegpt("2:4"), calibration=BATCHES)
    assert [site.density for site in compiled.report().sites] == [0.5, 0.5, 0.5]
