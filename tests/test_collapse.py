"""The general collapse: random linear DAGs, its algebra against torch, borders, costs, reasons, masks, and the named rules as its cases."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify_compiler import catalog
from sparsify_compiler.capture import capture
from sparsify_compiler.cost import total
from sparsify_compiler.passes.reparam._affine import add, conv, identity, scale, select, stack
from sparsify_compiler.passes.reparam._compose import compose
from sparsify_compiler.passes.reparam._lattice import Inexact, Lattice
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pattern import op_name
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import check_preserves
from sparsify_compiler.program import Program

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
calm = settings(deadline=None, derandomize=True)


def lived_in(model: nn.Module) -> nn.Module:
    """In float64 and eval mode, norms with statistics that hide no error."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2)
    return model.double().eval()


def collapsed(model: nn.Module, x: Tensor, dynamic: Any = None) -> tuple[Program, Program, list[str]]:
    """The Program before and after, checked for the same values, and the reasons for what was left alone."""
    before, ctx = capture(model, (x,), dynamic), Context(example_inputs=(x,))
    after = Pipeline.parse("collapse()").run(before, ctx)
    check_preserves(before, after, (x,), "values")
    return before, after, [str(miss) for miss in ctx.misses]


def ops(program: Program) -> Counter[str]:
    return Counter(op_name(node) for _, node in program.nodes() if node.op == "call_function")


def cost(program: Program) -> Any:
    return total(node for _, node in program.nodes() if node.op == "call_function")


# --- random networks -------------------------------------------------------------------------------------------------------------------


class RandomDag(nn.Module):
    """Ops that each read earlier values of one input, drawn by a seed; all values that nothing reads are joined before the ReLU."""

    def __init__(self, seed: int, rank: int, channels: int, size: int, count: int) -> None:
        super().__init__()
        self.rng, self.rank, self.layers, self.steps = random.Random(seed), rank, nn.ModuleList(), []
        shapes = [(channels, (size,) * rank)]
        while len(shapes) < count + 1:
            step = self._draw(shapes)
            if step is not None:
                self.steps.append(step)
                with torch.no_grad():
                    values = [torch.zeros(1, c, *s) for c, s in shapes]
                    y = self._run(step, values)
                    shapes.append((y.shape[1], tuple(y.shape[2:])))

    def _draw(self, shapes: list[Any]) -> tuple[Any, ...] | None:
        rng, rank = self.rng, self.rank
        source = len(shapes) - 1 if rng.random() < 0.7 else rng.randrange(len(shapes))
        channels, sizes = shapes[source]
        kind = rng.choice(("conv", "conv", "norm", "add", "add", "scale", "pool", "pad", "slice", "cat", "split", "shift", "pick"))
        if kind == "conv":
            groups = rng.choice([g for g in (1, 2, 3, channels) if channels % g == 0])
            options = {"stride": rng.choice((1, 1, 2)), "dilation": rng.choice((1, 1, 2)), "padding": rng.choice((0, 1, 2))}
            kernel = [rng.choice((1, 1, 2, 3)) for _ in range(rank)]
            if min(n + 2 * options["padding"] - options["dilation"] * (k - 1) for n, k in zip(sizes, kernel, strict=True)) < 1:
                return None
            self.layers.append(CONVS[rank - 1](channels, groups * rng.choice((1, 2, 3)), kernel, groups=groups, bias=rng.random() < 0.6, **options))
            return "layer", source, len(self.layers) - 1
        if kind == "norm":
            self.layers.append(NORMS[rank - 1](channels, affine=rng.random() < 0.7))
            return "layer", source, len(self.layers) - 1
        if kind == "add":
            alike = [i for i, shape in enumerate(shapes) if shape == shapes[source]]
            return kind, source, rng.choice(alike), rng.random() < 0.3
        if kind in ("scale", "shift"):
            setattr(self, f"p{len(self.steps)}", nn.Parameter(torch.rand(channels, *[1] * rank) + 0.5))
            return kind, source, len(self.steps)
        if kind == "pool":
            size = rng.choice((2, 3))
            return (kind, source, size, rng.choice((1, 2)), rng.choice((0, 1))) if min(sizes) >= size else None
        if kind == "pad":
            return kind, source, [rng.choice((0, 1)) for _ in range(2 * rank)], rng.choice((0.0, 0.0, 1.5))
        if kind == "slice":
            return (kind, source, rng.randrange(rank), rng.choice((0, 1)), rng.choice((1, 2))) if min(sizes) > 2 else None
        if kind == "cat":
            alike = [i for i, shape in enumerate(shapes) if shape[1] == sizes]
            return kind, [rng.choice(alike) for _ in range(2)]
        if kind == "split":
            return (kind, source, rng.randrange(2)) if channels % 2 == 0 else None
        return kind, source, [rng.randrange(channels) for _ in range(rng.choice((1, 2, channels)))]

    def _run(self, step: tuple[Any, ...], values: list[Tensor]) -> Tensor:
        kind, source, *rest = step
        if kind == "cat":
            return torch.cat([values[i] for i in source], 1)
        x = values[source]
        if kind == "layer":
            return self.layers[rest[0]].eval()(x)
        if kind == "add":
            return x - values[rest[0]] if rest[1] else x + values[rest[0]]
        if kind == "scale":
            return x * getattr(self, f"p{rest[0]}")
        if kind == "shift":
            return getattr(self, f"p{rest[0]}") + x
        if kind == "pool":
            return POOLS[self.rank - 1](x, *rest)
        if kind == "pad":
            return F.pad(x, rest[0], value=rest[1])
        if kind == "slice":
            return x[(slice(None), slice(None), *[slice(None)] * rest[0], slice(rest[1], None, rest[2]))]
        if kind == "split":
            return x.chunk(2, 1)[rest[0]]
        return x[:, rest[0]]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step in self.steps:
            values.append(self._run(step, values))
        read = {i for _, source, *rest in self.steps for i in (source if isinstance(source, list) else [source])}
        read |= {rest[0] for kind, _, *rest in self.steps if kind == "add"}
        return tuple(torch.relu(value) for i, value in enumerate(values) if i not in read)


@settings(calm, max_examples=120)
@given(st.integers(0, 10**6), st.sampled_from([1, 1, 2, 2, 3]), st.sampled_from([1, 2, 4, 6]), st.integers(4, 7), st.integers(2, 7))
def test_any_linear_dag_keeps_its_values_and_never_costs_more(seed: int, rank: int, channels: int, size: int, count: int) -> None:
    torch.manual_seed(seed)
    model = lived_in(RandomDag(seed, rank, channels, size, count))
    before, after, _ = collapsed(model, torch.randn(2, channels, *[size] * rank).double())
    assert cost(after).dearer(cost(before)) is None
    again = Pipeline.parse("collapse()").run(after, ctx := Context())
    assert again.text() == after.text(), ctx.misses


@settings(calm, max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_dynamic_sizes(seed: int, count: int) -> None:
    torch.manual_seed(seed)
    model = lived_in(RandomDag(seed, 2, 4, 6, count))
    x = torch.randn(2, 4, 6, 6).double()
    try:
        program = capture(model, (x,), {"x": {0: "batch", 2: "h", 3: "w"}})
    except Exception:  # noqa: BLE001 — a network that only allows some sizes is captured with fixed ones, which the test above does
        return
    after = Pipeline.parse("collapse()").run(program, Context())
    for shape in ((2, 4, 6, 6), (3, 4, 8, 7), (1, 4, 9, 11)):
        check_preserves(program, after, (torch.randn(*shape).double(),), "values")


@settings(calm, max_examples=30)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4]), st.booleans())
def test_linears_with_channels_last(seed: int, rank: int, dynamic: bool) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    class Linears(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.back = nn.Linear(6, rng.choice((4, 24))), None
            self.back = nn.Linear(self.wide.out_features, 6, bias=rng.random() < 0.5)
            self.side, self.gamma = nn.Linear(6, 6), nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.side(x).chunk(2, -1)
            return torch.relu(self.back(self.wide(x)) * self.gamma - x / 2 + torch.cat([b, 3 * a], -1))

    x = torch.randn(*[3] * (rank - 1), 6).double()
    _, after, _ = collapsed(Linears().double().eval(), x, {"x": {0: "batch"}} if dynamic else None)
    assert ops(after) == {"linear": 1, "relu": 1}


# --- the algebra -----------------------------------------------------------------------------------------------------------------------


@settings(calm, max_examples=150)
@given(st.integers(0, 10**6), st.booleans())
def test_the_algebra_is_that_of_torch(seed: int, static: bool) -> None:
    """Maps that are composed, summed, stacked and picked from, where they have an exact common map, give what torch gives step by step."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    channels, size = rng.choice((1, 2, 4, 6)), rng.randint(5, 12)
    x = torch.randn(2, channels, size).double()
    whole, y = identity(channels, (size if static else None,)), x
    for _ in range(rng.randint(1, 3)):
        kind, count = rng.choice(("conv", "sum", "pick", "stack")), y.shape[1]
        groups = rng.choice([g for g in (1, 2, 3, 6) if count % g == 0]) if kind == "conv" else 1
        kernel, stride, padding, dilation = rng.choice((1, 2, 3)), rng.choice((1, 1, 2)), rng.choice((0, 1)), rng.choice((1, 2))
        if kind != "conv":
            kernel, stride, padding, dilation = 3, 1, 1, 1
        if y.shape[2] + 2 * padding - dilation * (kernel - 1) < 1:
            continue
        weight = torch.randn(count if kind != "conv" else groups * rng.choice((1, 2)), count // groups, kernel).double()
        bias = torch.randn(weight.shape[0]).double() * rng.choice((0, 1))
        lattice = Lattice(-padding, dilation, kernel, stride, 2 * padding - dilation * (kernel - 1) - 1)
        own = conv(weight.shape, lambda w=weight: w, bias, groups, (lattice,), whole.output_places)
        result = F.conv1d(y, weight, bias, stride, padding, dilation, groups)
        try:
            if kind == "conv":
                whole, y = compose(own, whole, 1e-12), result
            elif kind == "sum":
                factor = torch.randn(count).double()
                whole, y = add(compose(own, whole, 1e-12), compose(scale(factor, factor, whole.output_places), whole, 1e-12), -1), \
                    result - (y * factor[:, None] + factor[:, None])
            elif kind == "pick":
                rows = torch.randint(0, count, (rng.randint(1, 5),))
                whole, y = select(whole, rows), y[:, rows]
            else:
                whole, y = stack([compose(own, whole, 1e-12), whole]), torch.cat([result, y], 1)
        except Inexact:
            continue  # then both stay as they were
    torch.testing.assert_close(whole(x), y, rtol=1e-10, atol=1e-10)
    assert whole.kernel.shape == whole.kernel_shape


# --- borders ---------------------------------------------------------------------------------------------------------------------------


class ConvMixer(nn.Module):
    """FastViT's formula to the letter, where the depthwise conv pads what the first norm has shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.second = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(self.conv(self.first(x))))


def test_a_shift_behind_which_zeros_are_padded_becomes_a_map_over_places() -> None:
    _, after, misses = collapsed(lived_in(ConvMixer()), torch.randn(2, 4, 7, 9).double())
    assert ops(after) == {"conv2d": 1, "add": 1, "relu": 1}
    assert misses == []


def test_with_dynamic_sizes_that_map_cannot_be_stored() -> None:
    _, after, misses = collapsed(lived_in(ConvMixer()), torch.randn(2, 4, 7, 9).double(), {"x": {2: "h", 3: "w"}})
    assert ops(after)["conv2d"] == 1
    assert ops(after)["add"] == 1
    assert any("a shift ends where zeros are padded, and with dynamic sizes" in miss for miss in misses)


def test_two_padded_kernels_do_not_become_one() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)).double().eval()
    _, after, misses = collapsed(model, torch.randn(2, 2, 8, 8).double())
    assert ops(after) == {"conv2d": 2}
    assert any("the border: 1 places before the first are read as zeros, where a kernel of 3 places gives other values" in miss for miss in misses)


def test_padding_first_makes_two_kernels_one() -> None:
    model = nn.Sequential(nn.ZeroPad2d(2), nn.Conv2d(2, 8, 3), nn.Conv2d(8, 2, 3)).double().eval()
    _, after, _ = collapsed(model, torch.randn(2, 2, 8, 8).double())
    assert ops(after) == {"conv2d": 1}


def test_uneven_padding_is_run_before_the_conv() -> None:
    model = nn.Sequential(nn.ZeroPad2d((0, 3, 0, 3)), nn.Conv2d(2, 4, 4, stride=2, bias=False), nn.BatchNorm2d(4))
    _, after, _ = collapsed(lived_in(model), torch.randn(2, 2, 9, 8).double())
    assert ops(after) in ({"conv2d": 1, "pad": 1}, {"conv2d": 1})


# --- cost and reasons ------------------------------------------------------------------------------------------------------------------


def test_a_low_rank_chain_is_left_alone_with_both_numbers() -> None:
    model = nn.Sequential(nn.Linear(64, 4, bias=False), nn.Linear(4, 64)).double().eval()
    _, after, misses = collapsed(model, torch.randn(8, 64).double())
    assert ops(after) == {"linear": 2}
    assert misses == ["at linear_1 (1): linear + linear_1 as one linear would raise FLOPs from 8.19 k to 65.5 k and bytes from 12.8 k to 41 k"]


def test_a_depthwise_and_a_pointwise_conv_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
    _, after, misses = collapsed(lived_in(model), torch.randn(2, 8, 9, 9).double())
    assert ops(after) == {"conv2d": 2}
    assert "would raise FLOPs from" in misses[0]


def test_the_cheapest_cut_of_a_chain_is_found() -> None:
    """5 widths, 4 linears: 16 -> 64 -> 2 -> 64 -> 16. One linear of 2 inputs and one of 2 outputs cost least; merging pairwise by hand would not."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 2), nn.Linear(2, 64), nn.Linear(64, 16)).double().eval()
    _, after, _ = collapsed(model, torch.randn(3, 16).double())
    shapes = [tuple(n.kwargs["weight"].meta["val"].shape) for _, n in after.nodes() if n.op == "call_function"]
    assert shapes == [(2, 16), (16, 2)]


def test_another_user_of_the_value_between() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.one(x)
            return self.two(y), torch.relu(y)

    _, after, misses = collapsed(Shared().double().eval(), torch.randn(2, 8).double())
    assert ops(after)["linear"] == 2
    # 8 x 8 is less than 8 x 16: the second reads x instead, and the first stays for its other user
    assert {tuple(n.kwargs["weight"].meta["val"].shape) for _, n in after.nodes() if op_name(n) == "linear"} == {(16, 8), (8, 8)}
    assert misses == []


def test_another_user_is_named_where_it_makes_a_collapse_too_dear() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(64, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.one(x)
            return self.two(y), torch.relu(y)

    _, _, misses = collapsed(Shared().double().eval(), torch.randn(2, 64).double())
    assert misses == ["at linear_1 (two): linear is also used by relu: linear_1 as one linear would raise FLOPs from 256 to 2.05 k "
                      "and bytes from 768 to 5.25 k"]


def test_a_norm_without_stored_statistics_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).double().eval()
    _, after, misses = collapsed(model, torch.randn(2, 2, 5, 5).double())
    assert ops(after)["batch_norm"] == 1
    assert any("uses the statistics of the batch" in miss or "no running statistics" in miss for miss in misses)


def test_terms_of_one_source_are_brought_together() -> None:
    class Parted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            return torch.relu(self.one(y) + x + self.two(y))

    _, after, _ = collapsed(Parted().double().eval(), torch.randn(2, 4, 6, 6).double())
    assert ops(after) == {"relu": 2, "conv2d": 1, "add": 1}


def test_the_report_says_what_became_one_op() -> None:
    _, after, _ = collapsed(*_example("merge_conv_branches"))
    (row,) = after.decisions.values()
    assert (row.kind, row.merged) == ("conv", 3)
    assert row.flops_before is not None
    assert row.flops is not None
    assert 0 < row.flops < row.flops_before


# --- masks, training, dtypes -----------------------------------------------------------------------------------------------------------


def test_a_mask_is_kept_or_the_collapse_refused() -> None:
    torch.manual_seed(0)
    plain = lived_in(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)))
    x = torch.randn(2, 4, 6, 6).double()
    masked = Pipeline.parse("mask_weights(targets=('conv',), density=0.5)").run(capture(plain, (x,)), Context())
    ctx = Context()
    after = Pipeline.parse("collapse()").run(masked, ctx)
    check_preserves(masked, after, (x,), "values")
    assert ops(after) == {"mul": 1, "conv2d": 1}  # conv(x, weight * mask)
    model, x = _example("merge_conv_branches")
    branches = Pipeline.parse("mask_weights(targets=('conv',), density=0.5)").run(capture(model, (x,)), Context())
    after = Pipeline.parse("collapse()").run(branches, ctx)
    assert ops(after)["conv2d"] == 2
    assert any("would dissolve the mask" in str(miss) for miss in ctx.misses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = lived_in(nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)))
    x = torch.randn(2, 4, 6, 6)
    exact = model(x.double())
    program = capture(model.to(dtype), (x.to(dtype),))
    after = Pipeline.parse("collapse()").run(program, Context())
    weight = next(t for t in after.regions[""].module.parameters() if t.dim() == 4)
    assert weight.dtype == dtype
    from sparsify_compiler.call import instantiate

    error = (instantiate(after)(x.to(dtype)).double() - exact).abs().max()
    assert error <= (model(x.to(dtype)).double() - exact).abs().max() * 2


def test_shared_weights_are_merged_for_each_use_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.two(self.conv(torch.relu(self.one(self.conv(x))))))

    _, after, _ = collapsed(lived_in(Twice()), torch.randn(2, 4, 5, 5).double())
    assert ops(after) == {"conv2d": 2, "relu": 2}


# --- the named rules are cases of it ---------------------------------------------------------------------------------------------------


def _example(name: str) -> tuple[nn.Module, Tensor]:
    import importlib

    model, (x, *_) = importlib.import_module(catalog.get("pass", name).__module__).example()
    return lived_in(model), x.double()


@pytest.mark.parametrize("name", sorted({"fold_batchnorm", "merge_conv_branches", "merge_pool_branch", "merge_conv_chain", "absorb_skip",
                                         "merge_linear_chain"} & set(catalog.names("pass"))))
def test_a_named_rule_is_a_case_of_it(name: str) -> None:
    model, x = _example(name)
    by_rule = Pipeline.parse(f"{name}()").run(capture(model, (x,)), Context())
    _, after, _ = collapsed(model, x)
    assert sum(ops(after).values()) <= sum(ops(by_rule).values())
    assert cost(after).dearer(cost(by_rule)) is None
