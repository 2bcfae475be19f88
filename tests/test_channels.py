"""Dependency groups and what is taken out by them: against the same model with zeros in place of what goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, nn

from sparsify_compiler.axis import Axes
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.channel_groups import Group, find_groups
from sparsify_compiler.errors import BudgetError, ModelError, ParseError, SelectorError
from sparsify_compiler.fold import evaluate
from sparsify_compiler.instruments import Verify
from sparsify_compiler.passes.prune.drop_dead_channels import DropDeadChannels
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.passes.prune.structures.columns import Columns
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import compare_outputs, outputs
from sparsify_compiler.program import Program, set_tensor
from sparsify_compiler.why import why

Example = Any


def context(inputs: Example, density: float | None = None) -> Context:
    ctx = Context(batches=[inputs], density=density, example_inputs=inputs)
    ctx.calibrate = lambda program, needs: calibrate(program, [inputs], needs, cache=False)
    return ctx


def run(item: Any, program: Program, inputs: Example, density: float | None = None) -> tuple[Program, Context]:
    ctx = context(inputs, density)
    return Pipeline((item,)).run(program, ctx, (Verify(),)), ctx


def of_kind(program: Program, kind: str) -> list[Group]:
    return [group for group in find_groups(program).groups if group.kind == kind and group.fixed is None]


def parameters(program: Program) -> int:
    return sum(t.numel() for t in {t.data_ptr(): t for t in instantiate(program).parameters()}.values())


# --- the algebra of axes ---------------------------------------------------------------------------------------------------------------


def test_two_ways_to_split_a_dimension_share_their_atoms() -> None:
    axes = Axes()
    whole, heads, inside = axes.new(12), axes.new(3), axes.new(4)
    axes.union(whole, ((heads[0][0], inside[0][0]),), "")
    other, pairs, rest = axes.new(12), axes.new(3), axes.new(4)
    axes.union(other, ((pairs[0][0], rest[0][0]),), "")
    axes.union(whole, other, "")
    assert axes.root(heads[0][0]) == axes.root(pairs[0][0])
    mask = torch.tensor([True, False, True])
    assert axes.kept(other, {axes.root(heads[0][0]): mask}).tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert axes.units(whole, axes.root(pairs[0][0])).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_concatenation_meets_a_whole() -> None:
    axes = Axes()
    one, other, whole = axes.new(3), axes.new(5), axes.new(8)
    axes.union(one + other, whole, "")
    assert list(axes.leaves(whole)) == [axes.root(one[0][0]), axes.root(other[0][0])]
    first, second = axes.cut(whole, 3)
    assert list(axes.leaves(first)) == list(axes.leaves(one))
    assert list(axes.leaves(second)) == list(axes.leaves(other))


def test_what_cannot_be_split_alike_is_fixed_with_the_place() -> None:
    axes = Axes()
    one, other = axes.new(4) + axes.new(5), ((*axes.new(3)[0], *axes.new(3)[0]),)
    axes.union(one, other, "reshape (r)")
    assert all("reshape (r)" in axes.reasons[leaf] for axis in (one, other) for leaf in axes.leaves(axis))


def test_a_reason_reaches_all_that_is_the_same_and_its_parts() -> None:
    axes = Axes()
    a, b = axes.new(6), axes.new(6)
    axes.union(a, b, "")
    axes.fix(a, "is an output")
    parts = axes.new(2) + axes.new(4)
    axes.union(b, parts, "")
    assert [axes.reasons.get(leaf) for leaf in axes.leaves(parts)] == ["is an output"] * 2


# --- groups of real models -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "heads", "neurons"), [("bert", 4, 96), ("mpnet", 4, 96), ("gpt2", 4, 192), ("vit", 4, 96), ("llama", 3, 96)])
def test_heads_and_neurons_are_found(name: str, heads: int, neurons: int) -> None:
    program = zoo.captured(name)[2]
    assert [group.size for group in of_kind(program, "heads")] == [heads] * 2
    assert [group.size for group in of_kind(program, "neurons")] == [neurons] * 2


def test_a_head_of_grouped_queries_goes_with_its_queries() -> None:
    group = of_kind(zoo.captured("llama")[2], "heads")[0]
    rows = {member.name.split(".")[-2]: int(find_rows(member, group)) for member in group.members}
    assert rows == {"q_proj": 12, "k_proj": 4, "v_proj": 4, "o_proj": 12}


def find_rows(member: Any, group: Group) -> int:
    found = find_groups(zoo.captured("llama")[2])
    same = next(one for one in found.groups if one.path == group.path)
    axis = next(one.axis for one in same.members if (one.name, one.dim) == (member.name, member.dim))
    return int((found.found.axes.units(axis, same.atom) == 0).sum())


def test_the_stream_of_a_language_model_has_its_tied_embedding_and_all_norms() -> None:
    (stream,) = of_kind(zoo.captured("llama")[2], "stream")
    names = {member.name for member in stream.members}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"} <= names
    assert not stream.exact


def test_what_stays_says_why() -> None:
    fixed = {group.path: group.fixed for group in find_groups(zoo.captured("efficientnet_lite")[2]).groups if group.fixed}
    assert fixed["classifier"] == "is an output of the model"
    assert fixed["stem.0"] == "is an input of the model"
    cached = find_groups(zoo.captured("llama_cached")[2]).groups
    assert [group.size for group in cached if group.fixed is None] == [96, 96]
    assert any("eager Python" in str(group.fixed) for group in cached)
    assert any("same tensor" in str(group.fixed) for group in cached if group.path == "lm_head")


def test_depthwise_filters_go_with_what_is_before_and_behind() -> None:
    group = next(g for g in of_kind(zoo.captured("efficientnet_lite")[2], "filters") if g.path == "blocks.2.body")
    assert {m.name for m in group.members if m.tensor.dim() == 4} == {f"blocks.2.body.{i}.weight" for i in (0, 3, 6)}


class Fused(nn.Module):
    """Queries, keys and values from one linear, in three spellings."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling, self.qkv, self.out = spelling, nn.Linear(8, 48), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(x)
        if self.spelling == "chunk":
            q, k, v = (part.view(2, 5, 4, 4).transpose(1, 2) for part in made.chunk(3, dim=-1))
        elif self.spelling == "first":
            q, k, v = made.view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part.transpose(1, 2) for part in made.view(2, 5, 4, 12).split([4, 4, 4], dim=-1))
        y: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16))
        return y


@pytest.mark.parametrize("spelling", ["chunk", "first", "inside"])
def test_heads_of_a_fused_projection(spelling: str) -> None:
    torch.manual_seed(0)
    model, inputs = Fused(spelling).eval(), (torch.randn(2, 5, 8),)
    program = capture(model, inputs)
    (heads,) = of_kind(program, "heads")
    assert heads.size == 4
    removed, _ = run(RemoveChannels("magnitude", density=0.5, targets=("heads",)), program, inputs)
    assert {name: tuple(t.shape) for name, t in instantiate(removed).named_parameters()} == {
        "qkv.weight": (24, 8), "qkv.bias": (24,), "out.weight": (8, 8), "out.bias": (8,)}


# --- what is taken out is what zeros would be ------------------------------------------------------------------------------------------


def with_zeros(program: Program, keep: Callable[[Group], Tensor]) -> Program:
    """The Program with zero columns wherever units go are read."""
    program = program.clone()
    groups = find_groups(program)
    for group in groups.groups:
        if group.fixed is None and group.exact:
            for member in group.members:
                for op in member.reads:
                    source: Any = op.kwargs["weight"]
                    units = groups.found.axes.units(groups.found.values[source][1], group.atom)
                    stays = torch.cat([keep(group), torch.ones(1, dtype=torch.bool)])[units]
                    weight = evaluate(member.region, source).clone()
                    weight[:, ~stays] = 0
                    while source.op != "get_attr":
                        source, weight = source.kwargs["self"], weight.t()
                    set_tensor(member.region.module, str(source.target), nn.Parameter(weight))
    return program


@pytest.mark.parametrize("name", ["bert", "mpnet", "llama", "gpt2", "vit", "efficientnet_lite", "repvgg", "mixer", "whisper", "llama_cached"])
def test_dead_channels_are_dropped_and_the_outputs_stay(name: str) -> None:
    _, inputs, program = zoo.captured(name)

    def keep(group: Group) -> Tensor:
        return torch.arange(group.size) % 3 != 1

    zeros = with_zeros(program, keep)
    dropped, ctx = run(DropDeadChannels(), zeros, inputs)
    assert ctx.rewrites > 0
    assert parameters(dropped) < parameters(zeros)
    compare_outputs(outputs(zeros, inputs)[:1], outputs(dropped, inputs)[:1])  # behind it there may be a cache
    _, ctx = run(DropDeadChannels(), dropped, inputs)
    assert ctx.rewrites == 0


def test_a_mask_over_whole_columns_becomes_a_smaller_model() -> None:
    _, inputs, program = zoo.captured("llama")
    masked, _ = run(MaskWeights("weight_times_input_norm", Columns(), density=0.5, targets=("ffn:down",)), program, inputs)
    dropped, _ = run(DropDeadChannels(), masked, inputs)
    compare_outputs(outputs(masked, inputs), outputs(dropped, inputs))
    assert "weight_mask" in masked.text()
    assert "weight_mask" not in dropped.text()
    assert {tuple(t.shape) for name, t in instantiate(dropped).named_parameters() if "mlp" in name} == {(48, 36), (36, 48)}


@pytest.mark.parametrize("name", ["bert", "llama", "efficientnet_lite"])
def test_everything_that_can_shrink_shrinks_and_saves(name: str, tmp_path: Any) -> None:
    from sparsify_compiler.artefact import load
    from sparsify_compiler.compiled import CompiledModel
    from sparsify_compiler.target import host

    _, inputs, program = zoo.captured(name)
    kinds = ("heads", "copies", "head_dim", "neurons", "filters", "stream")
    removed, _ = run(RemoveChannels("magnitude", density=0.5, targets=kinds), program, inputs)
    assert parameters(removed) < 0.6 * parameters(program)
    CompiledModel(removed, host()).save(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    with torch.no_grad():
        expected, found = (torch.utils._pytree.tree_leaves(m(**inputs)) for m in (instantiate(removed), loaded))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_repair_is_no_worse_than_none_on_its_data() -> None:
    _, inputs, program = zoo.captured("bert")
    dense = outputs(program, inputs)[0]
    error = {}
    for repair in ("none", "bias", "least_squares"):
        removed, _ = run(RemoveChannels(density=0.5, repair=repair, inputs="pruned"), program, inputs)
        error[repair] = float((outputs(removed, inputs)[0] - dense).norm())
    assert error["least_squares"] < error["bias"] < error["none"]


def test_the_width_is_a_multiple_where_there_is_that_much() -> None:
    _, inputs, program = zoo.captured("bert")
    removed, _ = run(RemoveChannels("magnitude", density=0.7, multiple=16), program, inputs)
    widths = {name: t.shape[0] for name, t in instantiate(removed).named_parameters()}
    assert widths["encoder.layer.0.intermediate.dense.weight"] == 64
    assert widths["encoder.layer.0.attention.self.query.weight"] == 48, "4 heads of 12: only all four are a multiple of 16"


def test_heads_and_neurons_share_one_threshold() -> None:
    _, inputs, program = zoo.captured("bert")
    removed, _ = run(RemoveChannels("magnitude", "global_threshold", density=0.6), program, inputs)
    rows = [d for d in removed.decisions.values() if d.reason.startswith("smaller and dense")]
    assert rows
    assert all(d.bytes is not None and d.dense_bytes is not None and d.bytes < d.dense_bytes for d in rows)


def test_position_biases_of_heads_are_cut_for_each_layer() -> None:
    _, inputs, program = zoo.captured("mpnet")
    removed, _ = run(RemoveChannels("random", density=0.5, targets=("heads",)), program, inputs)
    assert removed.text().count("aten.index_select") == 2
    assert all(bool(o.isfinite().all()) for o in outputs(removed, inputs))


# --- bad input -------------------------------------------------------------------------------------------------------------------------


def two_linears() -> tuple[Program, Example]:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)).eval(), (torch.randn(3, 6),)
    return capture(model, inputs), inputs


def test_a_density_that_leaves_nothing_is_refused() -> None:
    program, inputs = two_linears()
    with pytest.raises(BudgetError, match="leaves none of its 4 neurons"):
        run(RemoveChannels("magnitude", density=0.1), program, inputs)
    with pytest.raises(BudgetError, match="no density"):
        run(RemoveChannels("magnitude"), program, inputs)
    with pytest.raises(BudgetError):
        RemoveChannels(density=0.0)


def test_a_model_without_such_groups_is_refused_with_the_reasons() -> None:
    model, inputs = nn.Linear(4, 4).eval(), (torch.randn(2, 4),)
    with pytest.raises(ModelError, match="is an input of the model"):
        run(RemoveChannels("magnitude", density=0.5), capture(model, inputs), inputs)
    program, inputs = two_linears()
    with pytest.raises(ModelError, match="kind heads"):
        run(RemoveChannels("magnitude", density=0.5, targets=("heads",)), program, inputs)
    with pytest.raises(SelectorError):
        run(RemoveChannels("magnitude", density=0.5, targets=("encoder.*",)), program, inputs)


def test_options_are_checked() -> None:
    for wrong in ({"sides": "both"}, {"inputs": "sparse"}, {"multiple": 0}):
        with pytest.raises(ParseError):
            RemoveChannels(**wrong)  # type: ignore[arg-type]


def test_a_shared_module_shrinks_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + self.down(torch.relu(self.up(x)))
            return x

    torch.manual_seed(0)
    inputs = (torch.randn(2, 4),)
    program = capture(Twice().eval(), inputs)
    removed, _ = run(RemoveChannels(density=0.5, repair="least_squares", inputs="dense"), program, inputs)
    assert parameters(removed) == 4 * 4 + 4 + 4 * 4 + 4


def test_weights_that_are_no_floats_stay_and_say_so() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            self.register_buffer("stored", torch.randint(-8, 8, (8, 4), dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(torch.relu(nn.functional.linear(x, self.stored.to(torch.float32) * 0.1) + self.up(x)))
            return y

    inputs = (torch.randn(2, 4),)
    program = capture(Quantised().eval(), inputs)
    with pytest.raises(ModelError, match="int8"):
        run(RemoveChannels("magnitude", density=0.5), program, inputs)


def test_why_tells_what_stays() -> None:
    _, inputs, program = zoo.captured("bert")
    told = {miss.at: miss.why for miss in why(RemoveChannels("magnitude", density=0.5), program, inputs)}
    assert told["pooler.dense"] == "its 48 neurons stay: is an output of the model"


def test_nan_is_refused() -> None:
    program, inputs = two_linears()
    program.regions[""].module.get_submodule("2").weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        run(RemoveChannels("magnitude", density=0.5), program, inputs)
