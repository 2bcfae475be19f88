"""Ops: the registered op means what its reference says, and passes through export, torch.compile and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_formats import make_mask
from torch import Tensor, nn
from torch.nn.functional import linear

from sparsify_compiler import catalog
from sparsify_compiler.formats._base import Format

NAMES = ("csr", "bitmap", "condensed", "nm", "bsr")


def make(name: str, rows: int = 7, columns: int = 12, density: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[Any, Format, Tensor]:
    """(op module, encoded weight, its dense form in float64)."""
    torch.manual_seed(0)
    mask, attributes = make_mask(name, rows, columns, density, 3, n=2, m=4)
    form = catalog.get("format", name).encode(torch.randn(mask.shape).to(dtype), mask, **attributes)
    return catalog.get("op", f"linear_{name}"), form, form.decode().double()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (2, 0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_op_and_reference_agree_with_dense(name: str, lead: tuple[int, ...], bias: bool) -> None:
    module, form, dense = make(name)
    x, b = torch.randn(*lead, form.in_features), torch.randn(form.out_features) if bias else None
    expected = linear(x.double(), dense, None if b is None else b.double())
    for function in (module.op, module.reference):
        y = function(x=x, **form.tensors(), bias=b, **form.attributes())
        assert y.dtype == x.dtype
        assert y.shape == expected.shape
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float64, torch.float64),
                                                (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_dtypes(name: str, x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    module, form, dense = make(name, dtype=dtype)
    x, b = torch.randn(4, form.in_features).to(x_dtype), torch.randn(form.out_features).to(dtype)
    y = module.op(x, *form.tensors().values(), b, **form.attributes())
    assert y.dtype == x_dtype
    torch.testing.assert_close(y, linear(x.double(), dense, b.double()).to(x_dtype))
    torch.testing.assert_close(y, module.reference(x, *form.tensors().values(), b, **form.attributes()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_only_kept_places_contribute(name: str, bad: float) -> None:
    module, form, _ = make(name)
    x = torch.randn(3, form.in_features)
    x[1, 4] = bad
    y = module.op(x, *form.tensors().values(), **form.attributes())
    assert torch.equal(y.isfinite()[1], ~form.mask()[:, 4])
    assert bool(y[[0, 2]].isfinite().all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_weights(name: str, density: float) -> None:
    module, form, dense = make(name, density=density)
    x = torch.randn(3, form.in_features)
    y = module.reference(x, *form.tensors().values(), **form.attributes())
    torch.testing.assert_close(y.double(), linear(x.double(), dense), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    module, form, _ = make(name, dtype=dtype)
    values, *indices = form.tensors().values()
    arguments = (torch.randn(3, form.in_features).to(dtype).requires_grad_(), values.clone().requires_grad_(), *indices,
                 torch.randn(form.out_features).to(dtype).requires_grad_())
    torch.library.opcheck(module.op, arguments, form.attributes())


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    module, form, _ = make(name, rows=5, dtype=torch.float64)
    values, *indices = form.tensors().values()
    bias = torch.randn(form.out_features, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, form.in_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v, b: module.op(x, v, *indices, b, **form.attributes()), (x, values.clone().requires_grad_(), bias))


@pytest.mark.parametrize("name", NAMES)
def test_no_grad_and_inference_mode(name: str) -> None:
    module, form, _ = make(name)
    x = torch.randn(3, form.in_features, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not module.op(x, *form.tensors().values(), **form.attributes()).requires_grad


class Layer(nn.Module):
    """A module around one op."""

    def __init__(self, op: Any, form: Format) -> None:
        super().__init__()
        self.op, self.attributes, self.names = op, form.attributes(), tuple(form.tensors())
        for name, tensor in form.tensors().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x=x, **{name: getattr(self, name) for name in self.names}, **self.attributes).relu()


@pytest.mark.parametrize("name", NAMES)
def test_export_with_dynamic_rows(name: str) -> None:
    module, form, _ = make(name)
    layer, x = Layer(module.op, form), torch.randn(3, form.in_features)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},), strict=False)
    assert f"sparsify.linear_{name}" in str(exported.graph)
    other = torch.randn(9, form.in_features)
    torch.testing.assert_close(exported.module()(other), layer(other))


@pytest.mark.parametrize("name", NAMES)
def test_torch_compile(name: str) -> None:
    module, form, _ = make(name)
    layer = Layer(module.op, form)
    x = torch.randn(3, form.in_features, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", NAMES)
def test_wrong_width_is_refused(name: str) -> None:
    module, form, _ = make(name)
    with pytest.raises(RuntimeError, match="needs"):
        module.op(torch.randn(3, form.in_features + 1), *form.tensors().values(), **form.attributes())
