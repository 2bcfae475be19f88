"""experts_ffn: the op means what its formula says, for every choice of experts, and trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from sparsify_compiler import catalog
from sparsify_compiler.cost_models.symbols import evaluate
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.ops.select_ffn import ACTIVATIONS, hidden

SIZES = (5, 6, 7)  # K, H, N


def make(experts: int = 4, gated: bool = True, bias: bool = True, dtype: torch.dtype = torch.float64,
         sizes: tuple[int, int, int] = SIZES) -> dict[str, Any]:
    """The experts' weights."""
    torch.manual_seed(0)
    k, h, n = sizes
    shapes = {"gate": (experts, h, k), "up": (experts, h, k), "down": (experts, n, h),
              "gate_bias": (experts, h), "up_bias": (experts, h), "bias": (experts, n)}
    present = {name: gated or not name.startswith("up") for name in shapes}
    present |= {name: present[name] and bias for name in ("gate_bias", "up_bias", "bias")}
    return {name: torch.randn(size, dtype=torch.float64).to(dtype) if present[name] else None for name, size in shapes.items()}


def formula(x: Tensor, chosen: Tensor, weights: Tensor | None, own: dict[str, Any], activation: str) -> Tensor:
    """Row by row, place by place, in plain differentiable torch."""
    rows = x.reshape(-1, x.shape[-1])
    picked = chosen.reshape(rows.shape[0], chosen.shape[-1])
    out = []
    for row, experts in enumerate(picked.tolist()):
        total = rows.new_zeros(own["down"].shape[1])
        for place, e in enumerate(experts):
            if e >= 0:
                at = {name: None if tensor is None else tensor[e] for name, tensor in own.items()}
                up = None if at["up"] is None else linear(rows[row], at["up"], at["up_bias"])
                y = linear(hidden(activation, linear(rows[row], at["gate"], at["gate_bias"]), up), at["down"], at["bias"])
                total = total + (y if weights is None else y * weights.reshape(picked.shape)[row, place])
        out.append(total)
    return torch.stack(out).reshape(*x.shape[:-1], -1) if out else x.new_zeros((*x.shape[:-1], own["down"].shape[1]))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(lead=st.sampled_from([(), (1,), (5,), (2, 3), (0,), (2, 0)]), k=st.integers(0, 4), experts=st.sampled_from([1, 2, 5]), gated=st.booleans(),
       bias=st.booleans(), weighted=st.booleans(), index=st.sampled_from([torch.int32, torch.int64]), activation=st.sampled_from(sorted(ACTIVATIONS)))
def test_it_is_the_formula(lead: tuple[int, ...], k: int, experts: int, gated: bool, bias: bool, weighted: bool, index: torch.dtype,
                           activation: str) -> None:
    own = make(experts, gated, bias)
    x, weights = torch.randn(*lead, SIZES[0], dtype=torch.float64), torch.rand(*lead, k, dtype=torch.float64) if weighted else None
    chosen = torch.randint(-1, experts, (*lead, k)).to(index)  # with repetition, and with none
    expected = formula(x, chosen, weights, own, activation)
    for function in (experts_ffn.op, experts_ffn.reference):
        y = function(x, chosen, weights, **own, activation=activation)
        assert y.shape == (*lead, SIZES[2])
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize(("gated", "bias", "weighted"), [(True, True, True), (True, False, False), (False, True, True)])
def test_gradients(activation: str, gated: bool, bias: bool, weighted: bool) -> None:
    own = {name: None if tensor is None else tensor.requires_grad_() for name, tensor in make(3, gated, bias).items()}
    x, weights = torch.randn(6, SIZES[0], dtype=torch.float64, requires_grad=True), torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 1], [-1, 1], [-1, -1], [1, 0], [0, -1]])  # nobody takes expert 2
    leaves = [tensor for tensor in (x, weights if weighted else None, *own.values()) if tensor is not None]
    toward = torch.randn(6, SIZES[2], dtype=torch.float64)
    given = (x, chosen, weights if weighted else None)
    found, expected = (torch.autograd.grad(y, leaves, toward) for y in (experts_ffn.op(*given, **own, activation=activation),
                                                                         formula(*given, own, activation)))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_is_needed_is_differentiated() -> None:
    own = make(3)
    x, weights = torch.randn(4, SIZES[0], dtype=torch.float64), torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    y = experts_ffn.op(x, torch.tensor([[0, 1]] * 4), weights, **own, activation="silu")
    y.sum().backward()
    assert weights.grad is not None
    assert all(tensor.grad is None for tensor in own.values())


def test_opcheck() -> None:
    own = {name: tensor.clone().requires_grad_() for name, tensor in make(3, dtype=torch.bfloat16).items()}
    given = (torch.randn(4, SIZES[0]).bfloat16().requires_grad_(), torch.randint(-1, 3, (4, 2)), torch.rand(4, 2).requires_grad_())
    torch.library.opcheck(experts_ffn.op, given, {**own, "activation": "silu"})


@pytest.mark.parametrize(("x_dtype", "dtype"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
                                                (torch.float32, torch.bfloat16)])
def test_dtypes(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    own = make(3, dtype=dtype)
    x, chosen, weights = torch.randn(4, SIZES[0]).to(x_dtype), torch.randint(-1, 3, (4, 2)), torch.rand(4, 2)
    wide = {name: None if tensor is None else tensor.double() for name, tensor in own.items()}
    expected = formula(x.double(), chosen, weights.double(), wide, "silu")
    exact, y = (function(x, chosen, weights, **own, activation="silu") for function in (experts_ffn.reference, experts_ffn.op))
    assert exact.dtype is y.dtype is x_dtype
    torch.testing.assert_close(exact, expected.to(x_dtype), rtol=1e-2 if x_dtype is not torch.float32 else 1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), expected, rtol=3e-2, atol=3e-2 * float(expected.abs().max()))


def test_weights_are_not_rounded_to_the_dtype_of_x() -> None:
    x, own = torch.ones(1, SIZES[0], dtype=torch.bfloat16), make(3, bias=False, dtype=torch.bfloat16)
    weights = torch.tensor([[1 + 2**-10, -1]], dtype=torch.float32)  # 1 and -1 in bfloat16
    for function in (experts_ffn.op, experts_ffn.reference):
        y = function(x, torch.tensor([[1, 1]]), weights, **own, activation="silu")
        assert float(y.abs().max()) > 0


def test_nan_reaches_only_those_who_chose() -> None:
    own = make(3, dtype=torch.float32)
    own["down"][1, 2, 3] = float("nan")
    y = experts_ffn.op(torch.randn(4, SIZES[0]), torch.tensor([[0, 2], [1, 0], [-1, -1], [2, 2]]), None, **own, activation="silu")
    assert y.isnan().any(1).tolist() == [False, True, False, False]
    assert not bool(y[2].any())


def test_cost() -> None:
    own = make(4, bias=False, dtype=torch.float32)
    sizes = {"M": 1, "K": 5, "hidden": 6, "N": 7, "experts": 4, "chosen": 2, "value_bytes": 4, "x_bytes": 4}
    with FlopCounterMode(display=False) as matrix:
        experts_ffn.reference(torch.randn(1, 5), torch.tensor([[0, 3]]), torch.rand(1, 2), **own, activation="silu")
    cost = catalog.get("cost", "experts_ffn")
    assert evaluate(cost.FLOPS, sizes) == pytest.approx(matrix.get_total_flops() + 2 * 2 * 6 + 2 * 2 * 7)
    assert evaluate(cost.BYTES, sizes) == pytest.approx(4 * 2 * 6 * (5 + 5 + 7) + 4 * (5 + 7) + 2 * (8 + 4))


def test_weights_that_are_views() -> None:
    own = make(3, bias=False)
    fused = torch.cat((own["gate"], own["up"]), 1)
    x, chosen = torch.randn(SIZES[0], 4, dtype=torch.float64).t(), torch.randint(3, (2, 4)).t()
    expected = experts_ffn.op(x, chosen, None, **own, activation="gelu")
    own |= {"gate": fused[:, : SIZES[1]], "up": fused[:, SIZES[1] :]}
    torch.testing.assert_close(experts_ffn.op(x, chosen, None, **own, activation="gelu"), expected)


def test_all_experts_of_a_split_ffn_are_the_dense_one() -> None:
    gate, up, down = torch.randn(12, 5), torch.randn(12, 5), torch.randn(7, 12)
    parts = (gate.view(4, 3, 5), up.view(4, 3, 5), down.view(7, 4, 3).transpose(0, 1))
    x = torch.randn(2, 3, 5)
    y = experts_ffn.op(x, torch.arange(4).expand(2, 3, 4), None, *parts, activation="silu")
    torch.testing.assert_close(y, linear(hidden("silu", linear(x, gate), linear(x, up)), down))


@pytest.mark.parametrize(("change", "what"), [
    ({"x": torch.zeros(4, 9, dtype=torch.float64)}, "shapes"), ({"chosen": torch.zeros(3, 2, dtype=torch.int64)}, "shapes"),
    ({"weights": torch.zeros(4, 3, dtype=torch.float64)}, "shapes"), ({"down": torch.zeros(4, 7, 5, dtype=torch.float64)}, "shapes"),
    ({"bias": torch.zeros(4, 6, dtype=torch.float64)}, "shapes"), ({"up": torch.zeros(4, 5, 5, dtype=torch.float64)}, "shapes"),
    ({"up": None}, "shapes"), ({"chosen": torch.zeros(4, 2, dtype=torch.float32)}, "int32 or int64"),
    ({"chosen": torch.full((4, 2), 4, dtype=torch.int64)}, "expert 4 was chosen of 4"),
    ({"chosen": torch.full((4, 2), -2, dtype=torch.int64)}, "expert -2"),
    ({"activation": "sine"}, "no activation 'sine'"),
])  # fmt: skip
def test_what_does_not_fit_is_said(change: dict[str, Any], what: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(4, 5, dtype=torch.float64), "chosen": torch.zeros(4, 2, dtype=torch.int64), "weights": None, **make(),
                             "activation": "silu"}
    with pytest.raises(RuntimeError, match=what):
        experts_ffn.op(**given | change)


def test_it_compiles_and_trains() -> None:
    own = {name: None if tensor is None else tensor.requires_grad_() for name, tensor in make(3, bias=False, dtype=torch.float32).items()}
    x, chosen = torch.randn(4, SIZES[0]), torch.randint(3, (4, 2))
    exported = torch.export.export(Experts(own), (x, chosen), strict=False)
    assert experts_ffn.op in [node.target for node in exported.graph.nodes]
    torch.testing.assert_close(exported.module()(x, chosen), experts_ffn.op(x, chosen, None, **own, activation="silu"))


class Experts(torch.nn.Module):
    def __init__(self, own: dict[str, Any]) -> None:
        super().__init__()
        for name, tensor in own.items():
            setattr(self, name, None if tensor is None else torch.nn.Parameter(tensor.detach()))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        y: Tensor = experts_ffn.op(x, chosen, None, self.gate, self.up, self.down, activation="silu")
        return y
