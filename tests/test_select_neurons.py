"""Selecting neurons of a gated FFN: the op against its formula, the pass, the kernel, and whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_help import check_lowered, rewritten
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import runtime
from sparsify_compiler.errors import BudgetError, CalibrationError, InputError, KernelError
from sparsify_compiler.ops import select_ffn
from sparsify_compiler.passes.activation.select_neurons import GatedFfn, SelectNeurons
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.sites import find_sites
from sparsify_compiler.target import host

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def made(inputs: int, hidden: int, outputs: int, dtype: torch.dtype, biased: bool, scaled: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    torch.manual_seed(0)
    gate, up = (torch.randn(hidden, inputs) / inputs**0.5 for _ in range(2))
    tensors = {"gate": gate, "up": up, "down": torch.randn(hidden, outputs)}
    tensors |= {"gate_bias": torch.randn(hidden), "up_bias": torch.randn(hidden)} if biased else {}
    found = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    found |= {"scale": torch.rand(hidden) + 0.5} if scaled else {}
    return found, torch.randn(outputs).to(dtype) if biased else None


def ffn(inputs: int = 64, hidden: int = 128, bias: bool = False) -> tuple[GatedFfn, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return GatedFfn(inputs, hidden, bias).eval(), [(torch.randn(20, inputs),) for _ in range(3)]


@pytest.mark.parametrize("activation", list(select_ffn.ACTIVATIONS))
@pytest.mark.parametrize("biased", [False, True])
def test_the_op_is_its_formula(activation: str, biased: bool) -> None:
    tensors, bias = made(12, 20, 7, torch.float32, biased, True)
    x, limit = torch.randn(2, 3, 12), torch.tensor(0.2)
    gates = select_ffn.ACTIVATIONS[activation](x @ tensors["gate"].t() + tensors.get("gate_bias", 0))
    gates = torch.where(gates.abs() * tensors["scale"] >= limit, gates, 0)
    up = x @ tensors["up"].t() + tensors.get("up_bias", 0)
    expected = (gates * (up.relu() if activation == "drelu" else up)) @ tensors["down"] + (0 if bias is None else bias)
    for function in (select_ffn.op, select_ffn.reference):
        torch.testing.assert_close(function(x=x, limit=limit, **tensors, bias=bias, activation=activation), expected)
    torch.library.opcheck(select_ffn.op, (x, limit, tensors["gate"], tensors["up"], tensors["down"], tensors["scale"], tensors.get("gate_bias"),
                                          tensors.get("up_bias"), bias), {"activation": activation})


def test_its_costs_are_true() -> None:
    from sparsify_compiler.cost_models.symbols import evaluate

    tensors, _ = made(12, 20, 7, torch.float32, False, True)
    x, limit = torch.randn(1, 12), torch.tensor(0.2)
    gates = torch.nn.functional.silu(x @ tensors["gate"].t())
    kept = (gates.abs() * tensors["scale"] >= limit)[0]
    sizes = {"M": 1, "N": 7, "K": 12, "hidden": 20, "density": float(kept.double().mean()), "value_bytes": 4, "x_bytes": 4}
    read = (tensors["gate"], tensors["up"][kept], tensors["down"][kept], tensors["scale"], limit, x, torch.empty(7))
    assert evaluate(catalog.get("cost", "select_ffn").BYTES, sizes) == pytest.approx(sum(4 * t.numel() for t in read))
    products = sum(2 * t.numel() for t in read[:3])
    assert evaluate(catalog.get("cost", "select_ffn").FLOPS, sizes) == pytest.approx(products + 3 * 20 + int(kept.sum()))


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 150), st.integers(1, 3), st.sampled_from([0.0, 0.3, 100.0]), st.booleans(), st.booleans(),
       st.sampled_from(["silu", "relu", "relu2", "drelu", "gelu"]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_kernel_is_its_op(k: int, h: int, n: int, rows: int, limit: float, biased: bool, scaled: bool, activation: str, dtype: torch.dtype) -> None:
    tensors, bias = made(32 * k, 16 * h, n, dtype, biased, scaled)
    tensors["limit"] = torch.tensor(limit)
    found = runtime.candidates("select_ffn", tensors, {"activation": activation}, dtype, (1,), host())
    if not found:
        pytest.skip("this machine has no kernel that gathers")
    kernel, x = found[0].bind(bias), torch.randn(rows, 32 * k).to(dtype)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    gates = wide["gate"] @ x.double().t()
    near = ((select_ffn.ACTIVATIONS[activation](gates.t() + wide.get("gate_bias", 0)).abs() * wide.get("scale", 1) - limit).abs() < 1e-2).any()
    exact = select_ffn.reference(x.double(), **wide, bias=None if bias is None else bias.double(), activation=activation)
    y = kernel(x)
    assert y.shape == exact.shape
    if not (near and limit):  # a neuron on the limit may fall on either side of it
        assert float((y.double() - exact).abs().max()) <= TOLERANCE[dtype] * max(float(exact.abs().max()), 1.0)
    x[0, 1] = float("nan")
    assert bool(kernel(x)[0].isnan().all())
    with pytest.raises(InputError):
        kernel(torch.randn(1, 32 * k + 1).to(dtype))


def test_sizes_that_are_no_whole_vectors_have_no_kernel() -> None:
    tensors, _ = made(24, 20, 7, torch.float32, False, False)
    tensors["limit"] = torch.tensor(0.1)
    assert not runtime.candidates("select_ffn", tensors, {"activation": "silu"}, torch.float32, (1,), host())
    with pytest.raises(KernelError):
        runtime.rebind("select_ffn", {"family": "gather_ffn", "dtype": "float32"}, tensors, {"activation": "silu"}, None, {}, host())


def test_density_1_is_the_dense_model_and_half_is_near_it() -> None:
    net, data = ffn()
    with torch.no_grad():
        dense = net(data[0][0])
        torch.testing.assert_close(instantiate(rewritten(SelectNeurons(density=1.0), net, data)[0])(data[0][0]), dense)
        after, ctx = rewritten(SelectNeurons(density=0.5), net, data)
        assert 0 < float((instantiate(after)(data[0][0]) - dense).norm() / dense.norm()) < 0.4
    assert ctx.rewrites == 1
    row, = after.decisions.values()
    assert row.density == pytest.approx(0.5, abs=0.01)
    assert row.structure == "neurons by threshold"


@pytest.mark.parametrize("swapped", [False, True])
def test_a_channels_own_threshold_looks_at_what_it_is_multiplied_with(swapped: bool) -> None:
    """CHESS's score, and an FFN whose gate is large exactly where its up projection is nothing."""
    net, data = ffn()
    with torch.no_grad():
        net.gate.weight[:64] *= 20
        net.up.weight[:64] *= 1e-3
    if swapped:
        net.forward = lambda x: net.down(net.up(x) * nn.functional.silu(net.gate(x)))  # type: ignore[method-assign]
    with torch.no_grad():
        dense, up = net(data[0][0]), torch.cat([net.up(x) for x, in data])
        program = capture(net, data[0], {"x": {0: "rows"}})
        down, = (site.path for site in find_sites(program, ("linear",)) if site.path.endswith("down"))
        found = calibrate(program, data, {down: frozenset({"partner_mean"})}, cache=False)
        torch.testing.assert_close(found.get(down, "partner_mean"), up.abs().mean(0))
        errors = [float((instantiate(rewritten(SelectNeurons(scorer, density=0.5), net, data)[0])(data[0][0]) - dense).norm())
                  for scorer in ("partner_mean", "magnitude")]
    assert errors[0] < 0.1 * errors[1]


def test_without_a_gate_the_partners_mean_is_no_scale() -> None:
    torch.manual_seed(0)
    net, data = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12)).eval(), [(torch.randn(20, 12),)]
    ctx = Context(batches=data)
    ctx.calibrate = lambda program, needs: calibrate(program, data, needs, cache=False)
    plain, scored = (Pipeline((SelectNeurons(scorer, density=0.5),)).run(capture(net, data[0]), ctx, ()) for scorer in ("magnitude", "partner_mean"))
    with torch.no_grad():
        assert torch.equal(instantiate(scored)(data[0][0]), instantiate(plain)(data[0][0]))


def test_chess_selects_neurons_and_some_projections_of_attention() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(1, 96, (2, 12))
    data = [{"input_ids": ids, "use_cache": False}]
    ctx = Context(batches=data)
    ctx.calibrate = lambda program, needs: calibrate(program, data, needs, cache=False)
    program = capture(model, data[0])
    after = sc.recipes.chess(0.5, ("attention:q", "attention:out")).run(program, ctx, ())
    chosen = {path.rpartition(".")[2]: row.structure for path, row in after.decisions.items()}
    assert chosen == {"q_proj": "inputs by threshold", "o_proj": "inputs by threshold", "down_proj": "neurons by threshold"}
    with torch.no_grad():
        whole = instantiate(sc.recipes.chess(1.0).run(program, ctx, ()))(**data[0]).logits
        torch.testing.assert_close(whole, model(**data[0]).logits)
        assert not torch.allclose(instantiate(after)(**data[0]).logits, whole)


def test_bad_input_is_refused() -> None:
    net, data = ffn()
    with pytest.raises(BudgetError):
        SelectNeurons(density=0.0)
    with pytest.raises(BudgetError, match="no density"):
        rewritten(SelectNeurons(), net, data)
    with pytest.raises(CalibrationError):
        Pipeline((SelectNeurons(density=0.5),)).run(capture(net, data[0]), Context(), ())
    ctx = Context(density=0.5)
    Pipeline((SelectNeurons(),)).run(capture(nn.Linear(3, 3).eval(), (torch.randn(2, 3),)), ctx, ())
    assert [miss.why for miss in ctx.misses] == ["the model has no FFN"]


@pytest.mark.parametrize(("selector", "margin"), [("threshold", -1000.0), ("threshold", 1.0), ("top_k", -1000.0)])
def test_packed_and_lowered_models_compute_the_same(selector: str, margin: float, tmp_path: Any) -> None:
    net, data = ffn(256, 512, bias=True)
    check_lowered(SelectNeurons(selector=selector, density=0.25), net, data, (1, 2, 30), tmp_path, margin)
