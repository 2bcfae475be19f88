"""Matching, asking, splicing, folding; and the reason when nothing happened."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, layer_norm, linear, relu

from sparsify_compiler.capture import capture
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.fold import fold_all
from sparsify_compiler.instruments import SameNumbers, Verify
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.passes.reparam.merge_conv_branches import MergeConvBranches
from sparsify_compiler.passes_api import Context, Miss, Pass
from sparsify_compiler.pattern import trace
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program, Stage, get_tensor, prune_unused, set_tensor
from sparsify_compiler.rule import Match, Rule, RulePass
from sparsify_compiler.verify import verify
from sparsify_compiler.why import why

aten = torch.ops.aten


def using(*rules: Rule) -> Pass:
    class Using(RulePass):
        def rules(self) -> tuple[Rule, ...]:
            return rules

    return Using()


def run(item: Pass, program: Program, ctx: Context | None = None) -> tuple[Program, list[str]]:
    """The Program afterwards, its numbers checked, and the misses as text."""
    ctx = ctx or Context()
    after = Pipeline((item,)).run(program, ctx, [SameNumbers(), Verify()])
    return after, [str(miss) for miss in ctx.misses]


def ops(program: Program) -> list[str]:
    return [str(n.target).split(".")[1] for _, n in program.nodes() if n.op == "call_function"]


def captured(function: Any, *inputs: Tensor, dynamic: Any = None, **tensors: Tensor) -> Program:
    """A function of inputs and named parameters as a Program."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in tensors.items():
                if isinstance(tensor, nn.Parameter) or tensor.is_floating_point():
                    setattr(self, name, nn.Parameter(tensor))
                else:
                    self.register_buffer(name, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, *(getattr(self, name) for name in tensors))

    torch.manual_seed(0)
    return capture(Model().eval(), inputs or (torch.randn(3, 4),), dynamic)


class ScaleIntoLinear(Rule):
    params = ("w", "s")

    @staticmethod
    def pattern(x, w, b, s):
        return linear(x, w, b) * s

    def check(self, m: Match) -> Miss | None:
        return None if m.s.ndim == 1 else Miss(f"needs a vector, got {tuple(m.s.shape)}")

    @staticmethod
    def rewrite(x, w, b, s):
        return linear(x, w * s[:, None], None if b is None else b * s)


W, B, S = torch.randn(5, 4), torch.randn(5), torch.randn(5)


def test_optional_operands_bind_to_none() -> None:
    bare = captured(lambda x, w, s: linear(x, w) * s, w=W, s=S)
    with_bias = captured(lambda x, w, b, s: linear(x, w, b) * s, w=W, b=B, s=S)
    for program in (bare, with_bias):
        after, misses = run(using(ScaleIntoLinear()), program)
        assert ops(after) == ["linear"]
        assert not misses


def test_commutative_ops_match_in_both_orders() -> None:
    after, _ = run(using(ScaleIntoLinear()), captured(lambda x, w, s: s * linear(x, w), w=W, s=S))
    assert ops(after) == ["linear"]


def test_check_may_reject_one_order_and_accept_the_other() -> None:
    class First(Rule):
        @staticmethod
        def pattern(x, w, v):
            return linear(x, w) + linear(x, v)

        def check(self, m: Match) -> Miss | None:
            return None if float(m.w[0, 0]) == 1 else Miss("w does not start with 1")

        @staticmethod
        def rewrite(x, w, v):
            return linear(x, w - v) + linear(x, v + v)

    def two(first: float, second: float) -> Program:
        return captured(lambda x, w, v: linear(x, w) + linear(x, v), w=torch.full((5, 4), first), v=torch.full((5, 4), second))

    for program in (two(1.0, 2.0), two(2.0, 1.0)):
        ctx = Context(fuel=1)
        _, misses = run(using(First()), program, ctx)
        assert ctx.rewrites == 1
        assert not misses
    _, misses = run(using(First()), two(3.0, 2.0))
    assert misses == ["at add: w does not start with 1"]


def test_a_repeated_variable_is_one_value() -> None:
    class Both(Rule):
        @staticmethod
        def pattern(x, w, v):
            return linear(x, w) + linear(x, v)

        @staticmethod
        def rewrite(x, w, v):
            return linear(x, w + v)

    after, _ = run(using(Both()), captured(lambda x, w, v: linear(x, w) + linear(x, v), w=W, v=W + 1))
    assert ops(after) == ["linear"]
    after, misses = run(using(Both()), captured(lambda x, w, v: linear(x, w) + linear(x * 2, v), w=W, v=W + 1))
    assert "linear" in ops(after)
    assert len(misses) == 1
    assert "expected the same x" in misses[0]


class NormWithEps(Rule):
    """Literals are equal, attributes bind, what is not written must be the default."""

    @staticmethod
    def pattern(x, w, b, eps):
        return relu(layer_norm(x, (4,), w, b, eps))

    @staticmethod
    def rewrite(x, w, b, eps):
        assert eps == 0.25
        return layer_norm(x, (4,), w, b, eps).clamp(min=0)


def test_attributes_bind_to_variables_and_literals_must_be_equal() -> None:
    after, _ = run(using(NormWithEps()), captured(lambda x, w: relu(layer_norm(x, (4,), w, None, 0.25)), w=S[:4]))
    assert ops(after) == ["layer_norm", "clamp"]
    _, misses = run(using(NormWithEps()), captured(lambda x, w: relu(layer_norm(x, (3, 4), w, None, 0.25)), w=torch.randn(3, 4)))
    assert misses == ["at layer_norm: expected normalized_shape=(4,), found (3, 4)"]


def test_what_the_pattern_does_not_write_has_its_default() -> None:
    class Plain(Rule):
        @staticmethod
        def pattern(x, w):
            return relu(conv2d(x, w, padding=1))

        @staticmethod
        def rewrite(x, w):
            return conv2d(x, w, padding=1).clamp(min=0)

    image, w = torch.randn(1, 4, 6, 6), torch.randn(2, 4, 3, 3)
    assert ops(run(using(Plain()), captured(lambda x, w: relu(conv2d(x, w, None, 1, 1)), image, w=w))[0]) == ["conv2d", "clamp"]
    assert ops(run(using(Plain()), captured(lambda x, w: relu(conv2d(x, w, None, (1, 1), (1, 1))), image, w=w))[0]) == ["conv2d", "clamp"]
    _, misses = run(using(Plain()), captured(lambda x, w: relu(conv2d(x, w, None, 2, 1)), image, w=w))
    assert misses == ["at conv2d: expected the default stride, found [2, 2]"]
    _, misses = run(using(Plain()), captured(lambda x, w: relu(conv2d(x, w, None, 1, 0)), image, w=w))
    assert misses == ["at conv2d: expected padding=(1, 1), found (0, 0)"]
    _, misses = run(using(Plain()), captured(lambda x, w, b: relu(conv2d(x, w, b, 1, 1)), image, w=w, b=torch.randn(2)))
    assert misses == ["at conv2d: expected the default bias, found b"]


def test_an_intermediate_value_used_elsewhere_is_a_miss() -> None:
    def function(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        y = linear(x, w)
        return y * s + relu(y)

    after, misses = run(using(ScaleIntoLinear()), captured(function, w=W, s=S))
    assert misses == ["at mul: the intermediate value linear is also used by relu"]
    assert "mul" in ops(after)


def test_parameters_must_be_parameters() -> None:
    _, misses = run(using(ScaleIntoLinear()), captured(lambda x, w: linear(x, w) * linear(x + 1, w).sum(0), w=W))
    assert misses == ["at mul: s must be a parameter, it is sum (sum_1)"]


def test_nearest_misses() -> None:
    _, misses = run(using(ScaleIntoLinear()), captured(lambda x, s: relu(x) * s, s=S[:4]))
    assert misses == ["there is no linear in the graph"]
    _, misses = run(using(ScaleIntoLinear()), captured(lambda x, w, s: linear(x, w, s), w=W, s=S))
    assert misses == ["there is no mul in the graph"]
    _, misses = run(using(ScaleIntoLinear()), captured(lambda x, w, s: linear(relu(x) * s, w), w=W, s=S[:4]))
    assert misses == ["at relu: expected linear, found relu"]
    _, misses = run(using(ScaleIntoLinear()), captured(lambda x, w, s: linear(x, w) * s, w=W, s=S[None]))
    assert misses == ["at mul: needs a vector, got (1, 5)"]


def test_why_takes_a_model_and_tells_of_a_norm_behind_a_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()).eval()
    told = why("fold_batchnorm", model, (torch.randn(1, 3, 6, 6),))
    assert [str(miss) for miss in told] == ["at relu: expected conv2d, found relu"]
    assert [str(m) for m in why(FoldBatchnorm(), nn.Linear(3, 3).eval(), (torch.randn(1, 3),))] == ["there is no batch_norm in the graph"]


def test_new_nodes_say_who_made_them_and_where_they_belong() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    after, _ = run(FoldBatchnorm(), capture(model, (torch.randn(1, 3, 6, 6),)))
    made = {n.name: (n.meta["by"], n.meta["path"]) for _, n in after.nodes() if n.meta.get("by") == "fold_batchnorm"}
    assert set(made.values()) == {("fold_batchnorm", "0")}, "the conv keeps its place in the model"
    assert sorted(after.regions[""].module.state_dict()) == ["0.bias_folded", "0.weight_folded"]
    assert all(p.requires_grad for p in after.regions[""].module.parameters())


def test_originals_and_other_users_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + relu(self.conv(x + 1))

    model = Tied().eval()
    nn.init.uniform_(model.norm.running_var, 1, 2)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    program = capture(model, (torch.randn(1, 3, 6, 6),))
    after, _ = run(FoldBatchnorm(), program)
    assert {"conv.weight", "conv.weight_folded"} <= set(after.regions[""].module.state_dict())
    assert get_tensor(after.regions[""].module, "conv.weight") is model.conv.weight
    assert all(torch.equal(kept[k], v) for k, v in model.state_dict().items())


def test_a_module_called_twice_gets_two_folded_weights() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.conv(x)) * self.two(self.conv(x + 1))

    model = Twice().eval()
    nn.init.uniform_(model.one.running_var, 1, 2)
    after, _ = run(FoldBatchnorm(), capture(model, (torch.randn(1, 3, 6, 6),)))
    assert {"conv.weight_folded", "conv.weight_folded_2"} <= set(after.regions[""].module.state_dict())


def test_fold_computes_in_float64_and_rounds_once() -> None:
    torch.manual_seed(0)
    w, s, t = (torch.randn(64, 64).bfloat16() for _ in range(3))

    class Product(Rule):
        params = ("w", "s", "t")

        @staticmethod
        def pattern(x, w, s, t):
            return linear(linear(linear(x, w), s), t)

        @staticmethod
        def rewrite(x, w, s, t):
            return linear(x, t @ s @ w)

    program = captured(lambda x, w, s, t: linear(linear(linear(x, w), s), t), torch.randn(2, 64).bfloat16(), w=w, s=s, t=t)
    after = Pipeline((using(Product()),)).run(program, None, ())
    (folded,) = after.regions[""].module.parameters()
    exact = (t.double() @ s.double() @ w.double()).bfloat16()
    assert folded.dtype == torch.bfloat16
    assert torch.equal(folded, exact)
    assert not torch.equal(folded, t @ s @ w), "or this test could not fail"


class ConcatenatesMask(Rule):
    params = ("w",)

    @staticmethod
    def pattern(x, w):
        return relu(linear(x, w))

    @staticmethod
    def rewrite(x, w):
        return linear(x, torch.cat([w, w]))[..., : w.shape[0]].clamp(min=0)


def masked(function: Any, **tensors: Tensor) -> Program:
    """Multiplies the parameter w by a bool buffer w_mask, as mask_weights does."""
    program = captured(function, **tensors)
    region = program.regions[""]
    weight = region.node("w")
    set_tensor(region.module, "w_mask", tensors["w"] > 0)
    with region.graph.inserting_after(weight):
        mask = region.graph.get_attr("w_mask")
    with region.graph.inserting_after(mask):
        product = region.graph.call_function(aten.mul.Tensor, (), {"self": weight, "other": mask})
    mask.meta, product.meta = {"val": fake_like(tensors["w"] > 0, mode_of(region))}, {"val": weight.meta["val"]}
    weight.replace_all_uses_with(product, delete_user_cb=lambda user: user is not product)
    program.stage = Stage.SPARSE
    region.module.recompile()
    verify(program)
    return program


def test_masks_are_kept_where_the_result_has_them() -> None:
    after, misses = run(using(ScaleIntoLinear()), masked(lambda x, w, s: linear(x, w) * s, w=W, s=S))
    assert ops(after) == ["mul", "linear"]
    assert not misses
    state = after.regions[""].module.state_dict()
    name = next(k for k in state if k.endswith("_folded"))
    assert torch.equal(state[f"{name}_mask"], W > 0)
    assert torch.allclose(state[name], W * (W > 0) * S[:, None])


def test_a_rewrite_that_would_dissolve_a_mask_is_refused() -> None:
    program = masked(lambda x, w: relu(linear(x, w)), w=W)
    after, misses = run(using(ConcatenatesMask()), program)
    assert misses == ["at relu: would dissolve the mask w_mask"]
    assert after.text() == program.text()
    after, _ = run(using(ConcatenatesMask()), captured(lambda x, w: relu(linear(x, w)), w=W))
    assert "clamp" in ops(after), "without the mask it is accepted"


def test_fold_all_leaves_masks_and_random_values() -> None:
    program = masked(lambda x, w, s: linear(x, w, s * 2), w=W, s=S)
    region = program.regions[""]
    before = region.module(torch.ones(3, 4))[0]
    double = next(n for n in region.graph.nodes if n.kwargs.get("other") == 2)
    with region.graph.inserting_before(double):
        noise = region.graph.call_function(aten.rand_like.default, (), {"self": double.kwargs["self"]})
    noise.meta = dict(double.meta)
    region.node("linear").kwargs = {**region.node("linear").kwargs, "bias": noise}
    assert fold_all(region) == 0
    region.node("linear").kwargs = {**region.node("linear").kwargs, "bias": double}
    region.graph.erase_node(noise)
    assert fold_all(region) == 1
    prune_unused(region)
    assert ops(program) == ["mul", "linear"]
    assert torch.equal(region.module(torch.ones(3, 4))[0], before)


def test_fixed_point_merges_any_number_of_branches() -> None:
    tensors = {f"w{i}": torch.randn(2, 3, k, k) for i, k in enumerate((1, 3, 5, 3))}

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        first, *others = (conv2d(x, w, padding=w.shape[-1] // 2) for w in weights)
        return sum(others, first)

    after, misses = run(MergeConvBranches(), captured(function, torch.randn(1, 3, 8, 8), **tensors))
    assert ops(after) == ["conv2d"]
    assert not misses


def test_rules_that_undo_each_other_are_stopped() -> None:
    class There(Rule):
        @staticmethod
        def pattern(x):
            return relu(x)

        @staticmethod
        def rewrite(x):
            return x.clamp(min=0)

    class Back(Rule):
        @staticmethod
        def pattern(x):
            return torch.clamp(x, min=0)

        @staticmethod
        def rewrite(x):
            return relu(x)

    with pytest.raises(SparsifyError, match="one undoes the other"):
        run(using(There(), Back()), captured(lambda x: relu(x)))


def test_fuel_stops_after_so_many_rewrites() -> None:
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))]).eval()
    program = capture(model, (torch.randn(1, 3, 4, 4),))
    for fuel in (0, 1, 3, 9):
        ctx = Context(fuel=fuel)
        after, _ = run(FoldBatchnorm(), program, ctx)
        assert ctx.rewrites == min(fuel, 4)
        assert ops(after).count("batch_norm") == 4 - min(fuel, 4)


def test_dynamic_sizes_stay_dynamic() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2)).eval()
    program = capture(model, (torch.randn(2, 3, 6, 6),), {"input": {0: "batch", 2: "rows"}})
    after, _ = run(FoldBatchnorm(), program)
    assert ops(after)[0] == "conv2d"
    for size in ((1, 3, 9, 6), (5, 3, 4, 6)):
        x = torch.randn(size)
        assert torch.allclose(after.regions[""].module(x)[0], model(x), atol=1e-5)


def test_a_long_graph_needs_no_deep_recursion() -> None:
    def function(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        for _ in range(1500):
            x = x + 1
        return linear(x, w) * s

    after, _ = run(using(ScaleIntoLinear()), captured(function, w=W, s=S))
    assert "mul" not in ops(after)


@pytest.mark.parametrize(("rewrite", "wrong"), [
    (lambda x: x.sum(0), r"must keep shape and dtype: torch.float32 \[3, 4\] became torch.float32 \[4\]"),
    (lambda x: x.double(), "must keep shape and dtype"),
    (lambda x: x @ x, r"the rewrite of Bad failed with \w+: .*"),
    (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), "has a tensor of its own"),
    (lambda x: (x, x), "returns one tensor"),
])
def test_a_bad_rewrite_names_its_rule_or_node(rewrite: Any, wrong: str) -> None:
    class Bad(Rule):
        @staticmethod
        def pattern(x):
            return relu(x)

    Bad.rewrite = staticmethod(rewrite)
    with pytest.raises(SparsifyError, match=wrong) as caught:
        run(using(Bad()), captured(lambda x: relu(x)))
    assert "node relu" in str(caught.value)


def test_a_rewrite_may_return_what_it_was_given() -> None:
    class Twice(Rule):
        @staticmethod
        def pattern(x):
            return relu(relu(x))

        @staticmethod
        def rewrite(x):
            return relu(x)

    class Nothing(Rule):
        @staticmethod
        def pattern(x):
            return torch.neg(torch.neg(x))

        @staticmethod
        def rewrite(x):
            return x

    after, _ = run(using(Twice(), Nothing()), captured(lambda x: torch.neg(torch.neg(relu(relu(relu(x))))) + 1))
    assert ops(after) == ["relu", "add"]


@pytest.mark.parametrize(("pattern", "function", "expected"), [
    (lambda x: x.view(-1, 2), lambda x: torch.reshape(x, (-1, 2)), "reshape"),
    (lambda x: torch.concat([x, x]), lambda x: torch.cat((x, x)), "cat"),
    (lambda x: x * torch.sigmoid(x), torch.nn.functional.silu, "silu"),
    (lambda x: 1 - x, lambda x: 1 - x, "rsub"),
    (lambda x: x / 2.0, lambda x: torch.divide(x, 2.0), "div"),
    (lambda x: torch.nn.functional.softmax(x, -1), lambda x: x.softmax(-1), "softmax"),
])
def test_patterns_are_brought_to_normal_form(pattern: Any, function: Any, expected: str) -> None:
    class Found(Rule):
        rewrite = staticmethod(lambda x: function(x).contiguous().neg())

    Found.pattern = staticmethod(pattern)
    program = captured(function)
    assert ops(program) == [expected]
    ctx = Context(fuel=1)
    Pipeline((using(Found()),)).run(program, ctx, ())
    assert ctx.rewrites == 1


def test_a_product_with_a_parameter_is_a_linear() -> None:
    class Found(Rule):
        params = ("w", "b")

        @staticmethod
        def pattern(x, w, b):
            return relu(x @ w.T + b) if b is None else relu(torch.addmm(b, x, w.T))

        @staticmethod
        def rewrite(x, w, b):
            return linear(x, w, b).clamp(min=0)

    after, _ = run(using(Found()), captured(lambda x, w, b: relu(linear(x, w, b)), w=W, b=B))
    assert ops(after) == ["linear", "clamp"]


def test_patterns_are_read_once_and_refused_when_they_are_none() -> None:
    pattern = trace(lambda x, w: linear(x, w) * 2)
    assert [call.op for call in pattern.calls] == ["linear", "mul"]
    assert pattern.variables == ("x", "w")
    with pytest.raises(SparsifyError, match="returns the value of one op"):
        trace(lambda x: x)
    with pytest.raises(SparsifyError, match="is not an op of aten"):
        trace(lambda x: torch.nn.functional.feature_alpha_dropout(x).no_such_method())


def test_the_engine_is_deterministic() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    program = capture(model, (torch.randn(1, 3, 6, 6),))
    assert run(FoldBatchnorm(), program)[0].text() == run(FoldBatchnorm(), program)[0].text()


def test_batch_norm_with_the_statistics_of_the_batch_is_not_folded() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return batch_norm(conv2d(x, w), None, None, training=True)

    _, misses = run(FoldBatchnorm(), captured(function, torch.randn(2, 3, 6, 6), w=torch.randn(4, 3, 1, 1)))
    assert len(misses) == 1
    assert "training" in misses[0]
