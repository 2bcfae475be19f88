"""Calling an operator directly gives what calling it through torch.ops gives, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler.direct import DIRECT

aten = torch.ops.aten
torch.manual_seed(0)
LINE, IMAGE, CUBE = torch.randn(2, 4, 9), torch.randn(2, 4, 9, 8), torch.randn(1, 2, 4, 4, 4)
HEADS = tuple(torch.randn(2, 3, 5, 4) for _ in range(3))

# All arguments of one call, as the executor writes it: positions as in the schema, then what has only a name.
CALLS: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.linear.default: ((LINE, torch.randn(3, 9), torch.randn(3)), {}),
    aten.conv1d.default: ((LINE, torch.randn(6, 2, 3), torch.randn(6), [2], [1], [2], 2), {}),
    aten.conv2d.default: ((IMAGE, torch.randn(6, 2, 3, 2), None, [2, 1], [1, 0], [1, 2], 2), {}),
    aten.conv3d.default: ((CUBE, torch.randn(3, 2, 2, 1, 3), torch.randn(3), [1, 2, 1], [0, 1, 0], [1, 1, 1], 1), {}),
    aten.layer_norm.default: ((LINE, [9], torch.randn(9), torch.randn(9), 1e-3), {}),
    aten.matmul.default: ((LINE, LINE.mT), {}),
    aten.softmax.int: ((LINE, 1, torch.float64), {}),
    aten.scaled_dot_product_attention.default: ((*HEADS, None, 0.0, True), {"scale": 0.3}),
    aten.relu.default: ((LINE,), {}), aten.gelu.default: ((LINE,), {"approximate": "tanh"}), aten.silu.default: ((LINE,), {}),
    aten.sigmoid.default: ((LINE,), {}), aten.tanh.default: ((LINE,), {}), aten.hardtanh.default: ((LINE, -0.5, 0.25), {}),
    aten.hardswish.default: ((3 * LINE,), {}),
    aten.add.Tensor: ((LINE, LINE.flip(0)), {"alpha": 2}), aten.sub.Tensor: ((LINE, 3), {}), aten.mul.Tensor: ((LINE, 0.1), {}),
    aten.div.Tensor: ((LINE, LINE.flip(1)), {}),
    aten.mean.dim: ((IMAGE, [2, -1], True), {"dtype": torch.float64}),
    aten.adaptive_avg_pool2d.default: ((IMAGE, [2, 3]), {}), aten.avg_pool2d.default: ((IMAGE, [3, 2], [2, 1], [1, 0], True, False, 3), {}),
    aten.max_pool2d.default: ((IMAGE, [3, 2], [2, 1], [1, 0], [1, 2], True), {}), aten.pad.default: ((IMAGE, [0, 1, 2, 0], "constant", 0.5), {}),
    aten.reshape.default: ((LINE, [2, -1, 3]), {}), aten.view.default: ((LINE, [8, 9]), {}), aten.permute.default: ((IMAGE, [0, 2, 3, 1]), {}),
    aten.transpose.int: ((LINE, 1, -1), {}), aten.flatten.using_ints: ((IMAGE, 1, -2), {}), aten.unsqueeze.default: ((LINE, -1), {}),
    aten.squeeze.dim: ((LINE[:, :, :1], 2), {}), aten.unbind.int: ((LINE, 1), {}), aten.select.int: ((LINE, 1, -2), {}),
    aten.chunk.default: ((LINE, 2, 1), {}), aten.cat.default: (([LINE, LINE], -1), {}),
}  # fmt: skip


@pytest.mark.parametrize("operator", DIRECT, ids=str)
def test_it_is_the_same(operator: Any) -> None:
    positional, named = CALLS[operator]
    want, got = operator(*positional, **named), DIRECT[operator](*positional, **named)
    if isinstance(want, Tensor):
        want, got = [want], [got]
    assert len(want) == len(got)
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


@pytest.mark.parametrize("operator", DIRECT, ids=str)
def test_the_call_uses_every_argument_that_has_a_place(operator: Any) -> None:
    """So that a binding with another order of arguments is found out."""
    places = [argument for argument in operator._schema.arguments if not argument.kwarg_only]
    assert len(CALLS[operator][0]) >= len([argument for argument in places if argument.name != "cudnn_enable"])


def test_padding_keeps_the_layout_and_the_gradient() -> None:
    last = IMAGE.contiguous(memory_format=torch.channels_last)
    for x in (IMAGE, last, IMAGE.flip(-1).transpose(2, 3), IMAGE[:, :, :0], IMAGE[:, :1].contiguous(memory_format=torch.channels_last)):
        for pad, mode, value in (([0, 1, 0, 1], "constant", None), ([2, 0, 1, 3], "constant", -1.5), ([0, 0, 0, 0], "constant", 2.0),
                                 ([1, -1, 0, 2], "constant", 0.5), ([3, 1], "constant", 0.0), ([1, 1, 1, 1], "reflect", None)):
            if mode == "reflect" and not x.numel():
                continue
            want, got = aten.pad.default(x, pad, mode, value), DIRECT[aten.pad.default](x, pad, mode, value)
            assert torch.equal(want, got)
            assert want.stride() == got.stride()
    leaf = IMAGE.clone().requires_grad_()
    DIRECT[aten.pad.default](leaf, [1, 1, 1, 1]).sum().backward()
    assert leaf.grad is not None
    assert bool((leaf.grad == 1).all())
