"""Convs beside, behind and around each other become one: in float64, with random statistics; and why some do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from reparam_help import CONVS, NORMS, POOLS, Sum, left, masked, ops, randomised, rewritten
from torch import Tensor, nn

from sparsify_compiler.capture import capture
from sparsify_compiler.passes.reparam._branches import MergeBranches
from sparsify_compiler.passes.reparam.absorb_skip import AbsorbSkip
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.passes.reparam.merge_conv_branches import MergeConvBranches
from sparsify_compiler.passes.reparam.merge_conv_chain import ConvThenConv, MergeConvChain
from sparsify_compiler.passes.reparam.merge_pool_branch import MergePoolBranch
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.preserves import check_preserves
from sparsify_compiler.why import why

calm = settings(deadline=None, max_examples=10)
BRANCHES, POOL, CHAIN, SKIP = MergeConvBranches(), MergePoolBranch(), MergeConvChain(), AbsorbSkip()
IMAGE = torch.randn(2, 4, 9, 8).double()


@contextmanager
def at_any_cost() -> Iterator[None]:
    """Merge also where it does not pay: to see that the numbers are right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MergeBranches, "only_if_cheaper", False)
        patch.setattr(ConvThenConv, "only_if_cheaper", False)
        yield


def told(name: str, model: nn.Module, x: Tensor = IMAGE) -> list[str]:
    return [str(m) for m in why(name, model.double().eval(), (x,))]


def conv(size: Any, inputs: int = 4, outputs: int = 8, **options: Any) -> nn.Conv2d:
    """A conv that keeps the size at stride 1."""
    sizes = size if isinstance(size, tuple) else (size, size)
    return nn.Conv2d(inputs, outputs, sizes, padding=tuple(s // 2 for s in sizes), **options)


def with_norm(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules, nn.BatchNorm2d(modules[-1].out_channels))  # type: ignore[arg-type]


# --- branches: one frame for all taps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernels", "options"), [
    (((3, 3), (3, 1), (1, 3)), {}), (((3, 3), (1, 1)), {"stride": 2}), (((3, 3), (1, 1)), {"groups": 2}), (((7, 7), (3, 3), (5, 5)), {"groups": 4}),
    (((1, 1), (1, 1)), {}), (((1, 1), (3, 3)), {}),
])
def test_convs_of_several_sizes_merge(kernels: tuple[tuple[int, int], ...], options: dict[str, int]) -> None:
    convs = [conv(k, bias=i != 1, **options) for i, k in enumerate(kernels)]
    assert left(randomised(Sum(*convs)), IMAGE, BRANCHES) == ["conv2d"]
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}} if "stride" not in options else {"x": {0: "batch"}}
    assert left(randomised(Sum(*convs)), IMAGE, BRANCHES, dynamic) == ["conv2d"]


@at_any_cost()
@calm
@given(st.data())
def test_any_two_convs_whose_sum_exists_are_one(data: st.DataObject) -> None:
    """Any frames: other paddings, dilations and groups, uneven "same", also where the outputs are as many only by chance."""
    rank, stride = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    x, convs = torch.randn(1, 4, *[data.draw(st.integers(6, 9)) for _ in range(rank)]).double(), []
    for _ in range(2):
        sizes = tuple(data.draw(st.integers(1, 4 if rank < 3 else 3)) for _ in range(rank))
        options = {"dilation": data.draw(st.integers(1, 2)), "groups": data.draw(st.sampled_from([1, 2, 4])), "bias": data.draw(st.booleans())}
        padding = "same" if stride == 1 and data.draw(st.booleans()) else tuple(data.draw(st.integers(0, 3)) for _ in range(rank))
        reach = [options["dilation"] * (size - 1) for size in sizes]
        assume(padding == "same" or all(far < size + 2 * side for far, size, side in zip(reach, x.shape[2:], padding, strict=True)))  # torch takes it
        convs.append(CONVS[rank](4, 8, sizes, stride=stride, padding=padding, **options).double())
    if convs[0](x).shape == convs[1](x).shape:
        join = data.draw(st.sampled_from([lambda a, b: a + b, lambda a, b: a - b]))
        assert left(randomised(Sum(*convs, join=join)), x, BRANCHES) == [f"conv{rank}d"]


@at_any_cost()
@calm
@given(st.data())
def test_a_norm_or_x_itself_beside_a_conv(data: st.DataObject) -> None:
    rank, groups = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    size, dilation = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.integers(1, 2))
    conv = CONVS[rank](4, 4, size, padding="same", dilation=dilation, groups=groups, bias=data.draw(st.booleans()))
    other = NORMS[rank](4, affine=data.draw(st.booleans())) if data.draw(st.booleans()) else nn.Identity()
    join = data.draw(st.sampled_from([lambda a, b: a + b, lambda a, b: b + a, lambda a, b: a - b, lambda a, b: b - a]))
    x = torch.randn(2, 4, *[5] * rank).double()
    assert left(randomised(Sum(conv, other, join=join)), x, BRANCHES) == [f"conv{rank}d"]


def test_uneven_same_padding_stays_where_the_sum_is_uneven_too() -> None:
    even, odd = nn.Conv2d(4, 8, 4, padding="same"), nn.Conv2d(4, 8, 2, padding="same")
    after = rewritten(randomised(Sum(even, odd)), IMAGE, BRANCHES)
    (node,) = [n for _, n in after.nodes() if n.op == "call_function"]
    assert node.kwargs["padding"] == "same"
    assert tuple(node.kwargs["weight"].meta["val"].shape) == (8, 4, 4, 4)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2), (1, 3, 2, 0), (2, 0, 3, 1)])
def test_the_sum_may_come_in_any_order_and_association(order: tuple[int, ...]) -> None:
    """A RepVGG block and a value that is none of it. Leaning to one side, the branches meet across the foreign value."""
    branches = with_norm(conv(3, 4, 4, bias=False)), with_norm(conv(1, 4, 4, bias=False)), nn.BatchNorm2d(4), nn.ReLU()
    a, b, c, d = order
    for join in (lambda *v: v[a] + (v[b] + (v[c] + v[d])), lambda *v: ((v[a] + v[b]) + v[c]) + v[d]):
        assert sorted(left(randomised(Sum(*branches, join=join)), IMAGE, FoldBatchnorm() | BRANCHES)) == ["add", "conv2d", "relu"]


def test_asymmetric_convs_merge_where_that_pays() -> None:
    """ACNet: 1x3 + 3x1 alone would cost more as one, and says so; beside a 3x3 they are nothing."""
    wide, tall, square = conv((1, 3), bias=False), conv((3, 1), bias=False), conv(3)
    (reason,) = told("merge_conv_branches", Sum(wide, tall))
    assert reason == "at add: would raise FLOPs from 56.4 k to 82.9 k"  # of 2 images of 9x8: 2 * 144 * 8 * 4 for each of 6, or 9, taps
    for join in (lambda a, b, c: (a + b) + c, lambda a, b, c: c + (a + b), lambda a, b, c: a + (c + b)):
        assert left(randomised(Sum(wide, tall, square, join=join)), IMAGE, BRANCHES) == ["conv2d"]


@pytest.mark.parametrize(("size", "groups"), [(3, 4), (3, 1), (1, 1)])
def test_a_mobileone_block_becomes_one_conv(size: int, groups: int) -> None:
    branches = [with_norm(conv(size, 4, 4, groups=groups, bias=False)) for _ in range(4)]
    scale = [with_norm(conv(1, 4, 4, groups=groups, bias=False))] if size > 1 else []
    model = randomised(Sum(*scale, nn.BatchNorm2d(4), *branches), nn.ReLU())
    assert left(model, IMAGE, FoldBatchnorm() | BRANCHES) == ["conv2d", "relu"]


def test_large_kernels_take_in_small_and_dilated_ones() -> None:
    """RepLKNet's 13x13 and 5x5, and the dilated branches of UniRepLKNet, depthwise."""
    large, small = conv(13, 4, 4, groups=4, bias=False), conv(5, 4, 4, groups=4, bias=False)
    dilated = [nn.Conv2d(4, 4, 3, padding=d, dilation=d, groups=4, bias=False) for d in (3, 4, 5)]
    model = randomised(Sum(*map(with_norm, (large, small, *dilated))))
    after = rewritten(model, IMAGE, FoldBatchnorm() | BRANCHES)
    assert ops(after) == ["conv2d"]
    assert {n.meta["path"] for _, n in after.nodes() if n.op == "call_function"} == {"branches.0.0"}, "it stays where the large conv was"


def test_two_norms_are_one() -> None:
    assert left(randomised(Sum(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False, eps=0.1))), IMAGE, BRANCHES) == ["batch_norm"]
    assert left(randomised(Sum(nn.BatchNorm2d(4), nn.BatchNorm2d(4), conv(1, 4, 4))), IMAGE, BRANCHES) == ["conv2d"]


@pytest.mark.parametrize(("model", "x", "reason"), [
    (Sum(conv(3), nn.Sequential(nn.ReLU(), conv(1))), IMAGE, "expected the same x (x), found relu"),
    (Sum(conv(3), nn.Sequential(conv(1), nn.ReLU())), IMAGE, "expected conv2d or add, found relu"),
    (Sum(conv(3, stride=2), conv(1, stride=4)), IMAGE[:, :, :2, :2], "the branches have strides (2, 2) and (4, 4)"),
    (Sum(conv(3, 4, 4, stride=2), nn.Identity()), IMAGE[:, :, :1, :1], "the branches have strides (2, 2) and (1, 1)"),
    (Sum(conv(3, 4, 4), conv(1, 4, 1)), IMAGE, "a branch of shape [2, 1, 9, 8] is broadcast to [2, 4, 9, 8]"),
    (Sum(conv(3, 4, 4), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE, "the norm has no running statistics, so it is always in training mode"),
    (Sum(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE, "the norm has no running statistics, so it is always in training"),
    (Sum(nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(6)), torch.randn(4, 6).double(), "the input has 2 dimensions, not 3"),
])
def test_what_does_not_merge_says_why(model: nn.Module, x: Tensor, reason: str) -> None:
    assert any(reason in line for line in told("merge_conv_branches", model, x)), told("merge_conv_branches", model, x)


def test_taps_off_the_centre_merge_where_the_sizes_agree() -> None:
    off = Sum(nn.Conv2d(4, 8, 3, padding=1, stride=4), nn.Conv2d(4, 8, 1, padding=1, stride=4))
    x = torch.randn(1, 4, 6, 6).double()
    assert left(randomised(off), x, BRANCHES) == ["conv2d"]


def test_the_zero_that_stands_for_no_branch_goes() -> None:
    """RepVGG's published code adds 0 where there is no identity branch."""
    assert left(randomised(Sum(conv(3), conv(1), join=lambda a, b: torch.relu(a + b + 0))), IMAGE, BRANCHES) == ["conv2d", "relu"]
    assert left(randomised(Sum(nn.BatchNorm2d(4), join=lambda a: torch.relu(0 + a))), IMAGE, BRANCHES) == ["batch_norm", "relu"]
    assert told("merge_conv_branches", Sum(nn.ReLU(), join=lambda a: a + 0)) == ["at add: 0 is added to what is no conv or norm"]


# --- masks --------------------------------------------------------------------------------------------------------------------------------


def after_masks(model: nn.Module, item: Pass, *weights: str) -> tuple[list[str], list[str]]:
    """The ops that are left and the reasons; zeros and numbers checked."""
    program, ctx = masked(capture(randomised(model), (IMAGE,)), *weights), Context()
    after = item.run(program.clone(), ctx)
    check_preserves(program, after, (IMAGE,), Preserves.VALUES)
    return ops(after), [str(miss) for miss in ctx.misses]


def test_a_mask_is_kept_or_the_merge_refused() -> None:
    found, _ = after_masks(with_norm(conv(3)), FoldBatchnorm(), "0.weight")
    assert found == ["mul", "conv2d"], "scaled rows keep their zeros"
    found, reasons = after_masks(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3)), FoldBatchnorm(), "1.weight")
    assert (found, reasons) == (["mul", "conv2d"], []), "the bias takes from the masked weight, and has no mask"
    found, reasons = after_masks(Sum(conv(3), conv(1)), BRANCHES, "branches.0.weight")
    assert (found.count("conv2d"), reasons) == (2, ["at add: would dissolve the mask branches.0.weight_mask"])
    found, reasons = after_masks(Sum(conv(3), conv(3)), BRANCHES, "branches.1.weight")
    assert (found.count("conv2d"), reasons) == (2, ["at add: would dissolve the mask branches.1.weight_mask"])
    found, reasons = after_masks(nn.Sequential(conv(1, 4, 4), nn.Conv2d(4, 4, 1)), CHAIN, "1.weight")
    assert (found.count("conv2d"), reasons) == (2, ["at conv2d_1: would dissolve the mask 1.weight_mask"])
    found, reasons = after_masks(Skip(conv(3, 4, 4)), SKIP, "body.0.weight")
    assert (found.count("conv2d"), reasons) == (1, ["at add: would dissolve the mask body.0.weight_mask"])


# --- pools --------------------------------------------------------------------------------------------------------------------------------


@at_any_cost()
@calm
@given(st.data())
def test_an_average_pool_beside_a_conv(data: st.DataObject) -> None:
    rank, stride, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(2, 4))
    padding, groups = data.draw(st.integers(0, size // 2)), data.draw(st.sampled_from([1, 2, 4]))
    divisor = {"divisor_override": data.draw(st.sampled_from([None, 5]))} if rank > 1 else {}
    x = torch.randn(2, 4, *[8] * rank).double()
    pool = POOLS[rank](size, stride, padding, **divisor)
    conv = CONVS[rank](4, 4, size, stride, padding, groups=groups, bias=data.draw(st.booleans()))
    pointwise = CONVS[rank](4, 4, 1, groups=data.draw(st.sampled_from([1, 2])), bias=padding == 0)
    parts = [*([pointwise] if data.draw(st.booleans()) else []), pool, *([NORMS[rank](4)] if data.draw(st.booleans()) else [])]
    assert left(randomised(Sum(nn.Sequential(*parts), conv)), x, POOL) == [f"conv{rank}d"]


def test_the_branches_of_dbb_without_its_border() -> None:
    """All four branches of a 3x3 block that does not pad: 3x3, 1x1 in the middle, 1x1 then 3x3, 1x1 then pool; each with its norms."""
    centre = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))
    sequence = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))
    average = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AvgPool2d(3, 1), nn.BatchNorm2d(8))
    model = randomised(Sum(with_norm(nn.Conv2d(4, 8, 3, bias=False)), average, sequence, centre,
                           join=lambda a, b, c, d: a + b + c + d[:, :, 1:-1, 1:-1]))
    assert left(model, IMAGE, FoldBatchnorm() | CHAIN | BRANCHES | POOL | BRANCHES) == ["conv2d", "conv2d", "slice", "slice", "add"]


def test_a_pool_that_is_no_conv_beside_this_one_says_why() -> None:
    def reasons(pool: nn.Module, beside: nn.Module, x: Tensor = IMAGE) -> list[str]:
        return told("merge_pool_branch", Sum(beside, pool), x)

    nine = "at add: the pool does not count its padding of (1, 1): at the border it divides by less than 9"
    assert nine in reasons(nn.AvgPool2d(3, 1, 1, count_include_pad=False), conv(3, 4, 4))
    assert left(randomised(Sum(nn.Conv2d(4, 4, 3), nn.AvgPool2d(3, 1, count_include_pad=False))), IMAGE, POOL) == ["conv2d"], "it has none to count"
    up = "at add: the pool of (2, 2) rounds its size up (ceil_mode): its last windows are not whole"
    assert up in reasons(nn.AvgPool2d(2, 2, ceil_mode=True), conv(3, 4, 4, stride=2))
    assert "at add: the branches have strides (1, 1) and (2, 2)" in reasons(nn.AvgPool2d(1, 2), conv(1, 4, 4), IMAGE[:, :, :1, :1])
    bias = "at add: of a conv and a pool, the second pads by (1, 1) zeros where the first, at the border, gives its bias"
    assert bias in reasons(nn.Sequential(conv(1, 4, 4), nn.AvgPool2d(3, 1, 1)), conv(3, 4, 4))
    edge = "at add: of a conv and a pool, the second pads by (1, 1) zeros where the first, 3x3 and padded by (1, 1), still reaches its input"
    assert edge in reasons(nn.Sequential(conv(3, 4, 4, bias=False), nn.AvgPool2d(3, 1, 1)), conv(3, 4, 4))


# --- chains -------------------------------------------------------------------------------------------------------------------------------


@at_any_cost()
@calm
@given(st.data())
def test_any_two_convs_in_a_row_are_one_where_nothing_is_padded_between(data: st.DataObject) -> None:
    rank, x = data.draw(st.integers(1, 3)), []
    for place in range(2):
        sizes = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
        padding = tuple(data.draw(st.integers(0, 2)) if place == 0 else 0 for _ in range(rank))
        x.append(CONVS[rank]((4, 8)[place], 8, sizes, data.draw(st.integers(1, 2)), padding, data.draw(st.integers(1, 2)),
                             data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())))
    image = torch.randn(1, 4, *[data.draw(st.integers(11, 14)) for _ in range(rank)]).double()
    between, reach = x[0].double()(image).shape[2:], [far * (size - 1) for far, size in zip(x[1].dilation, x[1].kernel_size, strict=True)]
    assume(all(far < size for far, size in zip(reach, between, strict=True)))     # torch takes it
    assert left(randomised(*x), image, CHAIN) == [f"conv{rank}d"]


@at_any_cost()
@calm
@given(st.data())
def test_two_convs_with_zeros_between_are_one_exactly_where_the_border_allows(data: st.DataObject) -> None:
    one, two = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    before, between = data.draw(st.integers(0, 2)), data.draw(st.integers(1, 2))
    first = nn.Conv1d(4, 4, one, 1, before, bias=data.draw(st.booleans()))
    model, x = randomised(first, nn.Conv1d(4, 4, two, 1, between)), torch.randn(1, 4, 9).double()
    fits = first.bias is None and before >= one - 1
    assert left(model, x, CHAIN) == ["conv1d"] * (1 if fits else 2)
    if not fits:
        head = f"at conv1d_1: of two convs, {one} then {two}, the second pads by ({between},) zeros where the first, "
        tail = f"{one} and padded by ({before},), still reaches its input" if first.bias is None else "at the border, gives its bias"
        assert told("merge_conv_chain", model, x) == [head + tail]


@pytest.mark.parametrize(("chain", "kept"), [
    ((conv(1, 4, 16, bias=False), conv(3, 16, 4)), 1), ((conv(3, 4, 16), conv(1, 16, 4)), 1), ((conv(1, 4, 4), conv(1, 4, 4), conv(1, 4, 4)), 1),
    ((nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)), 2), ((conv(3, 8, 8, groups=8), conv(1, 8, 8)), 2),
    ((nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1, groups=4)), 1), ((conv(3, 4, 4, padding_mode="zeros"), nn.ReLU(), conv(1, 4, 4)), 2),
])
def test_chains_merge_where_one_conv_costs_less(chain: tuple[nn.Module, ...], kept: int) -> None:
    x = torch.randn(2, chain[0].in_channels, 16, 16).double()  # type: ignore[arg-type]
    for dynamic in (None, {"input": {0: "batch", 2: "height", 3: "width"}}):
        assert left(randomised(*chain), x, CHAIN, dynamic).count("conv2d") == kept


def test_a_chain_that_is_left_alone_gives_both_costs() -> None:
    low_rank = nn.Sequential(nn.Conv2d(8, 2, 1, bias=False), nn.Conv2d(2, 8, 1, bias=False))
    (reason,) = told("merge_conv_chain", low_rank, torch.randn(1, 8, 16, 16).double())
    assert reason == "at conv2d_1: would raise FLOPs from 16.4 k to 32.8 k"


def test_a_value_between_two_convs_that_is_needed_elsewhere() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = conv(1, 4, 4), conv(1, 4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x)
            return torch.relu(y) + self.two(y)

    assert "at conv2d_1: the intermediate value conv2d is also used by relu" in told("merge_conv_chain", Fork())


# --- skips --------------------------------------------------------------------------------------------------------------------------------


class RepMixer(nn.Module):
    """FastViT's: mixer and norm are MobileOne blocks, the second only a norm."""

    def __init__(self, channels: int, size: int, layer_scale: Any) -> None:
        super().__init__()
        depthwise = {"groups": channels, "bias": False}
        self.mixer = Sum(with_norm(conv(1, channels, channels, **depthwise)), nn.BatchNorm2d(channels),
                         with_norm(conv(size, channels, channels, **depthwise)))
        self.norm, self.scale = nn.BatchNorm2d(channels), layer_scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return x + self.mixer(x) - self.norm(x)
        return x + self.scale * (self.mixer(x) - self.norm(x))


@pytest.mark.parametrize("scale", [nn.Parameter(torch.rand(4, 1, 1)), nn.Parameter(torch.rand(1, 4, 1, 1)), nn.Parameter(torch.rand(1)), 0.5, None])
def test_a_repmixer_is_one_depthwise_conv(scale: Any) -> None:
    model = randomised(RepMixer(4, 3, scale), nn.GELU())
    after = rewritten(model, IMAGE, FoldBatchnorm() | BRANCHES | SKIP, {"input": {0: "batch", 2: "height", 3: "width"}})
    assert ops(after) == ["conv2d", "gelu"]
    (node,) = [n for _, n in after.nodes() if "groups" in n.kwargs]
    assert (node.kwargs["groups"], tuple(node.kwargs["weight"].meta["val"].shape)) == (4, (4, 1, 3, 3))


class Skip(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.body(x)
        return y


class Times(nn.Module):
    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


@at_any_cost()
@calm
@given(st.data())
def test_a_skip_around_a_conv(data: st.DataObject) -> None:
    rank, groups, dilation = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 2))
    conv = CONVS[rank](4, 4, data.draw(st.integers(1, 4)), padding="same", dilation=dilation, groups=groups, bias=data.draw(st.booleans()))
    assert left(randomised(Skip(conv)), torch.randn(2, 4, *[6] * rank).double(), SKIP) == [f"conv{rank}d"]


def test_a_skip_around_a_norm_and_around_a_conv_with_norms() -> None:
    for rank in (1, 2, 3):
        for affine in (True, False):
            assert left(randomised(Skip(NORMS[rank](4, affine=affine))), torch.randn(2, 4, *[5] * rank).double(), SKIP) == ["batch_norm"]
    pointwise = Skip(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.BatchNorm2d(4))
    assert left(randomised(pointwise), IMAGE, SKIP) == ["conv2d"]


@pytest.mark.parametrize(("model", "reason"), [
    (Skip(nn.BatchNorm2d(4), conv(3, 4, 4, groups=4), nn.BatchNorm2d(4)),
     "at add: the conv pads by (1, 1) after the norm: at the border its zeros are not those of the skip's x"),
    (Skip(nn.BatchNorm2d(4), conv(3, 4, 4, groups=4)),
     "at add: the conv pads by (1, 1) after the norm: at the border its zeros are not those of the skip's x"),
    (Skip(nn.BatchNorm2d(4, track_running_stats=False)),
     "at add: the norm has no running statistics, so it is always in training mode: it uses those of the batch"),
    (Skip(conv(3, 4, 4), Times(nn.Parameter(torch.rand(8)))), "at add: the scale (8,) is not one factor for each of the 4 channels"),
    (Skip(conv(3, 4, 4), Times(nn.Parameter(torch.rand(4, 1, 1, 1)))), "at add: the scale (4, 1, 1, 1) is not one factor"),
    (Skip(conv(3, 4, 4), nn.ReLU()), "nothing in the graph looks like its patterns"),
])
def test_a_skip_that_is_not_absorbed_says_why(model: nn.Module, reason: str) -> None:
    x = torch.randn(1, 4, 8, 8).double()
    found = told("absorb_skip", model, x)
    assert any(reason in line for line in found), found


def test_sizes_that_are_not_known_to_agree_for_every_input() -> None:
    """Two strides with dynamic sizes: the one conv's size has another formula, and is not proved to be the same."""
    model, x = randomised(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 3, stride=2)), torch.randn(1, 4, 33, 35).double()
    with at_any_cost():
        assert left(model, x, CHAIN) == ["conv2d"]
        ctx = Context()
        after = CHAIN.run(capture(model, (x,), {"input": {2: "height", 3: "width"}}).clone(), ctx)
    assert ops(after) == ["conv2d", "conv2d"]
    assert "which is not known to be" in str(ctx.misses[0])
