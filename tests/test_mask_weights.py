"""mask_weights and pack: masks where they should be, reasons where they are not, and values that packing does not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler import recipes
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import BudgetError, CalibrationError, ModelError, ParseError, SelectorError, StructureError, UnknownNameError
from sparsify_compiler.passes.lower.pack import Pack, smallest
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.prune.structures.block import Block
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.passes_api import Context, Miss, Pass
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import Preserves, check_preserves
from sparsify_compiler.program import Program, Stage, get_tensor


class Ones:
    """Statistics that are all one, and remember who asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get(self, site: str, statistic: str) -> Tensor:
        self.asked.append(site)
        return torch.ones(16)


def run(model: nn.Module, x: Any, *passes: Pass, **context: Any) -> tuple[Program, Context, Program]:
    """(Program after the passes, context, Program before)."""
    example = x if isinstance(x, tuple) else (x,)
    captured = capture(model.eval(), example)
    ctx = Context(**{"density": 0.5, **context})
    return Pipeline(passes).run(captured, ctx, ()), ctx, captured


def mlp(*sizes: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for one, two in pairwise(sizes):
        layers += [nn.Linear(one, two), nn.ReLU()]
    return nn.Sequential(*layers)


def masks(program: Program) -> dict[str, Tensor]:
    return {str(n.target): get_tensor(r.module, str(n.target)) for r, n in program.nodes() if n.op == "get_attr" and str(n.target).endswith("_mask")}


def test_masks_and_decisions() -> None:
    model, x = mlp(16, 32, 8), torch.randn(3, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    program, ctx, captured = run(model, x, MaskWeights(structure=Unstructured("row")))
    assert program.stage is Stage.SPARSE
    found = masks(program)
    assert list(found) == ["0.weight_mask", "2.weight_mask"]
    for name, mask in found.items():
        weight = before[name.removesuffix("_mask")]
        assert mask.sum(1).eq(weight.shape[1] / 2).all()
        assert weight.abs()[mask].mean() > weight.abs()[~mask].mean()
    row = program.decisions["0"]
    assert (row.kind, row.shape, row.dtype, row.structure, row.density, row.budget) == ("linear", (32, 16), "float32", "row", 0.5, 0.5)
    assert row.dense_bytes == 32 * 16 * 4
    made = [n for _, n in program.nodes() if n.meta.get("by") == "mask_weights"]
    assert len(made) == 4
    assert all("val" in n.meta and n.meta["path"] in ("0", "2") for n in made)
    assert ctx.rewrites == 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    expected = instantiate(captured)(x)
    assert instantiate(program)(x).shape == expected.shape


@pytest.mark.parametrize("structure", ["unstructured", "row", "fan_in", "2:4", "16x1", "3x2", "1x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_keeps_values_and_zeros(structure: str, dtype: torch.dtype) -> None:
    model, x = mlp(16, 33, 8).to(dtype), torch.randn(3, 16).to(dtype)
    if structure in ("2:4", "3x2"):
        model = mlp(16, 32, 8).to(dtype)
    sparse, _, _ = run(model, x, MaskWeights(structure=structure))
    packed = Pipeline((Pack(),)).run(sparse, Context(), ())
    assert packed.stage is Stage.PACKED
    assert Pipeline((Pack(),)).run(packed, Context(), ()).text() == packed.text()
    check_preserves(sparse, packed, (x,), Preserves.VALUES)
    ops = [n for _, n in packed.nodes() if str(n.target).startswith("sparsify.")]
    assert len(ops) == 2
    assert not masks(packed)
    for node in ops:
        row = packed.decisions[node.meta["site"]]
        assert str(node.target) == f"sparsify.linear_{row.format}.default"
        assert not node.args
        names = {n.target.rpartition(".")[0] for n in node.all_input_nodes if n.op == "get_attr" and "packed" in n.target}
        assert names == {f"{row.site}.weight_packed"}
        assert row.bytes is not None
    assert {str(n.target).rpartition(".")[2] for _, n in packed.nodes() if n.op == "get_attr"}.isdisjoint({"weight"})


def test_the_smallest_format_that_fits() -> None:
    for structure, density, name in ((NM(2, 4), 0.5, "nm"), (Block(16, 1), 0.5, "bsr"), (Unstructured("row"), 0.5, "bitmap"),
                                     (Unstructured("row"), 0.04, "condensed"), (Unstructured(), 0.5, "bitmap"), (Unstructured(), 0.01, "csr")):
        weight = torch.randn(32, 512 if density < 0.1 else 32)
        mask = structure.mask(weight.abs(), density)
        assert smallest(weight, mask, str(structure)).name() == name
        assert smallest(weight, mask, "unknown").name() == name
    assert smallest(weight, Unstructured().mask(weight.abs(), 0.3), "2:4").name() == "bitmap"


@pytest.mark.parametrize("structure", ["2:4", "16x1", "fan_in"])
@pytest.mark.parametrize("told", [True, False])
def test_a_kept_weight_that_is_zero_by_chance_costs_no_structure(structure: str, told: bool) -> None:
    shape, density = Structure.parse(structure), 0.04 if structure == "fan_in" else 0.5   # bits are smaller than columns above
    weight = torch.randn(64, 512)
    full = shape.mask(torch.rand(64, 512), density)
    kept = full.nonzero()[torch.randperm(int(full.sum()))[:3]]
    mask = full.index_put(tuple(kept.T), torch.tensor(False))     # as weight != 0 would say
    form = smallest(weight, mask, structure if told else "unknown")
    assert form.name() == {"2:4": "nm", "16x1": "bsr", "fan_in": "condensed"}[structure]
    assert int(form.mask().sum()) == int(full.sum())
    assert bool(form.mask()[mask].all())
    assert torch.equal(form.decode(), weight * mask)              # what lay there under the mask does not come back
    many = full & (torch.rand(64, 512) < 0.9)
    assert torch.equal(smallest(weight, many, structure if told else "unknown").mask(), many)   # more than a few are no holes


class TwoUses(nn.Module):
    """One layer called twice, an embedding tied to the head, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.shared = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.conv = nn.Conv1d(16, 16, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.shared(self.shared(x).relu()).relu()
        return self.head(self.conv(x.transpose(1, 2)).transpose(1, 2))


def test_tied_weights_are_left_alone_and_shared_ones_pruned_once() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 20, (2, 5))
    statistics = Ones()
    program, ctx, _ = run(TwoUses(), tokens, MaskWeights("weight_times_input_norm"), statistics=statistics)
    assert list(masks(program)) == ["shared.weight_mask"]
    assert statistics.asked == ["shared", "shared@1"]
    assert any(m.at == "head" and "tied" in m.why and "embedding" in m.why for m in ctx.misses)
    assert "tied" in program.decisions["head"].reason
    assert program.decisions["shared@1"].dense_bytes is None
    assert "not selected" in program.decisions["conv"].reason
    packed = Pipeline((Pack(),)).run(program, Context(), ())
    check_preserves(program, packed, (tokens,), Preserves.VALUES)
    assert [packed.decisions[s].format for s in ("shared", "shared@1")] == ["bitmap", "bitmap"]
    assert packed.decisions["shared@1"].bytes == 0


class EagerEmbedding(nn.Module):
    """The embedding stays eager Python (control flow on data), the tied head is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 20, bias=False))
        self.head[1].weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = nn.functional.embedding(tokens, self.embedding.weight)
        return self.head(x if float(x.sum()) != 0 else x + 1)


def test_weights_tied_to_eager_parts_are_left_alone() -> None:
    program, ctx, _ = run(EagerEmbedding(), torch.randint(0, 20, (2, 5)), MaskWeights())
    assert program.skeleton is not None
    assert list(masks(program)) == ["0.weight_mask"]
    assert any(m.at == "head.1" and "tied: embedding.weight" in m.why for m in ctx.misses)


def test_a_shared_weight_is_not_pruned_when_one_of_its_sites_is_ignored() -> None:
    program, ctx, _ = run(TwoUses(), torch.randint(0, 20, (2, 5)), MaskWeights(ignore=("shared@1",)))
    assert not masks(program)
    assert any(m.at == "shared" and "tied" in m.why for m in ctx.misses)


def test_convolutions_are_masked_and_packed() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 4, 1)), torch.randn(1, 8, 6, 6)
    program, _, _ = run(model, x, MaskWeights(targets="conv", structure="2:4"))
    assert [m.view(m.shape[0], -1, 4).sum(-1).eq(2).all() for m in masks(program).values()] == [True, True]
    packed = Pipeline((Pack(),)).run(program, Context(), ())
    check_preserves(program, packed, (x,), Preserves.VALUES)
    assert not masks(packed)
    assert [row.format for row in packed.decisions.values()] == ["nm", "nm"]
    default, _, _ = run(model, x, MaskWeights())
    assert not masks(default)


def test_targets_and_ignore() -> None:
    model, x = mlp(16, 16, 16, 16), torch.randn(2, 16)
    assert list(masks(run(model, x, MaskWeights(ignore=("2",)))[0])) == ["0.weight_mask", "4.weight_mask"]
    assert list(masks(run(model, x, MaskWeights(targets=("re:[02]",)))[0])) == ["0.weight_mask", "2.weight_mask"]
    assert list(masks(run(model, x, MaskWeights(targets="Linear", ignore="4"))[0])) == ["0.weight_mask", "2.weight_mask"]
    with pytest.raises(SelectorError):
        run(model, x, MaskWeights(targets=("nowhere",)))


def test_a_model_without_linear_layers_is_a_miss() -> None:
    program, ctx, _ = run(nn.ReLU(), torch.randn(2, 3), MaskWeights())
    assert not masks(program)
    assert "no linear" in ctx.misses[0].why


@pytest.mark.parametrize("make", [lambda: MaskWeights(), lambda: MaskWeights(budget="erk"), lambda: MaskWeights("random")])
def test_the_second_run_changes_nothing(make: Callable[[], Pass]) -> None:
    model, x = mlp(16, 32, 8), torch.randn(2, 16)
    once, _, _ = run(model, x, make())
    twice = Pipeline((make(),)).run(once, Context(density=0.5), ())
    assert once.text() == twice.text()
    assert all(torch.equal(masks(once)[k], v) for k, v in masks(twice).items())
    assert once.decisions == twice.decisions


def test_erk_meets_the_total_and_dense_layers_say_why() -> None:
    program, _, _ = run(mlp(16, 256, 4), torch.randn(2, 16), MaskWeights(budget="erk", density=0.6))
    kept = sum(int(m.sum()) for m in masks(program).values()) + 256 * 4 * ("2.weight_mask" not in masks(program))
    assert abs(kept / (16 * 256 + 256 * 4) - 0.6) < 1e-3
    with pytest.raises(StructureError, match=r"keeps 0\.5"):
        run(mlp(16, 256, 4), torch.randn(2, 16), MaskWeights(budget="erk", structure="2:4"))


def test_random_depends_on_the_seed_only() -> None:
    model, x = mlp(16, 16, 16), torch.randn(2, 16)
    same = [masks(run(model, x, MaskWeights("random", seed=3), seed=i)[0])["0.weight_mask"] for i in (0, 1)]
    assert torch.equal(*same)
    other = masks(run(model, x, MaskWeights("random"), seed=4)[0])
    assert not torch.equal(other["0.weight_mask"], same[0])
    assert not torch.equal(other["0.weight_mask"], other["2.weight_mask"])


def test_density_comes_from_the_pass_the_budget_or_the_structure() -> None:
    model, x = mlp(16, 16), torch.randn(2, 16)
    assert run(model, x, MaskWeights(density=0.25))[0].decisions["0"].density == 0.25
    assert run(model, x, MaskWeights(structure="2:4"), density=None)[0].decisions["0"].density == 0.5
    assert MaskWeights(structure="1:4").own_density() == 0.25
    assert MaskWeights().own_density() is None
    with pytest.raises(BudgetError):
        run(model, x, MaskWeights(), density=None)
    with pytest.raises(StructureError, match=r"keeps 0\.5"):
        run(model, x, MaskWeights(structure="2:4"), density=0.3)
    program, ctx, _ = run(model, x, MaskWeights(), density=1.0)
    assert not masks(program)
    assert "density 1" in ctx.misses[0].why


def test_layers_that_do_not_divide() -> None:
    model, x = mlp(16, 18, 8), torch.randn(2, 16)
    with pytest.raises(StructureError, match="2, 2:4: 18 inputs do not divide into groups of 4"):
        run(model, x, MaskWeights(structure="2:4"))
    program, ctx, _ = run(model, x, MaskWeights(structure="2:4", on_misfit="skip"))
    assert list(masks(program)) == ["0.weight_mask"]
    assert ctx.misses == [Miss("18 inputs do not divide into groups of 4", "2")]
    assert "do not divide" in program.decisions["2"].reason


def test_zero_and_broken_weights() -> None:
    model, x = mlp(16, 16, 16), torch.randn(2, 16)
    nn.init.zeros_(model[0].weight)
    program, ctx, _ = run(model, x, MaskWeights())
    assert list(masks(program)) == ["2.weight_mask"]
    assert ctx.misses == [Miss("every weight is zero", "0")]
    captured = capture(model.eval(), (x,))
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        Pipeline((MaskWeights(),)).run(captured, Context(density=0.5), ())


@pytest.mark.parametrize(("options", "error"), [
    ({"score": "magnitud"}, UnknownNameError), ({"budget": "urk"}, UnknownNameError), ({"structure": "2;4"}, ParseError),
    ({"density": 0.0}, BudgetError), ({"density": 1.01}, BudgetError), ({"on_misfit": "pad"}, ParseError),
])
def test_wrong_options(options: Mapping[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        MaskWeights(**options)


def test_wanda_without_calibration_is_refused() -> None:
    with pytest.raises(CalibrationError):
        run(mlp(16, 16), torch.randn(2, 16), *recipes.wanda().passes)


@pytest.mark.parametrize("text", [
    "mask_weights()", "mask_weights(structure='2:4')", "mask_weights(structure=NM(n=2, m=4), targets=('re:a|b', linear), seed=3)",
    "mask_weights(score=random, structure=Block(rows=16, columns=1), budget=erk, density=0.25, on_misfit=skip)", "pack()", "wanda(structure='2:4')",
])
def test_text_and_yaml_round_trip(text: str) -> None:
    pipeline = Pipeline.parse(text)
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline


def test_recipes() -> None:
    assert recipes.wanda() == Pipeline((MaskWeights("weight_times_input_norm", Unstructured("row")),))
    assert recipes.wanda("2:4", ignore=("head",)) == Pipeline((MaskWeights("weight_times_input_norm", NM(2, 4), ignore=("head",)),))
    assert recipes.magnitude(density=0.3) == Pipeline((MaskWeights(density=0.3),))


class OwnMask(nn.Module):
    """A model that brings its own mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(mask.shape))
        self.register_buffer("weight_mask", mask)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.weight * self.weight_mask
        return nn.functional.linear(x, weight), weight


def test_masks_that_a_model_brings_are_packed_and_other_uses_get_the_product() -> None:
    x = torch.randn(2, 8)
    model = OwnMask(torch.arange(8).expand(6, 8) % 4 < 2)
    captured = capture(model.eval(), (x,))
    packed = Pipeline((Pack(),)).run(captured, Context(), ())
    check_preserves(captured, packed, (x,), Preserves.VALUES)
    assert [str(n.target) for _, n in packed.nodes() if str(n.target).startswith("sparsify")] == ["sparsify.linear_nm.default"]
    assert torch.equal(instantiate(packed)(x)[1], model.weight * model.weight_mask)


def test_masks_of_torch_nn_utils_prune() -> None:
    from torch.nn.utils import prune

    model, x = mlp(16, 32, 8), torch.randn(2, 16)
    prune.l1_unstructured(model[0], "weight", 0.5)
    captured = capture(model.eval(), (x,))
    packed = Pipeline((Pack(),)).run(captured, Context(), ())
    check_preserves(captured, packed, (x,), Preserves.VALUES)
    row = packed.decisions["0"]
    assert (row.format, row.density, row.structure) == ("bitmap", 0.5, "unknown")


def test_ffn_and_attention_stand_for_their_members() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down, self.head = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x + self.down(nn.functional.gelu(self.up(self.norm(x))))))

    x = torch.randn(2, 3, 16)
    assert set(masks(run(Block(), x, MaskWeights(targets=("ffn",)))[0])) == {"up.weight_mask", "down.weight_mask"}
    assert set(masks(run(Block(), x, MaskWeights(ignore=("ffn",)))[0])) == {"head.weight_mask"}
    with pytest.raises(SelectorError):
        run(Block(), x, MaskWeights(targets=("attention",)))


def test_kept_zeros_stay_kept() -> None:
    x = torch.randn(2, 16)
    model = mlp(16, 8)
    with torch.no_grad():
        model[0].weight[:, 3] = 0.0
    sparse, _, _ = run(model, x, MaskWeights("random"))
    kept = masks(sparse)["0.weight_mask"]
    packed = Pipeline((Pack(),)).run(sparse, Context(), ())
    node = next(n for _, n in packed.nodes() if str(n.target).startswith("sparsify"))
    values = get_tensor(packed.regions[""].module, node.kwargs["values"].target)  # type: ignore[union-attr]
    assert values.numel() == int(kept.sum())


def test_fuel_stops_in_the_middle() -> None:
    program, _, _ = run(mlp(16, 16, 16), torch.randn(2, 16), MaskWeights(), fuel=1)
    assert list(masks(program)) == ["0.weight_mask"]
    packed = Pipeline((Pack(),)).run(program, Context(fuel=0), ())
    assert masks(packed)


def test_inference_mode() -> None:
    model = mlp(16, 16)
    with torch.inference_mode():
        program, _, _ = run(model, torch.randn(2, 16), MaskWeights(), Pack())
        assert instantiate(program)(torch.randn(2, 16)).shape == (2, 16)


@pytest.mark.parametrize("how", [{"score": "weight_times_input_norm"}, {"score": "weight_times_input_norm", "budget": "owl"},
                                 {"score": "repair", "repair": "obs", "budget": "global_threshold"}],
                         ids=["what the pass needs", "what its budget needs", "what is asked for beyond"])
def test_what_a_pass_of_the_same_kind_cut_just_before_is_not_seen_in_statistics_of_the_dense_model(how: dict[str, Any]) -> None:
    """A plan's second structure is a second pass; what stands between two passes otherwise is a model of its own."""
    x = torch.randn(40, 16)
    first = MaskWeights("magnitude", density=0.1, targets=("0",))
    second = MaskWeights(**how, density=0.4, ignore=("0",))
    model = mlp(16, 32, 24, 8)

    def found(*passes: Pass) -> dict[str, Tensor]:
        captured = capture(model.eval(), (x,))
        ctx = Context(batches=[(x,)])
        ctx.calibrate = lambda program, needs: calibrate(program, [(x,)], needs, cache=False)
        after = Pipeline(passes).run(captured, ctx, ())
        assert ctx.uncut is None
        return {name: mask for name, mask in masks(after).items() if not name.startswith("0.")}

    alone, together, apart = found(second), found(first, second), found(first, FoldBatchnorm(), second)
    assert set(alone) == {"2.weight_mask", "4.weight_mask"}
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert not all(torch.equal(alone[name], apart[name]) for name in alone)
