"""fold_batchnorm and merge_conv_branches on every form that their docstrings name, in float64, with random statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify_compiler.capture import capture
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.passes.reparam.merge_conv_branches import MergeConvBranches
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import check_preserves
from sparsify_compiler.program import Program
from sparsify_compiler.why import why

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
calm = settings(deadline=None, max_examples=12)


def randomised(*modules: nn.Module) -> nn.Module:
    """In float64, norms with statistics that hide no error."""
    model = nn.Sequential(*modules).double().eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2)
    return model


def ops(program: Program) -> list[str]:
    return [str(n.target).split(".")[1] for _, n in program.nodes() if n.op == "call_function"]


def folded(model: nn.Module, x: Tensor, item: Pass, dynamic: Any = None) -> list[str]:
    """The ops that are left, after checking that the values are the same."""
    program = capture(model, (x,), dynamic)
    after = Pipeline((item,)).run(program, Context())
    check_preserves(program, after, (x,), item.preserves)
    return ops(after)


@calm
@given(st.data())
def test_a_norm_after_any_conv_is_folded(data: st.DataObject) -> None:
    rank, groups, transposed = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    bias, affine, stride = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(1, 2))
    dilation = data.draw(st.integers(1, 2))
    torch.manual_seed(0)
    kind = (TRANSPOSED if transposed else CONVS)[rank]
    conv = kind(4, 8, 3, stride=stride, padding=1, dilation=dilation, groups=groups, bias=bias)
    assert folded(randomised(conv, NORMS[rank](8, affine=affine, eps=0.1)), torch.randn(2, 4, *[7] * rank).double(), FoldBatchnorm()) \
        == [f"conv_transpose{rank}d" if transposed else f"conv{rank}d"]


@calm
@given(st.data())
def test_a_norm_before_a_conv_without_padding_is_folded(data: st.DataObject) -> None:
    rank, groups = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    bias, affine = data.draw(st.booleans()), data.draw(st.booleans())
    torch.manual_seed(0)
    conv = CONVS[rank](4, 8, data.draw(st.sampled_from([1, 3])), groups=groups, bias=bias)
    assert folded(randomised(nn.ReLU(), NORMS[rank](4, affine=affine), conv), torch.randn(2, 4, *[7] * rank).double(), FoldBatchnorm()) \
        == ["relu", f"conv{rank}d"]


@pytest.mark.parametrize("bias", [True, False])
def test_norms_around_linears(bias: bool) -> None:
    x = torch.randn(5, 4).double()
    model = randomised(nn.BatchNorm1d(4), nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU())
    assert folded(model, x, FoldBatchnorm()) == ["linear", "relu"]
    assert folded(model, x, FoldBatchnorm(), {"input": {0: "batch"}}) == ["linear", "relu"]


def test_what_is_not_folded_says_why() -> None:
    image, rows = torch.randn(1, 4, 6, 6).double(), torch.randn(2, 5, 4).double()
    told = [str(m) for m in why("fold_batchnorm", randomised(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), (image,))]
    assert told == ["at conv2d: the conv pads by (1, 1) after the norm: its border would change"]
    told = [str(m) for m in why("fold_batchnorm", randomised(nn.Linear(4, 4), nn.BatchNorm1d(5)), (rows,))]
    assert told == ["at batch_norm: the norm's channels are not the linear's features"]
    told = [str(m) for m in why("fold_batchnorm", randomised(nn.BatchNorm1d(5), nn.Linear(4, 4)), (rows,))]
    assert told == ["at linear: the norm's channels are not the linear's features"]
    told = [str(m) for m in why("fold_batchnorm", randomised(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), (image,))]
    assert len(told) == 1
    assert "batch_norm" in told[0]


class Branches(nn.Module):
    def __init__(self, *convs: nn.Module) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (conv(x) for conv in self.convs)
        return sum(others, first)


@pytest.mark.parametrize(("kernels", "options"), [
    (((3, 3), (3, 1), (1, 3)), {}), (((3, 3), (1, 1)), {"stride": 2}), (((3, 3), (1, 1)), {"groups": 2}), (((7, 7), (3, 3), (5, 5)), {"groups": 4}),
    (((1, 1), (1, 1)), {}),
])
def test_branches_merge(kernels: tuple[tuple[int, int], ...], options: dict[str, int]) -> None:
    torch.manual_seed(0)
    convs = [nn.Conv2d(4, 8, k, padding=(k[0] // 2, k[1] // 2), bias=i != 1, **options) for i, k in enumerate(kernels)]
    left = folded(randomised(Branches(*convs)), torch.randn(2, 4, 9, 9).double(), MergeConvBranches())
    assert left == ["conv2d"]


def test_a_repvgg_block_becomes_one_conv() -> None:
    torch.manual_seed(0)
    large = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    small = nn.Sequential(nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))
    model = randomised(Branches(large, small), nn.ReLU())
    program = capture(model, (torch.randn(2, 4, 6, 6).double(),))
    after = (FoldBatchnorm() | MergeConvBranches()).run(program)
    assert ops(after) == ["conv2d", "relu"]
    check_preserves(program, after, None, FoldBatchnorm.preserves)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_the_identity_branch_of_repvgg(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, (3, 5), padding=(1, 2), groups=groups, bias=groups != 2)
    image = torch.randn(2, 8, 6, 6)
    model = randomised(Branches(conv, nn.BatchNorm2d(8, affine=groups != 8)))
    assert folded(model, image.double(), MergeConvBranches()) == ["conv2d"]
    of_the_batch = Branches(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False)).eval()
    assert "training" in str(why("merge_conv_branches", of_the_batch, (image,))[0])


@pytest.mark.parametrize(("branches", "reason"), [
    ((nn.Conv2d(4, 8, (1, 3), padding=(0, 1)), nn.Conv2d(4, 8, (3, 1), padding=(1, 0))), "a 3x1 kernel does not lie inside 1x3"),
    ((nn.Conv2d(4, 8, (3, 5), padding=(1, 1)), nn.Conv2d(4, 8, (3, 3), padding=(1, 0))), None),
    ((nn.Conv2d(4, 8, 3), nn.Conv2d(4, 8, 3, padding=1, dilation=2)), "expected the default dilation, found [2, 2]"),
    ((nn.Conv2d(4, 8, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 1))), "expected the same x"),
    ((nn.Conv2d(4, 8, 3, padding=1), nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU())), "expected conv2d, found relu"),
    ((nn.Conv2d(4, 8, 3, padding="same"), nn.Conv2d(4, 8, 1)), None),
])
def test_what_does_not_merge_says_why(branches: tuple[nn.Module, ...], reason: str | None) -> None:
    told = [str(m) for m in why("merge_conv_branches", Branches(*branches).eval(), (torch.randn(1, 4, 8, 8),))]
    assert any(reason in line for line in told) if reason else not told, told


def test_kernels_that_do_not_lie_over_each_other_stay_apart() -> None:
    convs = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 8, 2, padding=0, stride=1)
    model = Branches(convs[0], nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), convs[1])).eval()
    assert "expected the same x" in str(why("merge_conv_branches", model, (torch.randn(1, 4, 8, 8),))[0])
    shifted = Branches(nn.Conv2d(4, 8, (4, 3), padding=(1, 1)), nn.Conv2d(4, 8, (2, 1), padding=(0, 0))).eval()
    assert folded(shifted.double(), torch.randn(1, 4, 8, 8).double(), MergeConvBranches()) == ["conv2d"]
    wide = Branches(nn.Conv2d(4, 8, 3, padding=1, stride=4), nn.Conv2d(4, 8, 1, padding=0, stride=4)).eval()
    assert folded(wide.double(), torch.randn(1, 4, 8, 8).double(), MergeConvBranches()) == ["conv2d"]
    off_centre = Branches(nn.Conv2d(4, 8, 3, padding=1, stride=4), nn.Conv2d(4, 8, 1, padding=1, stride=4)).eval()
    told = str(why("merge_conv_branches", off_centre, (torch.randn(1, 4, 6, 6),))[0])
    assert told == "at add: 1x1 with padding (1, 1) is not centred in 3x3 with padding (1, 1)"
