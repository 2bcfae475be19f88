"""FFNs whose neurons are chosen before they are computed: the op against its formula, its kernel, and whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from select_help import check_lowered, rewritten
from torch import Tensor, nn
from torch.nn.functional import linear

import sparsify_compiler as sc
from sparsify_compiler import catalog
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import runtime
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.ops import predicted_ffn, select, select_ffn, select_linear
from sparsify_compiler.passes.activation._predictor import hidden, scored
from sparsify_compiler.passes.activation.estimate_neurons import EstimateNeurons
from sparsify_compiler.passes.activation.predict_neurons import PredictNeurons
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.lower import _scored
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.target import host

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def made(inputs: int, hidden: int, outputs: int, dtype: torch.dtype, gated: bool, biased: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    torch.manual_seed(0)
    names = ("gate", "up") if gated else ("gate",)
    tensors = {name: torch.randn(hidden, inputs) / inputs**0.5 for name in names} | {"down": torch.randn(hidden, outputs)}
    tensors |= {f"{name}_bias": torch.randn(hidden) for name in names} if biased else {}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}, torch.randn(outputs).to(dtype) if biased else None


@pytest.mark.parametrize("activation", list(select_ffn.ACTIVATIONS))
@pytest.mark.parametrize(("gated", "biased"), [(True, True), (True, False), (False, True)])
def test_the_op_is_its_formula(activation: str, gated: bool, biased: bool) -> None:
    tensors, bias = made(12, 20, 7, torch.float32, gated, biased)
    x, scores, limit = torch.randn(2, 3, 12), torch.rand(2, 3, 20), torch.tensor(0.4)
    hidden = select_ffn.ACTIVATIONS[activation](linear(x, tensors["gate"], tensors.get("gate_bias")))
    if gated:
        up = linear(x, tensors["up"], tensors.get("up_bias"))
        hidden = hidden * (up.relu() if activation == "drelu" else up)
    expected = torch.where(scores >= limit, hidden, 0) @ tensors["down"] + (0 if bias is None else bias)
    for function in (predicted_ffn.op, predicted_ffn.reference):
        torch.testing.assert_close(function(x=x, scores=scores, limit=limit, **tensors, bias=bias, activation=activation), expected)
    torch.library.opcheck(predicted_ffn.op, (x, scores, limit, tensors["gate"], tensors["down"], tensors.get("up"), tensors.get("gate_bias"),
                                             tensors.get("up_bias"), bias), {"activation": activation})
    with pytest.raises(RuntimeError, match="predicted_ffn"):
        predicted_ffn.op(x, scores[..., 1:], limit, tensors["gate"], tensors["down"], activation=activation)


def test_its_costs_are_true() -> None:
    from sparsify_compiler.cost_models.symbols import evaluate

    tensors, _ = made(12, 20, 7, torch.float32, True, False)
    scores, limit = torch.rand(1, 20), torch.tensor(0.4)
    kept = (scores >= limit)[0]
    sizes = {"M": 1, "N": 7, "K": 12, "hidden": 20, "density": float(kept.double().mean()), "value_bytes": 4, "x_bytes": 4}
    weights = [tensors[name][kept] for name in ("gate", "up", "down")]
    read = (*weights, scores, limit, torch.empty(12), torch.empty(7))
    assert evaluate(catalog.get("cost", "predicted_ffn").BYTES, sizes) == pytest.approx(sum(4 * t.numel() for t in read))
    products = sum(2 * t.numel() for t in weights)
    assert evaluate(catalog.get("cost", "predicted_ffn").FLOPS, sizes) == pytest.approx(products + 2 * int(kept.sum()))


@settings(max_examples=16, derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 150), st.integers(0, 3), st.sampled_from([0.0, 0.3, 0.9, 2.0]), st.booleans(),
       st.booleans(), st.sampled_from(["silu", "drelu"]), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_a_kernel_is_its_op(k: int, h: int, n: int, rows: int, limit: float, gated: bool, biased: bool, activation: str, dtype: torch.dtype,
                            stored: bool) -> None:
    """With none of the neurons chosen up to all; NaN where nobody looks is never met, a NaN score chooses."""
    tensors, bias = made(32 * k, 16 * h, n, dtype, gated, biased)
    limits = {"limit": torch.tensor(limit)} if stored else {}
    found = runtime.candidates("predicted_ffn", tensors | limits, {"activation": activation}, dtype, (1,), host())
    if not found:
        pytest.skip("this machine has no kernel that gathers")
    kernel = found[0].bind(bias)
    x, scores = torch.randn(rows, 32 * k).to(dtype), torch.rand(rows, 16 * h)
    given = () if stored else (torch.full((rows, 1), limit),)
    wide = {name: tensor.double() for name, tensor in tensors.items()}

    def exact() -> Tensor:
        return predicted_ffn.reference(x.double(), scores, torch.tensor(limit), **wide, bias=None if bias is None else bias.double(),
                                       activation=activation)

    y, expected = kernel(x, scores, *given), exact()
    assert y.shape == expected.shape
    assert y.dtype is dtype
    if rows:
        assert float((y.double() - expected).abs().max()) <= TOLERANCE[dtype] * max(float(expected.abs().max()), 1.0)
        x[0, 1] = float("nan")
        assert bool(kernel(x, scores, *given)[0].isnan().all()) == (limit < 2)
        scores[0, 3] = float("nan")
        assert bool(kernel(x, scores, *given)[0].isnan().all())
    with pytest.raises(InputError):
        kernel(torch.randn(1, 32 * k + 1).to(dtype), scores[:1], *given)


def test_strided_rows_and_what_does_not_fit() -> None:
    tensors, _ = made(32, 48, 40, torch.float32, True, False)
    tensors["limit"] = torch.tensor(0.5)
    found = runtime.candidates("predicted_ffn", tensors, {"activation": "silu"}, torch.float32, (1,), host())
    if not found:
        pytest.skip("this machine has no kernel that gathers")
    kernel, wide, scores = found[0].bind(), torch.randn(1, 64), torch.rand(1, 96)
    expected = predicted_ffn.op(wide[:, ::2], scores[:, ::2], activation="silu", **tensors)
    torch.testing.assert_close(kernel(wide[:, ::2], scores[:, ::2]), expected, rtol=1e-5, atol=1e-5)
    odd, _ = made(24, 20, 7, torch.float32, True, False)
    assert not runtime.candidates("predicted_ffn", odd, {"activation": "silu"}, torch.float32, (1,), host())
    with pytest.raises(KernelError):
        runtime.rebind("predicted_ffn", {"family": "gather_predicted_ffn", "dtype": "float32"}, odd, {"activation": "silu"}, None, {}, host())


def ffn(gated: bool) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    net = GatedFfn(64, 128, True) if gated else nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
    return net.eval(), [(torch.randn(40, 64),) for _ in range(3)]


@pytest.mark.parametrize("margin", [-1000.0, 1.0])
@pytest.mark.parametrize(("step", "gated"), [
    (PredictNeurons(density=0.25, rank=8, epochs=1), True), (PredictNeurons(density=0.25, rank=8, epochs=1, selector="top_k"), True),
    (PredictNeurons(density=0.25, rank=8, epochs=1, source="model"), False), (EstimateNeurons(density=0.25, rank=8), False),
])
def test_packed_and_lowered_models_compute_the_same(step: Any, gated: bool, margin: float, tmp_path: Any) -> None:
    net, data = ffn(gated)
    check_lowered(step, net, data, (1, 2, 30), tmp_path, margin)


def test_what_does_not_pay_is_gone() -> None:
    """A dense FFN keeps nothing of its predictor."""
    net, data = ffn(True)
    compiled = sc.compile(net, (data[0][0][:1],), recipe=Pipeline.parse("predict_neurons(rank=8, epochs=1) | pack() | lower(margin=1.0)"),
                          budget=sc.Budget(density=0.25), calibration=data, dynamic={"x": {0: "rows"}})
    row = next(row for row in compiled.report().sites if row.site == "down")
    assert "reads everything" in row.reason
    assert row.density == 1.0
    assert not any("predictor" in str(node.target) or node.target in (select.op, predicted_ffn.op) for _, node in compiled.program.nodes())


def test_the_predictors_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed computes the scores of this very FFN, from as many rows, before the kernel runs."""
    from sparsify_compiler.passes.lower import _predicted

    asked: list[tuple[Tensor, Any]] = []
    made = _predicted.predictor

    def watched(region: Any, node: Any, x: Tensor) -> Any:
        run = made(region, node, x)
        return lambda: asked.append((x, run()))

    monkeypatch.setattr(_predicted, "predictor", watched)
    net, data = ffn(True)
    program = rewritten(PredictNeurons(density=0.25, rank=8, epochs=1), net, data)[0]
    Pipeline.parse("pack() | lower(rounds=3)").run(program, Context(target=host(), kernels=runtime, example_inputs=(data[0][0][:1],)))
    if not asked:
        pytest.skip("this machine has no kernel that gathers")
    x, (scores,) = asked[0]
    state = instantiate(program).state_dict()
    inner = hidden(x, state["predictor_first_folded"], state["predictor_bias_folded"])
    torch.testing.assert_close(scores, scored(inner, state["predictor_second_folded"], state["predictor_odds_folded"]))


def test_what_others_read_too_is_not_the_predictors() -> None:
    """Scores of a value that the rest of the model needs anyway: computing that value is no cost of predicting."""
    from sparsify_compiler.passes.lower import _predicted

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gate, self.down = nn.Linear(16, 16), nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(32, 16))
            self.guess = nn.Linear(16, 32)

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            y: Tensor = predicted_ffn.op(x, self.guess(first), torch.tensor(0.1), self.gate, self.down, activation="relu")
            return y + first

    program = capture(Shared().eval(), (torch.randn(4, 16),))
    ((region, node),) = [(region, node) for region, node in program.nodes() if node.target is predicted_ffn.op]
    run: Any = _predicted.predictor(region, node, torch.randn(4, 16))
    (given,) = run.args
    assert given.shape == (4, 16)
    assert not given.any(), "what stands for a value that is there already, not x"


def test_a_models_own_choice_is_kept_where_no_kernel_pays() -> None:
    net, data = ffn(True)
    own = rewritten(PredictNeurons(density=0.25, rank=8, epochs=1), net, data)[0]
    for _, node in own.nodes():
        node.meta.pop("optional", None)
    lowered = Pipeline.parse("pack() | lower(margin=1.0, rounds=1)").run(own, Context(target=host(), kernels=runtime, example_inputs=data[0]))
    assert any(node.target is select.op for _, node in lowered.nodes())
    torch.testing.assert_close(instantiate(lowered)(*data[0]), instantiate(own)(*data[0]), rtol=1e-4, atol=1e-5)


class Attention(nn.Module):
    def __init__(self, width: int = 128, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


HEADS = PredictNeurons(0.5, rank=4, epochs=1, targets=("attention",))


def attention() -> tuple[Attention, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    return Attention().eval(), [(torch.randn(16, 2, 128),) for _ in range(2)]


@pytest.mark.parametrize("texts", [1, 4])
def test_the_weights_of_heads_that_are_left_out_are_not_read(texts: int) -> None:
    net, data = attention()
    program, _ = rewritten(HEADS, net, data)
    expected = instantiate(program)
    lowered = Pipeline.parse("pack() | lower(margin=-1000.0, rounds=1)").run(program, Context(target=host(), kernels=runtime, example_inputs=data[0]))
    node = next(node for _, node in lowered.nodes() if node.target is select_linear.op)
    assert node.meta["kernel"].name == "gather by input"
    row = next(iter(lowered.decisions.values()))
    assert "of its heads selected" in row.reason
    assert row.density == pytest.approx(0.5, abs=0.15)
    x = torch.randn(texts, 2, 128)
    found = instantiate(lowered)
    torch.testing.assert_close(found(x), expected(x), rtol=1e-4, atol=1e-5)
    x[0, 0, 3] = float("nan")
    assert bool(found(x)[0, 0].isnan().all())


@pytest.mark.parametrize("own", [False, True])
def test_heads_where_their_kernel_does_not_pay(own: bool) -> None:
    """All of them, and no predictor; those that the model itself chooses, where the choice is the model's."""
    net, data = attention()
    program, _ = rewritten(HEADS, net, data)
    chosen = instantiate(program)
    for _, node in program.nodes():
        node.meta["optional"] = not own
    lowered = Pipeline.parse("pack() | lower(margin=1.0, rounds=1)").run(program, Context(target=host(), kernels=runtime, example_inputs=data[0]))
    assert any(node.target is select.op for _, node in lowered.nodes()) is own
    torch.testing.assert_close(instantiate(lowered)(*data[0]), (chosen if own else net)(*data[0]), rtol=1e-4, atol=1e-5)
    assert "reads everything: the kernel has" in next(iter(lowered.decisions.values())).reason


def test_the_time_of_what_chooses_the_heads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictor and selection run with every call that is timed, and attention itself does not."""
    net, data = attention()
    program = Pipeline.parse("pack()").run(rewritten(HEADS, net, data)[0], Context())
    region, node = next((region, node) for region, node in program.nodes() if _scored.is_packed(node))
    layer = _scored.layer(region, node, program, Context(target=host(), kernels=runtime, example_inputs=data[0]))
    seen: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        layer.runs["gather by input"]()
    assert any("addmm" in one or "linear" in one for one in seen)
    assert any("where" in one or "select" in one for one in seen)
    assert not any("attention" in one for one in seen)


def test_heads_of_several_texts_of_a_fixed_size() -> None:
    """What spreads a head's score over its values knows how many texts and tokens there are, and is timed with those."""
    net, data = attention()
    data = [(x[:3, :2].contiguous(),) for x, in data]
    lowered = sc.compile(net, data[0], recipe=HEADS | Pipeline.parse("pack() | lower(margin=1.0, rounds=1)"), calibration=data)
    assert "reads everything: the kernel has" in next(iter(lowered.program.decisions.values())).reason
    torch.testing.assert_close(lowered(*data[0]), net(*data[0]), rtol=1e-4, atol=1e-5)


def test_what_no_neurons_of_an_ffn_are_is_packed_by_itself() -> None:
    """A linear that reads values of which scores have selected some, of one row and of several."""
    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.ops.sparsify.select(self.first(x), torch.tensor(0.5), scores=x.abs()))
            return y

    net = Scored().eval()
    program = Pipeline.parse("pack()").run(capture(net, (torch.randn(3, 8),)), Context())
    assert not any(node.target is predicted_ffn.op for _, node in program.nodes())
    assert any(node.target is select_linear.op for _, node in program.nodes())
    x = torch.randn(3, 8)
    torch.testing.assert_close(instantiate(program)(x), net(x))


@pytest.mark.parametrize("margin", [-1000.0, 1.0])
def test_what_a_model_selects_by_scores_and_by_itself(margin: float) -> None:
    """Where no kernel pays the linear still reads what both selections leave."""
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor, scores: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.ops.sparsify.select(torch.ops.sparsify.select(x, torch.tensor(0.5), scores=scores), torch.tensor(0.7)))
            return y

    torch.manual_seed(0)
    net, example = Twice().eval(), (torch.randn(1, 64), torch.rand(1, 64))
    found = sc.compile(net, example, recipe=Pipeline.parse(f"pack() | lower(margin={margin}, rounds=1)"))
    torch.testing.assert_close(found(*example), net(*example), rtol=1e-4, atol=1e-5)
