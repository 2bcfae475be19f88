"""Kernels of mixtures: they compute what the op means for every choice of experts, and lowering binds them where they pay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

import sparsify_compiler as sc
from sparsify_compiler.codegen import runtime
from sparsify_compiler.decision import Decision
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.measure import Timing
from sparsify_compiler.ops import experts_ffn
from sparsify_compiler.passes.lower import _experts
from sparsify_compiler.passes.lower._layer import Form
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.target import host

EXPERTS, K, H, N = 5, 64, 96, 64
# Few of the many kernels: each is built. dtype, activation; is there an up, are there biases, are gate and up one tensor?
CASES = [(torch.float32, "silu", True, False, True), (torch.float32, "relu", False, True, False), (torch.bfloat16, "drelu", True, True, True)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}


def made(dtype: torch.dtype, gated: bool, biased: bool, fused: bool, outputs: int = N) -> dict[str, Tensor]:
    torch.manual_seed(0)
    both = (torch.randn(EXPERTS, 2 * H, K) / K**0.5).to(dtype)
    gate, up = both[:, :H], both[:, H:]
    tensors = {"gate": gate if fused else gate.contiguous(), "up": up if fused else up.contiguous(),
               "down": (torch.randn(EXPERTS, outputs, H) / H**0.5).to(dtype)}
    if biased:
        tensors |= {name: torch.randn(EXPERTS, width).to(dtype) for name, width in (("gate_bias", H), ("up_bias", H), ("bias", outputs))}
    return tensors if gated else {name: tensor for name, tensor in tensors.items() if not name.startswith("up")}


def bound(tensors: dict[str, Tensor], activation: str, family: str = "experts_ffn") -> Any:
    own = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    found = runtime.candidates("experts_ffn", own, {"activation": activation}, tensors["gate"].dtype, (1,), host())
    found = [candidate for candidate in found if candidate.options["family"] == family]
    if not found:
        pytest.skip("this machine has no such kernel")
    return found[0].bind(tensors.get("bias"))


def expected(x: Tensor, chosen: Tensor, weights: Tensor | None, tensors: dict[str, Tensor], activation: str) -> Tensor:
    y: Tensor = experts_ffn.reference(x, chosen, weights, **{"up": None, **tensors}, activation=activation)
    return y


@pytest.mark.parametrize("family", ["experts_ffn", "experts_torch"])
@pytest.mark.parametrize(("dtype", "activation", "gated", "biased", "fused"), CASES)
def test_the_kernel_is_the_op(dtype: torch.dtype, activation: str, gated: bool, biased: bool, fused: bool, family: str) -> None:
    tensors = made(dtype, gated, biased, fused)
    kernel = bound(tensors, activation, family)

    @settings(max_examples=25, derandomize=True, deadline=None)
    @given(lead=st.sampled_from([(1,), (), (2,), (3, 5), (17,), (70,), (0,), (2, 0)]), k=st.integers(0, 4), seed=st.integers(0, 99),
           experts=st.integers(0, EXPERTS - 1), index=st.sampled_from([torch.int32, torch.int64]),
           weighted=st.sampled_from([None, torch.float32, dtype]))
    def holds(lead: tuple[int, ...], k: int, seed: int, experts: int, index: torch.dtype, weighted: torch.dtype | None) -> None:
        torch.manual_seed(seed)
        x = torch.randn(*lead, K).to(dtype)
        chosen = torch.randint(-1, experts + 1, (*lead, k)).to(index)  # with repetition, with none, with experts that nobody takes
        weights = None if weighted is None else torch.rand(*lead, k).to(weighted)
        y, exact = kernel(x, chosen, *([] if weights is None else [weights])), expected(x, chosen, weights, tensors, activation)
        assert y.dtype is dtype
        assert y.shape == (*lead, N)
        size = float(exact.abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(y.float(), exact.float(), rtol=0, atol=TOLERANCE[dtype] * max(size, 1e-6))

    holds()


def test_odd_outputs_strides_and_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = made(torch.float32, True, False, True, outputs=50)
    kernel = bound(tensors, "silu")
    x, chosen, weights = torch.randn(K, 40).t(), torch.randint(-1, EXPERTS, (3, 40)).t(), torch.rand(3, 40).t()
    exact = expected(x, chosen, weights, tensors, "silu")
    torch.testing.assert_close(kernel(x, chosen, weights), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kernel(x[:1], chosen[:1], weights[:1]), exact[:1], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr("sparsify_compiler.codegen.kernels.experts_ffn.SLAB", 3 * H * 7)  # seven rows at a time
    torch.testing.assert_close(kernel(x, chosen, weights), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6])
def test_nan_reaches_only_those_who_chose(rows: int, dtype: torch.dtype) -> None:
    tensors = made(dtype, True, False, True)
    tensors["down"][1, 2, 3] = float("nan")
    kernel, x = bound(tensors, "silu"), torch.randn(rows, K).to(dtype)
    assert bool(kernel(x, torch.full((rows, 2), 3)).isfinite().all())
    assert bool(kernel(x, torch.tensor([[3, 1]] * rows))[:, 2].isnan().all())
    assert not bool(kernel(x, torch.full((rows, 2), -1)).any())
    x[-1, 4] = float("nan")
    found = kernel(x, torch.full((rows, 2), 0)).isnan().any(1)
    assert found.tolist() == [False] * (rows - 1) + [True]


@pytest.mark.parametrize("family", ["experts_ffn", "experts_torch"])
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_experts_that_there_are_not_count_as_none(rows: int, family: str) -> None:
    tensors = made(torch.float32, True, False, True)
    kernel, x = bound(tensors, "silu", family), torch.randn(rows, K)
    given, none = (torch.tensor([[3, wrong]] * rows) for wrong in (EXPERTS, -1))
    assert torch.equal(kernel(x, given), kernel(x, none))
    assert not bool(kernel(x, torch.tensor([[EXPERTS, -1, -7, 1 << 20]] * rows)).any())


@pytest.mark.parametrize(("ours", "margin", "taken"), [
    ((0.5, 4.0), 0.05, True), ((0.97, 4.0), 0.05, False), ((0.5, 9.0), 0.05, False), ((2.0, 90.0), -1.0, True)])
def test_a_mixture_is_never_slower_than_the_ffn_it_was_made_of(ours: tuple[float, float], margin: float, taken: bool,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    """At one row and at many."""
    monkeypatch.setattr(_experts.Mixture, "bind", lambda self, name: None)
    gate = torch.zeros(2, 4, 4)
    nowhere: Any = None
    mixture = _experts.Mixture(nowhere, nowhere, Decision.of("mlp", "experts", gate), gate, None, rows=1, many=16, whole=("dense eager", "packed"))
    mixture.forms = {"loop": Form(), "ours": Form(False), "dense eager": Form(), "packed": Form()}
    one, many = (3.0, ours[0], 2.0, 1.0), (30.0, ours[1], 8.0, 8.0)
    timings = {name: Timing(ms, ms, ms) for name, ms in zip(mixture.forms, one, strict=True)}
    timings |= {f"{name}, many rows": Timing(ms, ms, ms) for name, ms in zip(mixture.forms, many, strict=True)}
    assert _experts.choose(mixture, timings, margin) is taken
    row = mixture.decision
    assert (row.dense_form, row.kernel) == ("packed", "ours" if taken else "packed")
    assert ("stays dense" in row.reason) is not taken


@pytest.mark.parametrize(("one", "many", "margin", "best"), [
    ((1.0, 2.0, 0.5), (9.0, 8.0, 4.0), 0.0, "ours"),      # faster at both
    ((1.0, 2.0, 0.5), (9.0, 8.0, 30.0), 0.0, "loop"),     # 3.75 times slower than the fastest at many rows; the loop loses 2 times at one
    ((1.0, 2.0, 3.0), (9.0, 1.0, 2.0), 0.0, "grouped"),   # never the worst
    ((1.0, 2.0, 0.5), None, 0.0, "ours"), ((1.0, 2.0, 1.5), None, 0.0, "loop"), ((1.0, 2.0, 1.5), None, -1.0, "ours")])
def test_the_form_with_the_smallest_loss_is_bound(one: tuple[float, ...], many: tuple[float, ...] | None, margin: float, best: str,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    bound_to: list[str] = []
    monkeypatch.setattr(_experts.Mixture, "bind", lambda self, name: bound_to.append(name))
    gate = torch.zeros(2, 4, 4)
    nowhere: Any = None
    mixture = _experts.Mixture(nowhere, nowhere, Decision.of("mlp", "experts", gate), gate, None, rows=1, many=0 if many is None else 70)
    names = ("loop", "grouped", "ours")
    mixture.forms = {name: Form(name != "ours") for name in names}
    timings = {name: Timing(ms, ms, ms) for name, ms in zip(names, one, strict=True)}
    timings |= {f"{name}, many rows": Timing(ms, ms, ms) for name, ms in zip(names, many or (), strict=many is not None)}
    _experts.choose(mixture, timings, margin)
    row, at = mixture.decision, names.index(best)
    assert (bound_to, row.kernel) == ([best], best)
    assert (row.dense_form, row.dense_ms, row.sparse_ms, row.compiled_ms) == ("loop", one[0], one[2], one[at])
    assert f"{one[0] / one[at]:.2f} times the speed of loop at 1 row" in row.reason
    assert many is None or f"{min(many[:2]) / many[at]:.2f} times at 70 rows" in row.reason


def test_bad_calls_and_weights_are_refused() -> None:
    tensors = made(torch.float32, True, False, True)
    kernel = bound(tensors, "silu")
    for arguments in ((torch.randn(2, 3), torch.zeros(2, 1, dtype=torch.int64)), (torch.randn(2, K), torch.zeros(3, 1, dtype=torch.int64)),
                      (torch.randn(2, K), torch.zeros(2, 1)), (torch.randn(2, K), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 2))):
        with pytest.raises(InputError):
            kernel(*arguments)
    with pytest.raises(KernelError, match="do not fit"):
        runtime.rebind("experts_ffn", kernel.options, {**tensors, "down": torch.randn(EXPERTS, N, 32)}, {"activation": "silu"}, None, {}, host())
    for change in ({"gate": torch.randn(EXPERTS, H, K).double()}, {"gate": torch.randn(EXPERTS, H, 60), "up": torch.randn(EXPERTS, H, 60)}):
        found = runtime.candidates("experts_ffn", {**tensors, **change}, {"activation": "silu"}, torch.float32, (1,), host())
        assert "experts_ffn" not in [candidate.options["family"] for candidate in found]


def test_a_mixtral_is_compiled_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                                             num_key_value_heads=2, num_local_experts=4)).eval()
    prompt = torch.randint(1, 64, (1, 7))
    compiled = sc.compile(model, {"input_ids": prompt}, recipe=Pipeline.parse("lower(margin=-1000.0, rounds=3)"),
                          dynamic={"input_ids": {0: "batch", 1: "tokens"}})
    rows = [row for row in compiled.report().sites if row.kind == "experts"]
    assert [row.site for row in rows] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    assert {(row.structure, row.density, row.dense_bytes) for row in rows} == {("2 of 4 experts", 0.5, 4 * 4 * 3 * 32 * 48)}
    if host().has("avx512f"):
        assert {row.kernel for row in rows} == {"chosen experts"}
        assert all("times the speed of" in row.reason and "rows" in row.reason for row in rows)
    compiled.save(tmp_path / "saved")
    again = sc.load(tmp_path / "saved", model=model)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(prompt, **options)  # type: ignore[operator]
    assert torch.equal(compiled.generate(prompt, **options), wanted)
    assert torch.equal(again.generate(prompt, **options), wanted)
    with torch.device("meta"):
        empty = MixtralForCausalLM(model.config).eval()
    on_disk = sc.load(tmp_path / "saved", model=empty, mapped=True)
    assert torch.equal(on_disk.generate(prompt, **options), wanted)
    assert on_disk.resident_bytes() < again.resident_bytes() / 2
