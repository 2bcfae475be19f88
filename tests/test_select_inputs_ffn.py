"""An FFN of which every linear selects its inputs, in one call: the op, its kernel, and where lowering takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_help import check_lowered
from torch import Tensor

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.codegen import runtime
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.ops import select, select_ffn, select_inputs_ffn, select_linear
from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.target import host

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3}
LINEARS = ("gate", "up", "down")


def made(k: int, h: int, n: int, dtype: torch.dtype, limits: tuple[float, ...], biased: bool, scaled: bool, centered: bool, gated: bool,
         alike: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Tensors of an FFN, and its last bias."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for name, limit in zip(LINEARS, limits, strict=True):
        if name == "up" and not gated:
            continue
        inputs, outputs = (h, n) if name == "down" else (k, h)
        tensors[name] = (torch.randn(inputs, outputs) / inputs**0.5).to(dtype)
        tensors[f"{name}_limit"] = torch.tensor(limit)
        if scaled:
            tensors[f"{name}_scale"] = torch.rand(inputs) + 0.5
        if centered:
            tensors[f"{name}_center"] = torch.randn(inputs).to(dtype) / 4
        if biased and name != "down":
            tensors[f"{name}_bias"] = torch.randn(outputs).to(dtype)
    if gated and alike:
        tensors |= {f"up_{by}": tensors[f"gate_{by}"] for by in ("limit", "scale", "center") if f"gate_{by}" in tensors}
    return tensors, torch.randn(n).to(dtype) if biased else None


def bound(tensors: dict[str, Tensor], bias: Tensor | None, activation: str) -> Any:
    found = runtime.candidates("select_inputs_ffn", tensors, {"activation": activation}, tensors["gate"].dtype, (1,), host())
    if not found:
        pytest.skip("this machine has no kernel that gathers")
    return found[0].bind(bias)


def on_the_limit(x: Tensor, tensors: dict[str, Tensor], activation: str) -> bool:
    """Is an input of down so near to its limit that rounding decides?"""
    def linear(name: str) -> Tensor:
        chosen = select.reference(x, *(tensors.get(f"{name}_{by}") for by in ("limit", "scale", "center")))
        return chosen @ tensors[name] + tensors.get(f"{name}_bias", 0)

    hidden = select_ffn.ACTIVATIONS[activation](linear("gate"))
    if "up" in tensors:
        hidden = hidden * select_ffn.raised(activation, linear("up"))
    scores = select.score(hidden - tensors.get("down_center", 0), tensors.get("down_scale"))
    return bool(((scores - tensors["down_limit"]).abs() < 1e-4).any()) and bool(tensors["down_limit"])


# Few of the many kernels: each is built. dtype, activation; are there biases, scales, centres, up, and does up select as gate does?
@pytest.mark.parametrize(("dtype", "activation", "options"), [
    (torch.float32, "silu", (False, False, False, True, True)), (torch.bfloat16, "drelu", (True, True, True, True, False)),
    (torch.float32, "gelu", (True, False, True, False, False))])
@settings(max_examples=15, derandomize=True, deadline=None)
@given(st.integers(1, 90), st.integers(65, 128), st.integers(1, 64), st.integers(0, 6), st.tuples(*[st.sampled_from([0.0, 0.3, 1.0, 100.0])] * 3))
def test_a_kernel_is_its_op(dtype: torch.dtype, activation: str, options: tuple[bool, ...], k: int, h: int, n: int, rows: int,
                            limits: tuple[float, ...]) -> None:
    tensors, bias = made(k, h, n, dtype, limits, *options)
    kernel, x = bound(tensors, bias, activation), torch.randn(rows, k).to(dtype)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    exact = select_inputs_ffn.reference(x.double(), **wide, bias=None if bias is None else bias.double(), activation=activation)
    y = kernel(x)
    assert y.shape == exact.shape == (rows, n)
    few = rows <= 2 or dtype is torch.float32  # more rows of bfloat16 round between the linears, and so select others
    if rows and few and not on_the_limit(x.double(), wide, activation):
        assert float((y.double() - exact).abs().max()) <= TOLERANCE[dtype] * max(float(exact.abs().max()), 1.0)
    if rows:
        x[0, 0] = float("nan")
        assert bool(kernel(x)[0].isnan().all())
    with pytest.raises(InputError):
        kernel(torch.randn(1, k + 1).to(dtype))


def test_the_op_is_its_formula() -> None:
    for gated in (True, False):
        tensors, bias = made(12, 20, 7, torch.float32, (0.3, 0.5, 0.1), True, True, True, gated, False)
        x = torch.randn(2, 3, 12)

        def linear(x: Tensor, name: str, bias: Tensor, tensors: dict[str, Tensor] = tensors) -> Tensor:
            chosen = select.reference(x, *(tensors[f"{name}_{by}"] for by in ("limit", "scale", "center")))
            return chosen @ tensors[name] + bias

        hidden = torch.nn.functional.silu(linear(x, "gate", tensors["gate_bias"]))
        hidden = hidden * linear(x, "up", tensors["up_bias"]) if gated else hidden
        assert bias is not None
        for function in (select_inputs_ffn.op, select_inputs_ffn.reference):
            torch.testing.assert_close(function(x, **tensors, bias=bias, activation="silu"), linear(hidden, "down", bias))
        torch.library.opcheck(select_inputs_ffn.op, (x,), {**tensors, "bias": bias, "activation": "silu"})


def test_its_costs_are_true() -> None:
    from sparsify_compiler.cost_models.symbols import evaluate

    k, h, n = 12, 20, 7
    sizes = {"M": 1, "N": n, "K": k, "hidden": h, "density": 0.5, "value_bytes": 4, "x_bytes": 4}
    read = (2 * k * h + h * n) // 2 + 2 * (2 * k + h) + 3 + k + n  # weights, scales and centres, limits, x and y
    assert evaluate(catalog.get("cost", "select_inputs_ffn").BYTES, sizes) == pytest.approx(4 * read)
    assert evaluate(catalog.get("cost", "select_inputs_ffn").FLOPS, sizes) == pytest.approx(2 * k * h + h * n + 4 * (2 * k + h) + 2 * h)


def test_nothing_skipped_is_dense_and_files_bring_a_kernel_back() -> None:
    tensors, bias = made(64, 128, 64, torch.float32, (0.0, 0.0, 0.0), True, False, False, True, True)
    kernel, x = bound(tensors, bias, "silu"), torch.randn(1, 1, 64)
    hidden = torch.nn.functional.silu(x @ tensors["gate"] + tensors["gate_bias"]) * (x @ tensors["up"] + tensors["up_bias"])
    torch.testing.assert_close(kernel(x), hidden @ tensors["down"] + bias)
    again = runtime.rebind("select_inputs_ffn", kernel.options, tensors, {"activation": "silu"}, bias, kernel.files(), kernel.target)
    assert torch.equal(kernel(x), again(x))
    with pytest.raises(KernelError):
        runtime.rebind("select_inputs_ffn", kernel.options, {**tensors, "down": torch.randn(3, 64)}, {"activation": "silu"}, bias, {}, kernel.target)


def test_what_has_no_kernel_is_not_offered_one() -> None:
    tensors, _ = made(16, 32, 16, torch.float32, (0.1, 0.1, 0.1), False, False, False, True, False)
    for change in ({"down_limit": torch.rand(3, 1)}, {"up": tensors["up"].double()}):
        assert not runtime.candidates("select_inputs_ffn", {**tensors, **change}, {"activation": "silu"}, torch.float32, (1,), host())
    with pytest.raises(RuntimeError, match="up and up_limit come together"):
        select_inputs_ffn.op(torch.randn(1, 16), **{name: t for name, t in tensors.items() if name != "up_limit"}, activation="silu")


class _Ffn(torch.nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.gate, self.down = torch.nn.Linear(256, 512), torch.nn.Linear(512, 256)
        self.up = torch.nn.Linear(256, 512) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.gate(x))
        return self.down(hidden if self.up is None else self.up(x) * hidden)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("gated", "center", "margin"), [(True, "zero", -1000.0), (False, "mean", -1000.0), (True, "mean", 1.0)])
def test_packed_and_lowered_models_compute_the_same(gated: bool, center: Any, margin: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 256),) for _ in range(3)]
    check_lowered(SelectInputs(center=center, density=0.4), _Ffn(gated).eval(), data, (1, 2, 30), tmp_path, margin)


def test_an_ffn_in_one_call_is_said_so() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 256),) for _ in range(3)]
    recipe = Pipeline.parse("select_inputs(density=0.5) | pack() | lower(margin=-1000.0)")
    made = sc.compile(_Ffn(True).eval(), data[0], calibration=data, recipe=recipe)
    called = [node.target for _, node in made.program.nodes() if node.op == "call_function"]
    if select_linear.op not in called and select_inputs_ffn.op not in called:
        pytest.skip("this machine has no kernel that gathers")
    assert called == [select_inputs_ffn.op]
    assert all("in one call" in site.reason for site in made.report().sites)
    assert len(made.report().sites) == 3
