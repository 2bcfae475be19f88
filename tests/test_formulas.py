"""Costs: every formula is asked whether it is true, of the tensors that are moved and of the operations that are done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import Expr
from test_formats import make_mask
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparsify_compiler import catalog
from sparsify_compiler.cost_models.symbols import TABLE, compiled, evaluate
from sparsify_compiler.formats._base import Format

DENSE = ("linear", "conv2d", "elementwise")
SPARSE = ("linear_csr", "linear_bitmap", "linear_condensed", "linear_nm", "linear_bsr")

CONVOLUTIONS = tuple(name.replace("linear", "conv2d") for name in SPARSE)


class Products(TorchDispatchMode):
    """Counts two operations for every product that elementwise multiplication makes and a sum takes up."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mul.Tensor and result.is_floating_point():
            self.flops += 2 * result.numel()
        return result


def counted(op: str, x: Tensor, form: Format) -> int:
    """Operations that the op's reference does."""
    with FlopCounterMode(display=False) as matrix, Products() as products:
        catalog.get("op", op).reference(x, **form.tensors(), **form.attributes())
    return int(matrix.get_total_flops()) + products.flops


def sizes_of(form: Format, mask: Tensor, x: Tensor) -> dict[str, float]:
    sizes: dict[str, float] = {"M": x.shape[0], "N": mask.shape[0], "K": mask.shape[1], "density": float(mask.sum()) / max(mask.numel(), 1),
                               "value_bytes": form.values.element_size(), "x_bytes": x.element_size()}
    attributes = {k: v for k, v in form.attributes().items() if k in TABLE}
    if "r" in attributes:
        blocks = -(-mask.shape[0] // attributes["r"]) * (mask.shape[1] // attributes["c"])
        sizes["density"] = form.values.shape[0] / blocks
    return {**sizes, **attributes}


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.sampled_from(SPARSE), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.sampled_from([0.0, 0.3, 1.0]),
       st.sampled_from([torch.float32, torch.bfloat16]), st.integers(1, 4), st.integers(1, 3))
def test_flops_and_bytes_are_true(op: str, rows: int, columns: int, tokens: int, density: float, dtype: torch.dtype, r: int, c: int) -> None:
    name = op.removeprefix("linear_")
    mask, attributes = make_mask(name, rows, columns, density, 0, n=min(c, 2), m=3, r=r, c=c)
    form = catalog.get("format", name).encode(torch.randn(mask.shape).to(dtype), mask, **attributes)
    x = torch.randn(tokens, mask.shape[1]).to(dtype)
    y = catalog.get("op", op).op(x, *form.tensors().values(), **form.attributes())
    cost, sizes = catalog.get("cost", op), sizes_of(form, mask, x)
    moved = form.bytes() + sum(t.numel() * t.element_size() for t in (x, y))
    assert evaluate(cost.BYTES, sizes) == pytest.approx(moved, rel=1e-9)
    assert evaluate(cost.FLOPS, sizes) == pytest.approx(counted(op, x, form), rel=1e-9)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.sampled_from(CONVOLUTIONS), st.integers(1, 9), st.integers(1, 4), st.tuples(st.integers(1, 3), st.integers(1, 2)),
       st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 2), st.integers(1, 4))
def test_of_convolutions_too(op: str, outputs: int, channels: int, kernel: tuple[int, int], density: float, stride: int, r: int) -> None:
    name, taps = op.removeprefix("conv2d_"), kernel[0] * kernel[1]
    mask, attributes = make_mask(name, outputs, channels * taps, density, 0, n=1, m=1, r=r, c=1)
    form = catalog.get("format", name).encode(torch.randn(mask.shape), mask, **attributes)
    x = torch.randn(2, channels, 5, 4)
    numbers = {**form.attributes(), "kernel_size": kernel, "stride": [stride, 1], "padding": [1, 0], "dilation": [1, 1], "groups": 1}
    with FlopCounterMode(display=False) as matrix, Products() as products:
        y = catalog.get("op", op).reference(x, *form.tensors().values(), **numbers)
    sizes = sizes_of(form, mask, x) | {"M": y[:, 0].numel(), "K": channels, "taps": taps, "read": x.numel(), "written": y.numel()}
    cost = catalog.get("cost", op)
    assert evaluate(cost.BYTES, sizes) == pytest.approx(form.bytes() + 4 * (x.numel() + y.numel()), rel=1e-9)
    assert evaluate(cost.FLOPS, sizes) == pytest.approx(matrix.get_total_flops() + products.flops, rel=1e-9)


def test_wide_weights_have_wider_indices() -> None:
    mask, _ = make_mask("csr", 2, 40000, 0.5, 0)
    form = catalog.get("format", "csr").encode(torch.randn(2, 40000), mask)
    x = torch.randn(1, 40000)
    moved = form.bytes() + 4 * (40000 + 2)
    assert evaluate(catalog.get("cost", "linear_csr").BYTES, sizes_of(form, mask, x)) == pytest.approx(moved)


def test_dense() -> None:
    cost, x, weight = catalog.get("cost", "linear"), torch.randn(3, 8), torch.randn(5, 8)
    with FlopCounterMode(display=False) as counter:
        y = linear(x, weight)
    sizes = {"M": 3, "N": 5, "K": 8, "value_bytes": 4, "x_bytes": 4}
    assert evaluate(cost.FLOPS, sizes) == counter.get_total_flops()
    assert evaluate(cost.BYTES, sizes) == sum(t.numel() * 4 for t in (x, weight, y))


@pytest.mark.parametrize("name", catalog.names("cost"))
def test_formulas_use_the_table_only(name: str) -> None:
    module = catalog.get("cost", name)
    for formula in (module.FLOPS, module.BYTES):
        assert isinstance(formula, Expr)
        assert {symbol.name for symbol in formula.free_symbols} <= set(TABLE)
    assert name in DENSE or name in catalog.names("op")


def test_every_op_has_a_cost() -> None:
    assert set(catalog.names("op")) <= set(catalog.names("cost"))


def test_a_number_that_is_missing_or_has_no_symbol_is_named() -> None:
    moved, sizes = catalog.get("cost", "linear").BYTES, {"M": 1, "N": 64, "K": 64, "value_bytes": 4, "x_bytes": 4}
    assert evaluate(moved, sizes) == compiled(moved)(sizes) == 4 * (64 + 64 + 64 * 64)
    with pytest.raises(KeyError, match="value_bytes"):
        evaluate(moved, {k: v for k, v in sizes.items() if k != "value_bytes"})
    with pytest.raises(KeyError, match="value_bytes"):
        compiled(moved)({k: v for k, v in sizes.items() if k != "value_bytes"})
    with pytest.raises(KeyError, match="rows"):
        evaluate(moved, {**sizes, "rows": 3})
