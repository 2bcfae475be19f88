"""FFNs divided into experts: with all of them it is the dense FFN, whatever divides it; and what routers, selectors and repairs promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models.language import llama
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import BudgetError, CalibrationError, InputError, ParseError, UnknownNameError
from sparsify_compiler.named import Named
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.moe._balance import balanced, table_of
from sparsify_compiler.passes.moe._evidence import Evidence, Ffn
from sparsify_compiler.passes.moe.split_experts import SplitExperts
from sparsify_compiler.passes.train.penalise_routing import PenaliseRouting
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program
from sparsify_compiler.sites import find_sites

PARTITIONS = [name for name in catalog.names("partition") if name not in ("copies", "slices")]  # of which each neuron is in one expert
ROUTERS, SELECTORS, REPAIRS = catalog.names("router"), catalog.names("expert selector"), ("none", "mean")


class Net(nn.Module):
    """An FFN in front of a linear, so that there is a gradient by its neurons: plain, gated, or gated with one linear for gate and up."""

    def __init__(self, kind: str, width: int, hidden: int, bias: bool, activation: str = "silu") -> None:
        super().__init__()
        self.kind, self.activation = kind, activation
        self.up = nn.Linear(width, 2 * hidden if kind.startswith("fused") else hidden, bias)
        self.gate = nn.Linear(width, hidden, bias) if kind == "gated" else None
        self.down = nn.Linear(hidden, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        act, up = getattr(nn.functional, self.activation), self.up(x)
        if self.kind == "plain":
            y: Tensor = self.down(act(up))
        elif self.gate is not None:
            y = self.down(act(self.gate(x)) * up)
        else:
            first, second = up.chunk(2, -1)
            y = self.down(act(first) * second if self.kind == "fused" else first * act(second))
        return y


def rewritten(model: nn.Module, inputs: Any, dynamic: Any = None, **options: Any) -> tuple[Program, nn.Module, Context]:
    ctx = Context(batches=[inputs])
    program = Pipeline((SplitExperts(**options),)).run(capture(model, inputs, dynamic), ctx)
    return program, instantiate(program), ctx


def ops(program: Program) -> list[Any]:
    return [node for _, node in program.nodes() if node.target is experts_ffn.op]


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.sampled_from(["plain", "gated", "fused", "fused, gate second"]), st.booleans(), st.sampled_from(["silu", "relu", "gelu", "sigmoid"]),
       st.integers(3, 37), st.integers(1, 7), st.sampled_from([0.0, 0.1, 0.25, 0.6]), st.sampled_from(PARTITIONS), st.sampled_from(ROUTERS),
       st.sampled_from(SELECTORS), st.sampled_from(REPAIRS), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_all_experts_together_are_the_dense_ffn(kind: str, bias: bool, activation: str, hidden: int, experts: int, shared: float, partition: str,
                                                router: str, selector: str, repair: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model, x = Net(kind, 6, hidden, bias, activation).eval().to(dtype), torch.randn(2, 9, 6, dtype=dtype)
    program, module, ctx = rewritten(model, (x,), experts=experts, shared=shared, partition=partition, router=router, selector=selector,
                                     repair=repair, density=1.0)
    if hidden - round(shared * hidden) < experts:
        assert not ops(program)
        assert "make no" in ctx.misses[0].why
        return
    (op,), row = ops(program), next(iter(program.decisions.values()))
    assert row.density == pytest.approx(1)
    assert op.kwargs["gate"].meta["val"].shape[0] == experts
    with torch.no_grad():
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5 if dtype is torch.float32 else 1e-6)


@pytest.mark.parametrize("partition", catalog.names("partition"))
def test_a_partition_names_every_neuron(partition: str) -> None:
    torch.manual_seed(0)
    ffn = Ffn(torch.randn(23, 5), torch.randn(5, 23), "silu", torch.randn(23, 5))
    x = torch.randn(40, 5)
    evidence = Evidence(ffn, x, ffn.hidden(x), torch.randn(40, 23))
    neurons = torch.tensor([n for n in range(23) if n % 5])
    table = Named.parse("partition", partition.replace("slices", "slices(width=0.5)"))(evidence, neurons, 4)
    assert table.dtype is torch.int64
    assert table.shape[0] == 4
    assert set(table.flatten().tolist()) - {-1} == set(neurons.tolist())
    if partition in PARTITIONS:
        assert table.shape[1] == 5
        assert int((table >= 0).sum()) == len(neurons)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 3), st.integers(0, 99))
def test_balanced_is_balanced_and_near_the_best(rows: int, experts: int, levels: int, seed: int) -> None:
    from scipy.optimize import linear_sum_assignment

    experts = min(experts, rows)
    cost = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))
    cost = cost if levels == 0 else (cost * (levels - 1)).round()  # ties, and all alike
    assigned, size = balanced(cost, experts), -(-rows // experts)
    assert int(torch.bincount(assigned, minlength=experts).max()) <= size
    wide = cost.repeat_interleave(size, 1)
    best = float(wide[linear_sum_assignment(wide.numpy())].sum())
    spread = float(cost.max() - cost.min())
    assert float(cost.gather(1, assigned[:, None]).sum()) <= best + 0.15 * spread * rows + 1e-5
    assert table_of(torch.arange(rows), assigned, experts).ge(0).sum() == rows


def clustered() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An FFN of four experts, each of which reads its own part of x, and rows that are in one part only."""
    torch.manual_seed(0)
    model = Net("gated", 16, 32, False).eval()
    part = torch.arange(32) % 4
    for linear in (model.up, model.gate):
        assert linear is not None
        linear.weight.data = (1 + torch.rand(32, 16)) * (part[:, None] == torch.arange(16) // 4)
    x = (1 + torch.rand(256, 16)) * (torch.arange(256)[:, None] % 4 == torch.arange(16) // 4)
    return model, (x,)


@pytest.mark.parametrize("partition", ["balanced_kmeans", "activity_kmeans(share=0.25)", "coactivation_graph(share=0.25)"])
def test_experts_that_are_there_are_found(partition: str) -> None:
    model, inputs = clustered()
    program, module, _ = rewritten(model, inputs, experts=4, shared=0.0, partition=partition, router="oracle", density=0.25)
    with torch.no_grad():
        torch.testing.assert_close(module(*inputs), model(*inputs), atol=1e-5, rtol=1e-4)
    assert next(iter(program.decisions.values())).density == pytest.approx(0.25)


@pytest.mark.parametrize("router", ["mlp(epochs=40)", "representative"])
def test_routers_find_the_expert_of_a_row(router: str) -> None:
    model, inputs = clustered()
    _, module, _ = rewritten(model, inputs, experts=4, shared=0.0, partition="balanced_kmeans", router=router, density=0.25, repair="none")
    with torch.no_grad():
        right = (module(*inputs) - model(*inputs)).norm(dim=1) < 1e-4
    assert float(right.float().mean()) > 0.8  # a quarter by chance


def test_a_linear_router_beats_a_random_one_and_loses_to_the_oracle() -> None:
    torch.manual_seed(0)
    model, x = Net("gated", 16, 96, True).eval(), torch.randn(400, 16)

    def error(router: str) -> float:
        module = rewritten(model, (x,), experts=8, shared=0.0, router=router, density=0.5, repair="none")[1]
        with torch.no_grad():
            return float((module(x) - model(x)).norm())

    found = {router: error(router) for router in ("oracle", "ridge", "logistic", "random")}
    assert found["oracle"] < min(found["ridge"], found["logistic"])
    assert max(found["ridge"], found["logistic"]) < found["random"]


def test_repairs_lower_the_error_in_their_order() -> None:
    torch.manual_seed(0)
    model, x = Net("gated", 16, 64, True).eval(), torch.randn(600, 16) + 0.5

    def error(repair: str) -> float:
        module = rewritten(model, (x,), experts=8, density=0.5, repair=repair)[1]
        with torch.no_grad():
            return float((module(x) - model(x)).norm())

    assert error("least_squares") < error("mean") < error("none")


@pytest.mark.parametrize(("selector", "density"), [("top_k", 0.5), ("top_p", 0.5), ("threshold", 0.375), ("expert_choice", 0.75)])
def test_a_selector_meets_the_density(selector: str, density: float) -> None:
    torch.manual_seed(0)
    model, x = Net("gated", 16, 64, False).eval(), torch.randn(1, 200, 16)
    program, _, _ = rewritten(model, (x,), experts=16, shared=0.25, selector=selector, density=density)
    row = next(iter(program.decisions.values()))
    assert row.density == pytest.approx(density, abs=0.02)
    assert row.budget == density


def test_top_p_takes_more_experts_for_rows_that_are_undecided() -> None:
    select = Named.parse("expert selector", "top_p")
    scores = torch.tensor([[9.0, 0, 0, 0], [0.0, 0, 0, 0]])
    assert (select(scores, 0.9) >= 0).sum(1).tolist() == [1, 4]


def test_rows_may_run_through_no_expert() -> None:
    select = Named.parse("expert selector", "threshold")
    assert (select(torch.zeros(3, 4), 0.5) == -1).all()


def test_expert_choice_gives_every_expert_as_many_rows() -> None:
    torch.manual_seed(0)
    chosen = Named.parse("expert selector", "expert_choice")(torch.randn(2, 12, 5), 0.25)
    assert all((chosen[text] == expert).sum() == 3 for text in range(2) for expert in range(5))


@pytest.mark.parametrize("weight", ["normalised", "softmax", "score"])
def test_copies_begin_as_the_dense_ffn_where_weights_sum_up_to_one(weight: str) -> None:
    torch.manual_seed(0)
    model, x = Net("plain", 8, 24, True, "gelu").eval(), torch.randn(5, 8)
    _, module, _ = rewritten(model, (x,), experts=4, shared=0.0, partition="copies", router="random", selector="top_k(k=2)", weight=weight,
                             repair="none")
    with torch.no_grad():
        same = torch.allclose(module(x), model(x), atol=1e-5)
    assert same == (weight == "normalised")


def test_everything_trains() -> None:
    torch.manual_seed(0)
    model, x = Net("gated", 8, 32, True).eval(), torch.randn(20, 8)
    module, _ = sc.attach(model, (x,), SplitExperts(experts=4, weight="scaled", density=0.5), calibration=[(x,)])
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    before = {name: value.clone() for name, value in module.named_parameters()}
    for _ in range(2):  # the first step opens the scale, through which the router learns in the second
        optimizer.zero_grad()
        (module(x) - model(x).detach() * 2).square().sum().backward()
        optimizer.step()
    still = {name for name, value in module.named_parameters() if torch.equal(value, before[name])}
    assert not still, f"did not train: {still}"
    assert any("router" in name for name in before)


def test_a_language_model_generates_with_experts() -> None:
    lm = llama()
    ids = {"input_ids": torch.randint(1, 96, (2, 12))}
    dynamic = {"input_ids": {0: "batch", 1: "tokens"}}
    dense = sc.compile(lm, ids, recipe=Pipeline((SplitExperts(experts=4, density=1.0),)), calibration=[ids], dynamic=dynamic)
    assert torch.equal(dense.generate(**ids, max_new_tokens=5), lm.generate(**ids, max_new_tokens=5))


@pytest.mark.parametrize("router", ["oracle", "mlp", "ridge"])
def test_shapes_stay_dynamic(router: str) -> None:
    torch.manual_seed(0)
    model, x = Net("gated", 8, 32, True).eval(), torch.randn(2, 6, 8)
    _, module, _ = rewritten(model, (x,), {"x": {0: "batch", 1: "tokens"}}, experts=4, router=router, selector="expert_choice", density=1.0)
    other = torch.randn(3, 4, 8)
    with torch.no_grad():
        torch.testing.assert_close(module(other), model(other), atol=1e-5, rtol=1e-4)


def test_what_is_divided_stays_divided_and_experts_are_seen() -> None:
    torch.manual_seed(0)
    model, x = Net("gated", 8, 32, True).eval(), torch.randn(20, 8)
    program, _, _ = rewritten(model, (x,), experts=4, density=0.5)
    (moe,) = find_sites(program, ("moe",))
    assert moe.facts["experts"] == 4
    ctx = Context(batches=[(x,)])
    again = Pipeline((SplitExperts(experts=4, density=0.5),)).run(program, ctx)
    assert again.text() == program.text()
    assert "shared expert" in ctx.misses[0].why


@pytest.mark.parametrize(("options", "error"), [
    ({"experts": 0}, ParseError), ({"shared": 1.0}, ParseError), ({"density": 0.0}, BudgetError), ({"router": "rigde"}, UnknownNameError),
    ({"selector": "top_k(n=3)"}, ParseError), ({"criterion": "size"}, ParseError), ({"partition": "metis"}, UnknownNameError)])
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        SplitExperts(**options)


def test_without_data_only_what_needs_none() -> None:
    model, x = Net("gated", 8, 32, True).eval(), torch.randn(20, 8)
    program = capture(model, (x,))
    with pytest.raises(CalibrationError):
        Pipeline((SplitExperts(density=0.5),)).run(program, Context())
    with pytest.raises(BudgetError):
        Pipeline((SplitExperts(),)).run(program, Context(batches=[(x,)]))
    free = SplitExperts(8, "contiguous", "random", "top_k(k=3)", 0.25, "weight_norm", repair="none")
    after = Pipeline((free,)).run(program, Context())
    assert next(iter(after.decisions.values())).density == pytest.approx(0.25 + 0.75 * 3 / 8)
    assert free.own_density() == pytest.approx(0.25 + 0.75 * 3 / 8)


def test_masked_weights_are_left_alone() -> None:
    torch.manual_seed(0)
    model, x = Net("plain", 8, 32, True).eval(), torch.randn(20, 8)
    masked = Pipeline.parse("mask_weights(score=magnitude, density=0.5)").run(capture(model, (x,)), Context(batches=[(x,)]))
    ctx = Context(batches=[(x,)])
    assert not ops(Pipeline((SplitExperts(density=0.5),)).run(masked, ctx))
    assert "masked" in ctx.misses[0].why


# --- in training -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", catalog.names("router loss"))
def test_a_loss_of_the_router_falls_when_it_is_followed(loss: str) -> None:
    torch.manual_seed(0)
    model, x = Net("gated", 8, 32, True).eval(), torch.randn(2, 21, 8)
    pipeline = SplitExperts(4, router="random", density=0.5, weight="scaled") | PenaliseRouting(loss, 1.0)
    module, hook = sc.attach(model, (x,), pipeline, calibration=[(x,)])
    optimizer = torch.optim.Adam([value for name, value in module.named_parameters() if "router" in name], 0.05)
    found = []
    for _ in range(12):
        module(x)
        found.append(hook.loss())
        optimizer.zero_grad()
        found[-1].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        hook.step()
    assert all(bool(term.isfinite()) for term in found)
    assert found[-1].item() < found[0].item()


def test_losses_of_the_router_are_their_formulas() -> None:
    load, chunk = (catalog.get("router loss", name) for name in ("load_balance", "chunk_sparsity"))
    even = torch.zeros(8, 4)
    assert float(load(even, torch.arange(8)[:, None] % 4)) == pytest.approx(1)
    assert float(load(torch.tensor([[50.0, 0, 0, 0]]).expand(8, 4), torch.zeros(8, 1, dtype=torch.int64))) == pytest.approx(4)
    one = torch.eye(4)[torch.zeros(8, dtype=torch.int64)]
    each = torch.eye(4)[torch.arange(8) % 4]
    assert float(chunk(one, one, chunk=4)) == pytest.approx(0.25, abs=1e-4)
    assert float(chunk(each, each, chunk=4)) == pytest.approx(1, abs=1e-4)
    assert float(chunk(each, each, chunk=1)) == pytest.approx(0.25, abs=1e-4)


def test_the_number_of_experts_grows_to_the_dense_ffn() -> None:
    torch.manual_seed(0)
    model, x = Net("plain", 8, 32, True).eval(), torch.randn(6, 8)
    module, hook = sc.attach(model, (x,), sc.recipes.smoe_dropout(4, 1, 3))
    with torch.no_grad():
        errors = []
        for _ in range(4):
            errors.append(float((module(x) - model(x)).norm()))
            hook.step()
    assert errors[0] > errors[1] > errors[3]
    assert errors[3] < 1e-5


def test_training_passes_say_why_they_do_nothing() -> None:
    model, x = Net("plain", 8, 32, True).eval(), torch.randn(6, 8)
    for text, why in (("penalise_routing()", "no experts"), ("split_experts(density=0.5) | schedule_experts()", "growing_k")):
        ctx = Context(batches=[(x,)])
        Pipeline.parse(text).run(capture(model, (x,)), ctx)
        assert any(why in miss.why for miss in ctx.misses)


def test_upcycled_models_are_mixtral(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    from sparsify_compiler.library_experts_save import to_mixtral

    lm = llama()
    ids = {"input_ids": torch.randint(1, 96, (2, 7))}
    module, _ = sc.attach(lm, ids, sc.recipes.sparse_upcycling(4, 2))
    with torch.no_grad():
        for value in module.parameters():
            value += 0.02 * torch.randn_like(value)  # as training would: copies differ
        to_mixtral(module, lm.config, 2).save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert type(loaded).__name__ == "MixtralForCausalLM"
        torch.testing.assert_close(loaded(**ids).logits, module(**ids).logits, atol=1e-4, rtol=1e-3)
    for top_k in (0, 5):
        with pytest.raises(InputError, match="between 1 and the 4 experts"):
            to_mixtral(module, lm.config, top_k)
    module.add_module("beside", nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"no place for \['beside\.bias'"):
        to_mixtral(module, lm.config, 2)
    other, _ = sc.attach(lm, ids, SplitExperts(4, density=0.5), calibration=[ids])
    with pytest.raises(InputError, match="Mixtral has no place"):
        to_mixtral(other, lm.config, 2)


@pytest.mark.parametrize(("kind", "bias"), [("plain", True), ("gated", False), ("fused", True), ("fused, gate second", False)])
@torch.no_grad()
def test_where_the_dense_ffn_is_faster_it_is_back(kind: str, bias: bool) -> None:
    """A margin of almost all makes any mixture too slow: what is compiled is the model that was given."""
    torch.manual_seed(0)
    model, x = Net(kind, 16, 96, bias, "silu").eval(), torch.randn(2, 40, 16)
    pipeline = Pipeline.parse("split_experts(experts=4, repair='least_squares', weight='scaled') | pack() | lower(margin=0.999, rounds=3)")
    compiled = sc.compile(model, (x,), recipe=pipeline, budget=sc.Budget(density=0.5), calibration=[(x,)], dynamic={"x": {1: "rows"}})
    assert not ops(compiled.program)
    torch.testing.assert_close(compiled(x), model(x))
    row = next(row for row in compiled.report().sites if row.kind == "ffn")
    assert (row.density, row.format) == (1.0, "dense")
    assert "stays dense: with router and shared expert" in row.reason
    if not kind.startswith("fused"):
        assert dict(compiled.state_dict()).keys() == dict(model.state_dict()).keys()


@torch.no_grad()
def test_a_mixture_is_timed_with_what_is_around_it() -> None:
    from sparsify_compiler.codegen import runtime
    from sparsify_compiler.passes.lower import _experts
    from sparsify_compiler.target import host

    torch.manual_seed(0)
    model, x = Net("gated", 32, 192, False, "silu").eval(), torch.randn(1, 40, 32)
    given = capture(model, (x,), {"x": {1: "rows"}})
    ctx = Context(batches=[(x,)], density=0.5, target=host(), kernels=runtime, example_inputs=(x,))
    program = Pipeline((SplitExperts(4, repair="none"),)).run(given, ctx)
    (region, node), = ((region, node) for region, node in program.nodes() if node.target is experts_ffn.op)
    made = _experts.layer(region, node, program, ctx)
    assert "dense eager" in made.whole
    assert {f"{name}, many rows" for name in made.forms} <= set(made.runs)
    for name in made.forms:
        many = made.runs[f"{name}, many rows"]
        assert many().reshape(40, 32).shape == (40, 32)  # type: ignore[attr-defined]
    whole = {name: made.runs[f"{name}, many rows"]().reshape(40, 32) for name in made.forms}  # type: ignore[attr-defined]
    split = [whole[name] for name in made.forms if name not in made.whole]
    for one in split[1:]:
        torch.testing.assert_close(one, split[0], rtol=1e-4, atol=1e-5)
    assert float((whole["dense eager"] - split[0]).norm()) > 0
