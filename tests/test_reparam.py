"""fold_batchnorm on every form that its docstring names, in float64, with random statistics; and why it left a norm alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reparam_help import CONVS, NORMS, TRANSPOSED, Sum, left, randomised, rewritten
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from sparsify_compiler.errors import ModelError
from sparsify_compiler.passes.reparam.fold_batchnorm import FoldBatchnorm
from sparsify_compiler.why import why

calm = settings(deadline=None, max_examples=12)
IMAGE = torch.randn(1, 4, 6, 6).double()


def told(model: nn.Module, x: Tensor) -> list[str]:
    return [str(m) for m in why("fold_batchnorm", model, (x,))]


@calm
@given(st.data())
def test_a_norm_after_any_conv_is_folded(data: st.DataObject) -> None:
    rank, groups, transposed = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    bias, affine, stride = data.draw(st.booleans()), data.draw(st.booleans()), data.draw(st.integers(1, 2))
    dilation = data.draw(st.integers(1, 2))
    torch.manual_seed(0)
    kind = (TRANSPOSED if transposed else CONVS)[rank]
    conv = kind(4, 8, 3, stride=stride, padding=1, dilation=dilation, groups=groups, bias=bias)
    assert left(randomised(conv, NORMS[rank](8, affine=affine, eps=0.1)), torch.randn(2, 4, *[7] * rank).double(), FoldBatchnorm()) \
        == [f"conv_transpose{rank}d" if transposed else f"conv{rank}d"]


@calm
@given(st.data())
def test_a_norm_before_a_conv_without_padding_is_folded(data: st.DataObject) -> None:
    rank, groups = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))
    bias, affine = data.draw(st.booleans()), data.draw(st.booleans())
    torch.manual_seed(0)
    conv = CONVS[rank](4, 8, data.draw(st.sampled_from([1, 3])), stride=data.draw(st.integers(1, 2)), groups=groups, bias=bias)
    assert left(randomised(nn.ReLU(), NORMS[rank](4, affine=affine), conv), torch.randn(2, 4, *[7] * rank).double(), FoldBatchnorm()) \
        == ["relu", f"conv{rank}d"]


@calm
@given(st.data())
def test_a_norm_before_a_transposed_conv_is_folded_where_every_output_sees_every_tap(data: st.DataObject) -> None:
    rank, groups, bias = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4])), data.draw(st.booleans())
    size, stride, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    padding, extra = data.draw(st.integers(0, 4)), data.draw(st.integers(0, max(stride, dilation) - 1))
    torch.manual_seed(0)
    conv = TRANSPOSED[rank](4, 8, size, stride, padding, output_padding=extra, groups=groups, bias=bias, dilation=dilation)
    model, x = randomised(NORMS[rank](4), conv), torch.randn(1, 4, *[10] * rank).double()
    shift = nn.Sequential(randomised(NORMS[rank](4)), conv)(torch.zeros_like(x)) - conv(torch.zeros_like(x))
    constant = bool((shift.flatten(2).amax(2) - shift.flatten(2).amin(2) < 1e-9).all())
    assert (left(model, x, FoldBatchnorm()) == [f"conv_transpose{rank}d"]) == constant
    if not constant:
        (why_not,) = told(model, x)
        found = f"({'x'.join([str(size)] * rank)}, stride {(stride,) * rank}, padding {(padding,) * rank})"
        assert why_not == f"at conv_transpose{rank}d: some outputs of the transposed conv {found} see fewer taps than others: " \
            "the norm's shift is not one bias"


@pytest.mark.parametrize("bias", [True, False])
def test_norms_around_linears(bias: bool) -> None:
    x = torch.randn(5, 4).double()
    model = randomised(nn.BatchNorm1d(4), nn.Linear(4, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU())
    assert left(model, x, FoldBatchnorm()) == ["linear", "relu"]
    assert left(model, x, FoldBatchnorm(), {"input": {0: "batch"}}) == ["linear", "relu"]


class View(nn.Module):
    def __init__(self, view: Any) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.view(x)
        return y


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def permuted(x: Tensor) -> Tensor:
    return x.permute(0, -1, 1)


def flattened(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


@pytest.mark.parametrize("dynamic", [None, {"input": {0: "batch", 1: "tokens"}}])
@pytest.mark.parametrize(("view", "op"), [(transposed, "transpose"), (permuted, "permute"), (flattened, "flatten")])
def test_a_view_may_stand_between_a_linear_and_its_norm(view: Any, op: str, dynamic: Any) -> None:
    x = torch.randn(3, 5, 4).double()
    assert left(randomised(nn.Linear(4, 6), View(view), nn.BatchNorm1d(6)), x, FoldBatchnorm(), dynamic) == ["linear", op]
    around = randomised(nn.Linear(4, 6), View(transposed), nn.BatchNorm1d(6), View(transposed))
    assert left(around, x, FoldBatchnorm(), dynamic) == ["linear", "transpose", "transpose"]


def test_views_between_a_norm_and_a_linear() -> None:
    tokens, image = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 2, 3).double()
    for view, op in ((transposed, "transpose"), (lambda x: x.permute(0, 2, 1), "permute")):
        assert left(randomised(nn.BatchNorm1d(4), View(view), nn.Linear(4, 6)), tokens, FoldBatchnorm()) == [op, "linear"]
    assert left(randomised(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(24, 6, bias=False)), image, FoldBatchnorm()) == ["flatten", "linear"]


@pytest.mark.parametrize(("model", "x", "reason"), [
    ((nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)), IMAGE, "conv2d: the conv pads by (1, 1) after the norm: its border would change"),
    ((nn.BatchNorm2d(4), nn.Conv2d(4, 4, 2, padding="same")), IMAGE, "conv2d: the conv pads by same after the norm: its border would change"),
    ((nn.Linear(4, 4), nn.BatchNorm1d(5)), torch.randn(2, 5, 4).double(),
     "batch_norm: the norm's channels are not the linear's features: dimension 1 of [2, 5, 4], not the last"),
    ((nn.BatchNorm1d(5), nn.Linear(4, 4)), torch.randn(2, 5, 4).double(),
     "linear: the norm's channels are not the linear's features: dimension 1 of [2, 5, 4], not the last"),
    ((nn.Linear(4, 4), View(lambda x: x.transpose(0, 1)), nn.BatchNorm1d(2)), torch.randn(2, 5, 4).double(),
     "batch_norm: the norm's channels are not the linear's features: dimension 1 of [5, 2, 4]"),
    ((nn.BatchNorm1d(5), View(lambda x: x.transpose(0, 1)), nn.Linear(4, 4)), torch.randn(2, 5, 4).double(),
     "linear: the norm's channels are not the linear's features: dimension 1 of [2, 5, 4]"),
    ((nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)), IMAGE,
     "batch_norm: the norm has no running statistics, so it is always in training mode: it uses those of the batch"),
    ((nn.Conv1d(4, 4, 1), nn.BatchNorm1d(6)), torch.randn(4, 6).double(),
     "batch_norm: the norm's channels are not the conv's: the input has 2 dimensions, not 3"),
    ((nn.BatchNorm1d(6), nn.Conv1d(4, 4, 1)), torch.randn(4, 6).double(),
     "conv1d: the norm's channels are not the conv's: the input has 2 dimensions, not 3"),
    ((nn.ConvTranspose1d(4, 4, 1), nn.BatchNorm1d(6)), torch.randn(4, 6).double(),
     "batch_norm: the norm's channels are not the conv's: the input has 2 dimensions, not 3"),
])
def test_what_is_not_folded_says_why(model: tuple[nn.Module, ...], x: Tensor, reason: str) -> None:
    made = randomised(*model)
    assert told(made, x) == [f"at {reason}"]
    assert "batch_norm" in left(made, x, FoldBatchnorm())


def test_a_norm_in_training_mode_says_so() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].train()
    with pytest.raises(ModelError, match=r"1 \(BatchNorm2d\) is in training mode"):
        told(model.double(), IMAGE)

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mean, self.var = nn.Conv2d(4, 4, 1), nn.Buffer(torch.zeros(4)), nn.Buffer(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return batch_norm(self.conv(x), self.mean.clone(), self.var.clone(), training=True)

    (reason,) = told(Functional().double().eval(), IMAGE)
    assert "training mode" in reason


def test_a_norm_whose_conv_has_other_users_says_so() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) * torch.relu(y)

    assert told(randomised(Both()), IMAGE) == ["at batch_norm: the intermediate value conv2d is also used by relu"]


def test_of_tied_convs_each_gets_what_it_needs() -> None:
    """One weight read twice: the norm is folded into a copy for its own conv, the other conv keeps the weight, and nothing is lost."""
    one, other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    other.weight = one.weight
    model = randomised(Sum(nn.Sequential(one, nn.BatchNorm2d(4)), nn.Sequential(nn.ReLU(), other)))
    after = rewritten(model, IMAGE, FoldBatchnorm())
    state = after.regions[""].module.state_dict()
    assert "branches.0.0.weight_folded" in state
    assert any(torch.equal(tensor, one.weight) for tensor in state.values())
