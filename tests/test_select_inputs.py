"""Selecting inputs: ops against their meaning, what selectors and budgets give, the pass, packing, kernels, and whole models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_help import check_lowered, rewritten
from torch import Tensor, nn
from torch.nn.functional import linear

from sparsify_compiler import catalog
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import runtime
from sparsify_compiler.errors import BudgetError, CalibrationError, InputError, KernelError, ParseError, SparsifyError
from sparsify_compiler.ops import select, select_linear
from sparsify_compiler.passes.activation.select_inputs import SelectInputs
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program
from sparsify_compiler.target import host

SELECTORS = [name for name in catalog.names("selector") if name != "nonzero"]  # which has no density to choose
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 32)).eval()


def batches(count: int = 3) -> list[tuple[Tensor, ...]]:
    torch.manual_seed(1)
    return [(torch.randn(20, 48) * torch.rand(48),) for _ in range(count)]


def selecting(step: SelectInputs, net: nn.Module | None = None, given: list[tuple[Tensor, ...]] | None = None) -> tuple[Program, Context]:
    return rewritten(step, net or model(), given or batches())


# --- ops ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("options", [(), ("scale",), ("scale", "center")])
def test_the_op_is_its_formula(lead: tuple[int, ...], per_row: bool, options: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*lead, 12), torch.randn(12, 7), torch.randn(7)
    vectors = {name: torch.rand(12) for name in options}
    limit = torch.rand(*lead, 1) if per_row else torch.tensor(0.4)
    other = vectors.get("center", torch.zeros(12))
    expected = torch.where((x - other).abs() * vectors.get("scale", torch.ones(12)) >= limit, x, other)
    assert torch.equal(select.op(x, limit, **vectors), expected)
    y = select_linear.op(x, limit, weight, **vectors, bias=bias)
    torch.testing.assert_close(y, linear(expected, weight.t(), bias))
    torch.testing.assert_close(y, select_linear.reference(x, limit, weight, **vectors, bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_is_selected(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8).to(dtype)
    x[1, 4] = float("nan")
    for y in (select.op(x, torch.tensor(1e9)), select_linear.op(x, torch.tensor(1e9), torch.ones(8, 5).to(dtype))):
        assert bool(y[1].isnan().any())
        assert not y[0].any()


def test_opcheck_and_gradients() -> None:
    torch.manual_seed(0)
    x, center = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(select.op, (x, torch.tensor(0.5), torch.rand(8), center))
    weight, bias = torch.randn(8, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.library.opcheck(select_linear.op, (x, torch.tensor(0.5), weight, torch.rand(8), center, bias))
    doubles = [t.detach().double().requires_grad_() for t in (x, weight, center, bias)]
    assert torch.autograd.gradcheck(lambda x, w, c, b: select_linear.op(x, torch.tensor(0.5), w, None, c, b), doubles)
    assert torch.autograd.gradcheck(lambda x, c: select.op(x, torch.tensor(0.5), None, c), [doubles[0], doubles[2]])


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(RuntimeError, match="select"):
        select.op(torch.randn(3, 8), torch.rand(8))
    with pytest.raises(RuntimeError, match="needs"):
        select_linear.op(torch.randn(3, 8), torch.tensor(0.1), torch.randn(9, 4))


def test_its_costs_are_true() -> None:
    from sparsify_compiler.cost_models.symbols import evaluate

    torch.manual_seed(0)
    x, weight, scale, center, limit = torch.randn(1, 12), torch.randn(12, 7), torch.rand(12), torch.rand(12), torch.tensor(0.4)
    kept = select.kept(x, limit, scale, center)[0]
    sizes = {"M": 1, "N": 7, "K": 12, "density": float(kept.double().mean()), "value_bytes": 4, "x_bytes": 4}
    read = sum(t.numel() * t.element_size() for t in (x, weight[kept], scale, center, limit, torch.empty(1, 7)))
    assert evaluate(catalog.get("cost", "select_linear").BYTES, sizes) == pytest.approx(read)
    assert evaluate(catalog.get("cost", "select_linear").FLOPS, sizes) == pytest.approx(2 * weight[kept].numel() + 4 * 12)


# --- selectors and budgets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTORS)
@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 30), st.integers(1, 60), st.floats(0.02, 1.0), st.integers(0, 9))
def test_a_selector_selects_about_its_density(name: str, rows: int, width: int, density: float, seed: int) -> None:
    import sys

    scores = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).abs()
    function = catalog.get("selector", name)
    number = sys.modules[function.__module__].calibrate(scores, density)
    limit = function(scores, number)
    found = float((scores >= (number if limit is None else limit)).float().mean())
    assert abs(found - density) <= 1 / width + 1e-6


def test_zeros_are_skipped_for_nothing() -> None:
    """Where more of ReLU's neurons are 0 than are to be skipped, those are, and no other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 32)).eval()
    after, _ = selecting(SelectInputs(density=0.9, targets=("2",)), net)
    x = torch.cat([x for x, in batches()])
    with torch.no_grad():
        torch.testing.assert_close(instantiate(after)(x), net(x))
        assert after.decisions["2"].density == pytest.approx(float((net[:2](x) > 0).float().mean()), abs=0.01)


@pytest.mark.parametrize("name", [name for name in catalog.names("input budget") if name != "given"])  # which is told, and shares nothing out
@pytest.mark.parametrize("density", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_budget_is_spent(name: str, density: float, stacked: bool) -> None:
    torch.manual_seed(0)
    data = [(torch.randn(20, 24),)] if stacked else batches()
    after, _ = selecting(SelectInputs(budget=name, density=density), Residual().eval() if stacked else model(), data)
    rows = list(after.decisions.values())
    sizes = [row.shape[0] * row.shape[1] for row in rows]
    assert sum(row.budget * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes) == pytest.approx(density, abs=0.01)
    assert sum(row.density * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes) == pytest.approx(density, abs=0.02)


def test_blocks_are_run_to_see_their_error() -> None:
    """A block whose second FFN reads what hardly matters: skipping is moved there, and the model is nearer to the dense one for it."""
    torch.manual_seed(0)
    net = Residual().eval()
    data = [(torch.randn(30, 24),) for _ in range(2)]
    errors, chosen = {}, {}
    for budget in ("uniform", "block_greedy"):
        after, _ = selecting(SelectInputs(budget=budget, density=0.5), net, data)
        chosen[budget] = {path: row.budget for path, row in after.decisions.items()}
        with torch.no_grad():
            errors[budget] = float((instantiate(after)(data[1][0]) - net(data[1][0])).norm())
    assert errors["block_greedy"] < 0.8 * errors["uniform"]
    assert chosen["block_greedy"]["blocks.0.up"] > chosen["block_greedy"]["blocks.0.down"]
    parts, ids = llama_in_parts()
    ctx = Context(batches=[ids], density=0.5)
    ctx.calibrate = lambda program, needs: calibrate(program, [ids], needs, cache=False)
    with pytest.raises(CalibrationError, match="captured in parts"):
        Pipeline((SelectInputs(budget="block_greedy"),)).run(parts, ctx, ())


class Residual(nn.Module):
    """Two blocks, x + down(gelu(up(norm(x)))); a few of the hidden neurons carry almost all."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(24), "up": nn.Linear(24, 48), "down": nn.Linear(48, 24)}) for _ in range(2)])
        with torch.no_grad():
            for block in self.blocks:
                block["up"].weight[8:] *= 0.02
                block["up"].bias[8:] *= 0.02

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["down"](nn.functional.gelu(block["up"](block["norm"](x))))
        return x


def llama_in_parts() -> tuple[Program, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    ids = {"input_ids": torch.randint(1, 96, (2, 6))}
    return capture(transformers.LlamaForCausalLM(config).eval(), ids), ids


def test_the_sample_is_spread_over_all_rows() -> None:
    from sparsify_compiler.statistic import SAMPLE_ROWS, STATISTICS

    entry = STATISTICS["input_rows"]
    total, rows, start = entry.start(3), torch.arange(5000.0)[:, None].expand(-1, 3), 0
    for size in (1, 700, 3, 0, 2000, 2296):
        entry.add(total, rows[start : start + size])
        start += size
    found = entry.finish(total, start)[:, 0]
    assert SAMPLE_ROWS // 2 < len(found) <= SAMPLE_ROWS
    assert len(set(found.diff().tolist())) == 1
    assert found[0] == 0


def test_the_gradient_by_an_input_is_that_through_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + 3 * self.b(x)

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(5, 6)
    program = capture(net.eval(), (x,))
    found = calibrate(program, [(x,)], {name: frozenset({"input_gradient"}) for name in ("a", "b")}, cache=False)
    y = net(x)
    by_y = 2 * y / y.numel()
    torch.testing.assert_close(found.get("a", "input_gradient"), (by_y @ net.a.weight).norm(dim=0))
    torch.testing.assert_close(found.get("b", "input_gradient"), (3 * by_y @ net.b.weight).norm(dim=0))


# --- the pass ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("center", ["zero", "mean"])
def test_density_1_is_the_dense_model(selector: str, center: Any) -> None:
    after, _ = selecting(SelectInputs(selector=selector, center=center, density=1.0))
    x = batches()[0][0]
    torch.testing.assert_close(instantiate(after)(x), model()(x))


@pytest.mark.parametrize("selector", SELECTORS)
def test_half_of_the_inputs_is_near_the_dense_model_and_not_it(selector: str) -> None:
    after, ctx = selecting(SelectInputs(selector=selector, density=0.5))
    x = batches()[0][0]
    with torch.no_grad():
        y, dense = instantiate(after)(x), model()(x)
    assert 0 < float((y - dense).norm() / dense.norm()) < 0.5
    assert ctx.rewrites == 2
    assert {row.structure for row in after.decisions.values()} == {f"inputs by {selector}"}


def test_the_mean_in_place_of_what_is_skipped_is_nearer() -> None:
    data = [(x + 2,) for x, in batches()]
    x = data[0][0]
    errors = []
    for center in ("zero", "mean"):
        after, _ = selecting(SelectInputs(center=center, density=0.3), given=data)  # type: ignore[arg-type]
        with torch.no_grad():
            errors.append(float((instantiate(after)(x) - model()(x)).norm()))
    assert errors[1] < 0.5 * errors[0]


def test_what_is_not_selected_says_why() -> None:
    once, _ = selecting(SelectInputs(density=0.5, targets=("0",)))
    data = batches()
    ctx = Context(batches=data, density=0.5)
    ctx.calibrate = lambda program, needs: calibrate(program, data, needs, cache=False)
    Pipeline((SelectInputs(),)).run(once, ctx, ())
    assert [miss.why for miss in ctx.misses] == ["its inputs are selected already"]
    ctx = Context(density=0.5)
    Pipeline((SelectInputs(),)).run(capture(nn.Sequential(nn.ReLU()).eval(), (torch.randn(3),)), ctx, ())
    assert [miss.why for miss in ctx.misses] == ["the model has no linear sites"]


def test_blocks_are_found_in_regions_too() -> None:
    from sparsify_compiler.passes.activation._evidence import _numbered

    assert [_numbered(path) for path in ("model.layers.3.mlp.up", "h.12.a.4.b", "0", "head")] == ["model.layers.3", "h.12", "0", "head"]


def test_bad_options_are_refused() -> None:
    for options, error in (({"density": 0.0}, BudgetError), ({"density": 1.5}, BudgetError), ({"scorer": "magnitud"}, SparsifyError),
                           ({"selector": "topk"}, SparsifyError), ({"budget": "greedyy"}, SparsifyError), ({"center": "median"}, ParseError),
                           ({"scorer": "channel_quantile(part=0.5)"}, ParseError)):
        with pytest.raises(error):
            SelectInputs(**options)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="no density"):
        selecting(SelectInputs())
    with pytest.raises(CalibrationError):
        Pipeline((SelectInputs(density=0.5),)).run(capture(model(), batches()[0]), Context(), ())


# --- kernels -----------------------------------------------------------------------------------------------------------------------------


def gathered(tensors: Mapping[str, Tensor], dtype: torch.dtype, bias: Tensor | None) -> Any:
    found = runtime.candidates("select_linear", tensors, {}, dtype, (1,), host())
    if not found:
        pytest.skip("this machine has no kernel that gathers")
    return found[0].bind(bias)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(st.integers(1, 90), st.integers(1, 200), st.integers(0, 6), st.sampled_from([0.0, 0.3, 1.0, 5.0]), st.booleans(), st.booleans(),
       st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_kernel_is_its_op(k: int, n: int, rows: int, limit: float, scaled: bool, centered: bool, biased: bool, per_row: bool,
                            dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {"weight": torch.randn(k, n).to(dtype), **({"scale": torch.rand(k)} if scaled else {}),
               **({"center": torch.randn(k).to(dtype)} if centered else {}), **({} if per_row else {"limit": torch.tensor(limit)})}
    bias = torch.randn(n).to(dtype) if biased else None
    kernel, x, limits = gathered(tensors, dtype, bias), torch.randn(rows, k).to(dtype), torch.rand(rows, 1) * limit
    y = kernel(x, limits) if per_row else kernel(x)
    chosen = select.reference(x, limits if per_row else tensors["limit"], tensors.get("scale"), tensors.get("center")).double()
    exact = linear(chosen, tensors["weight"].double().t(), None if bias is None else bias.double())
    size = linear(chosen.abs(), tensors["weight"].double().abs().t()) + 1
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= TOLERANCE[dtype] * size).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_propagates_nan_and_takes_any_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    kernel = gathered({"weight": torch.randn(40, 130).to(dtype), "limit": torch.tensor(100.0)}, dtype, None)
    for column in (0, 17, 39):
        x = torch.zeros(2, 40).to(dtype)
        x[1, column] = float("nan")
        y = kernel(x)
        assert bool(y[1].isnan().all())
        assert not y[0].any()
    x = torch.full((40, 3), 200.0).to(dtype).t()
    torch.testing.assert_close(kernel(x), kernel(x.contiguous()))
    assert torch.equal(kernel(x[0]), kernel(x)[0])
    assert kernel(x[:0]).shape == (0, 130)
    with pytest.raises(InputError):
        kernel(torch.randn(2, 41).to(dtype))
    with pytest.raises(InputError):
        kernel(torch.randn(2, 40).double())


def test_a_kernel_comes_back_from_its_files() -> None:
    tensors = {"weight": torch.randn(64, 64), "limit": torch.tensor(0.5)}
    kernel = gathered(tensors, torch.float32, None)
    again = runtime.rebind("select_linear", kernel.options, tensors, {}, None, kernel.files(), kernel.target)
    x = torch.randn(2, 64)
    assert torch.equal(kernel(x), again(x))
    assert kernel.resident_bytes == sum(t.numel() * t.element_size() for t in kernel.state().values())
    with pytest.raises(KernelError):
        runtime.rebind("select_linear", kernel.options, {**tensors, "scale": torch.ones(3)}, {}, None, {}, kernel.target)


# --- whole models ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", SELECTORS)
def test_packed_and_lowered_models_compute_the_same(selector: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).eval()
    data = [(torch.randn(8, 512),) for _ in range(3)]
    check_lowered(SelectInputs(selector=selector, density=0.25), net, data, (1, 2, 30), tmp_path)
