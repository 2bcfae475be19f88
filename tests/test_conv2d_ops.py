"""Sparse convolution ops: they mean what the dense convolution with the masked weight does, and pass through export, torch.compile and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import make_mask
from torch import Tensor, nn
from torch.nn.functional import conv2d

from sparsify_compiler import catalog
from sparsify_compiler.formats._base import Format

NAMES = ("csr", "condensed", "nm", "bsr", "bitmap")
Made = tuple[Any, Format, dict[str, Any], Tensor]


def make(name: str, outputs: int = 6, channels: int = 4, kernel: tuple[int, int] = (3, 3), groups: int = 2, density: float = 0.5,
         dtype: torch.dtype = torch.float32, **geometry: list[int]) -> Made:
    """(op module, encoded weight, the op's numbers, the masked weight in float64)."""
    torch.manual_seed(0)
    columns = channels // groups * kernel[0] * kernel[1]
    mask, attributes = make_mask(name, outputs, columns, density, 3, n=1, m=2) if name == "nm" else make_mask(name, outputs, columns, density, 3)
    form = catalog.get("format", name).encode(torch.randn(mask.shape).to(dtype), mask, **attributes)
    numbers = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "kernel_size": list(kernel), "groups": groups, **geometry}
    return catalog.get("op", f"conv2d_{name}"), form, form.attributes() | numbers, form.decode().double().view(outputs, -1, *kernel)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, numbers: dict[str, Any]) -> Tensor:
    offset = None if bias is None else bias.double()
    return conv2d(x.double(), weight, offset, numbers["stride"], numbers["padding"], numbers["dilation"], numbers["groups"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(name=st.sampled_from(NAMES), kernel=st.tuples(st.integers(1, 3), st.integers(1, 4)), groups=st.sampled_from([1, 2]), batch=st.integers(0, 3),
       geometry=st.fixed_dictionaries({key: st.lists(st.integers(low, 3), min_size=2, max_size=2)
                                       for key, low in (("stride", 1), ("padding", 0), ("dilation", 1))}),
       extra=st.tuples(st.integers(0, 5), st.integers(0, 5)), density=st.sampled_from([0.0, 0.4, 1.0]), bias=st.booleans())
def test_op_and_reference_agree_with_dense(name: str, kernel: tuple[int, int], groups: int, batch: int, geometry: dict[str, list[int]],
                                           extra: tuple[int, int], density: float, bias: bool) -> None:
    module, form, numbers, weight = make(name, kernel=kernel, groups=groups, density=density, **geometry)
    size = [(k - 1) * d + 1 + more for k, d, more in zip(kernel, geometry["dilation"], extra, strict=True)]
    x, offset = torch.randn(batch, 4, *size), torch.randn(6) if bias else None
    expected = dense(x, weight, offset, numbers)
    for function in (module.op, module.reference):
        y = function(x, *form.tensors().values(), offset, **numbers)
        assert y.dtype == x.dtype
        assert y.shape == expected.shape
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64), (torch.float32, torch.bfloat16)])
def test_dtypes(name: str, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    module, form, numbers, weight = make(name, dtype=dtype)
    x, bias = torch.randn(2, 4, 5, 5).to(x_dtype), torch.randn(6).to(dtype)
    y = module.op(x, *form.tensors().values(), bias, **numbers)
    assert y.dtype == x_dtype
    torch.testing.assert_close(y, dense(x, weight, bias, numbers).to(x_dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_only_kept_places_contribute(name: str, bad: float) -> None:
    module, form, numbers, _ = make(name, kernel=(1, 1), groups=1, padding=[0, 0])
    x = torch.randn(2, 4, 3, 3)
    x[1, 2, 1, 1] = bad
    y = module.op(x, *form.tensors().values(), **numbers)
    assert torch.equal(y[1, :, 1, 1].isfinite(), ~form.mask()[:, 2])
    y[1, :, 1, 1] = 0
    assert bool(y.isfinite().all())


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_x_is_kept(name: str) -> None:
    module, form, numbers, weight = make(name)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    for given_x in (x, torch.full_like(x, float("nan"))):
        assert module.op(given_x, *form.tensors().values(), **numbers).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(module.op(x, *form.tensors().values(), **numbers).double(), dense(x, weight, None, numbers), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    module, form, numbers, _ = make(name)
    values, *indices = form.tensors().values()
    arguments = (torch.randn(2, 4, 5, 6).requires_grad_(), values.clone().requires_grad_(), *indices, torch.randn(6).requires_grad_())
    torch.library.opcheck(module.op, arguments, numbers)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    module, form, numbers, _ = make(name, dtype=torch.float64, stride=[2, 1])
    values, *indices = form.tensors().values()
    bias, x = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((6,), (2, 4, 4, 3)))
    assert torch.autograd.gradcheck(lambda x, v, b: module.op(x, v, *indices, b, **numbers), (x, values.clone().requires_grad_(), bias))


class Layer(nn.Module):
    """A module around one op."""

    def __init__(self, op: Any, form: Format, numbers: dict[str, Any]) -> None:
        super().__init__()
        self.op, self.numbers, self.names = op, numbers, tuple(form.tensors())
        for name, tensor in form.tensors().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *(getattr(self, name) for name in self.names), **self.numbers).relu()


@pytest.mark.parametrize("name", NAMES)
def test_export_and_torch_compile(name: str) -> None:
    module, form, numbers, _ = make(name)
    layer, x = Layer(module.op, form, numbers), torch.randn(3, 4, 6, 5)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch"), 2: torch.export.Dim("height")},), strict=False)
    assert f"sparsify.conv2d_{name}" in str(exported.graph)
    other = torch.randn(5, 4, 9, 5)
    torch.testing.assert_close(exported.module()(other), layer(other))
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_other_channels_are_refused(name: str) -> None:
    module, form, numbers, _ = make(name)
    for shape in ((2, 5, 5, 5), (4, 5, 5)):
        with pytest.raises(RuntimeError, match="needs"):
            module.op(torch.randn(shape), *form.tensors().values(), **numbers)
