"""Kernels that compute something else than torch: none is used, and the decision says so."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import sparsify_compiler as sc
from sparsify_compiler import nearness
from sparsify_compiler.codegen import runtime
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.nearness import NEAR, NEAR_HALF, distance
from sparsify_compiler.ops import attend, attend_blocks
from sparsify_compiler.passes.activation.select_neurons import GatedFfn
from sparsify_compiler.passes.attention import select_blocks
from sparsify_compiler.passes.lower import _numbers
from sparsify_compiler.passes.lower._dense_attention import _times as times_of_attention
from sparsify_compiler.passes.lower._selected import limit_of
from sparsify_compiler.pipeline import Pipeline

SAID = "is not used: its numbers are"
Spoil = Callable[[Tensor], Tensor]


class Wrong:
    """A kernel whose numbers are spoilt, and which is otherwise what it was."""

    def __init__(self, kernel: Any, spoil: Spoil) -> None:
        self._kernel, self._spoil = kernel, spoil

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        return self._spoil(self._kernel(*given, **named))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> Callable[[Spoil], None]:
    """Every kernel gives what spoil() makes of its numbers."""
    bind = runtime.Candidate.bind

    def patch(spoil: Spoil) -> None:
        monkeypatch.setattr(runtime.Candidate, "bind", lambda self, bias=None: Wrong(bind(self, bias), spoil))

    return patch


def first_is(value: float) -> Spoil:
    def spoil(y: Tensor) -> Tensor:
        y = y.clone()
        y[(0,) * y.dim()] = value
        return y

    return spoil


SPOILS: dict[str, Spoil] = {
    "larger": lambda y: y * 1.5, "no number": first_is(math.nan), "infinite": first_is(math.inf), "others": lambda y: y.flip(-1),
}  # fmt: skip
MODELS: dict[str, tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": ("mask_weights(structure='16x1', density=0.3)", lambda: nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)), (8, 64)),
    "conv": ("mask_weights(structure='16x1', density=0.2, targets=('conv',))",
             lambda: nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1)), (2, 64, 14, 14)),
    "inputs": ("select_inputs(density=0.5)", lambda: nn.Sequential(nn.Linear(64, 96), nn.Tanh()), (1, 64)),
    "ffn by input": ("select_inputs(density=0.5)", lambda: GatedFfn(64, 128), (1, 64)),
    "neurons": ("select_neurons(density=0.5)", lambda: GatedFfn(64, 128), (1, 64)),
    "predicted": ("predict_neurons(density=0.5)", lambda: GatedFfn(64, 128), (1, 64)),
    "experts": ("split_experts(experts=4, density=0.5)", lambda: GatedFfn(64, 128), (1, 64)),
}


def compiled_of(kind: str) -> tuple[CompiledModel, nn.Module, Tensor]:
    text, make, shape = MODELS[kind]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    data = [(torch.randn(40, *shape[1:]),) for _ in range(2)]
    # whatever kernel there is, it is taken
    return sc.compile(model, (x,), recipe=Pipeline.parse(f"{text} | pack() | lower(margin=-1000.0, rounds=3, prefer='bytes')"), calibration=data,
                      dynamic={next(iter(inspect.signature(model.forward).parameters)): {0: "rows"}}), model, x


@pytest.mark.parametrize("kind", list(MODELS))
def test_kernels_as_they_are_are_right(kind: str) -> None:
    compiled, _, _ = compiled_of(kind)
    rows = compiled.report().sites
    assert not [row.reason for row in rows if SAID in row.reason]
    assert any(row.format != "dense" for row in rows), "no kernel of such a layer was tried"


@pytest.mark.parametrize("spoil", ["larger", "no number", "infinite", "others"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_wrong_kernels_are_not_used(kind: str, spoil: str, spoilt: Callable[[Spoil], None]) -> None:
    right, model, x = compiled_of(kind)
    with torch.no_grad():
        expected = right(x) if kind in ("linear", "conv", "experts") else model(x)  # what selects for speed alone reads everything again
    spoilt(SPOILS[spoil])
    compiled, _, _ = compiled_of(kind)
    assert any(SAID in row.reason for row in compiled.report().sites)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "predicted", "experts"])
def test_a_kernel_that_is_a_tenth_off_is_not_used(kind: str, spoilt: Callable[[Spoil], None]) -> None:
    """Only one that selects by what it computes itself may be as far off: given scores choose the same neurons everywhere."""
    what = {"linear": "bsr_r16v1", "predicted": "gather by prediction", "experts": "torch grouped_mm"}[kind]
    spoilt(lambda y: y * 1.1)
    compiled, _, _ = compiled_of(kind)
    assert any(f"{what} {SAID}" in row.reason for row in compiled.report().sites)


@pytest.mark.parametrize(("dtype", "density"), [(torch.float32, 0.03), (torch.bfloat16, 0.05)])
def test_a_right_kernel_of_a_few_neurons_is_used(dtype: torch.dtype, density: float) -> None:
    """No neuron is at the limit itself, where rounding would select or skip it: one of four is half of the numbers."""
    for seed in range(12):
        torch.manual_seed(seed)
        model, data = GatedFfn(64, 128).eval().to(dtype), [(torch.randn(40, 64, dtype=dtype),) for _ in range(2)]
        recipe = Pipeline.parse(f"select_neurons(density={density}) | pack() | lower(margin=-1000.0, rounds=1)")
        rows = sc.compile(model, data[0], recipe=recipe, calibration=data, dynamic={"x": {0: "rows"}}).report().sites
        assert not [row.reason for row in rows if SAID in row.reason], seed


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=30, unique=True), st.floats(0, 1))
@example([0.0, 2.0**-149], 0.5)
@example([1.0, 1.0 + 2.0**-23], 0.5)
@example([1.0 + 2.0**-23, 1.0 + 2.0**-22], 0.5)
def test_so_many_reach_a_limit_that_none_is_at(scores: list[float], density: float) -> None:
    given_scores = torch.tensor(scores, dtype=torch.float32)
    limit = limit_of(given_scores, density)
    assert int((given_scores >= limit).sum()) == max(len(scores) - round((1 - density) * len(scores)), 1)
    assert limit.dtype is torch.float32
    far = torch.tensor([0.0, 2.0, 4.0, 8.0])
    assert [float(limit_of(far[1:], share)) for share in (1.0, 0.6, 0.3)] == [1.0, 3.0, 6.0]


def test_one_wrong_kernel_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    bind = runtime.Candidate.bind

    def wrong_if_dense(self: runtime.Candidate, bias: Tensor | None = None) -> Any:
        return Wrong(bind(self, bias), torch.neg) if self.op == "linear" else bind(self, bias)

    monkeypatch.setattr(runtime.Candidate, "bind", wrong_if_dense)
    compiled, _, _ = compiled_of("linear")
    rows = [row for row in compiled.report().sites if row.kind == "linear"]
    assert all(row.format != "dense" and SAID in row.reason for row in rows), [row.reason for row in rows]


@pytest.mark.parametrize("queries", [1, 256])
def test_wrong_attention_by_blocks_stays_dense(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = attend_blocks.computed

    def wrong(query: Tensor, *given: Any, **named: Any) -> tuple[Tensor, Tensor]:
        out, sums = computed(query, *given, **named)
        return (out * 1.5 if query.shape[2] == queries else out), sums

    monkeypatch.setattr(attend_blocks, "computed", wrong)
    model, (x,) = select_blocks.example()
    recipe = Pipeline.parse("select_blocks(always=(SlidingWindow(window=64),)) | lower(margin=-1000.0, rounds=3)")
    compiled = sc.compile(model, (x,), recipe=recipe)
    reasons = [row.reason for row in compiled.report().sites]
    assert any("stays dense: its kernel's numbers are" in reason for reason in reasons), reasons
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_dense_attention_by_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify_compiler.passes.lower import _dense_attention

    kind = _dense_attention.Kind(2, 2, 32, torch.float32, True, 256)
    if not attend.has_kernel(*_dense_attention.random(kind, 256, 256)):
        pytest.skip("no kernel of attention here")
    times_of_attention.cache_clear()
    assert "every" in times_of_attention(kind, 3, torch.get_num_threads())[256]
    computed = attend_blocks.computed
    monkeypatch.setattr(attend_blocks, "computed", lambda *given, **named: tuple(-found for found in computed(*given, **named)))
    times_of_attention.cache_clear()
    assert "every" not in times_of_attention(kind, 3, torch.get_num_threads())[256]
    times_of_attention.cache_clear()


@given(st.integers(1, 50), st.floats(1e-30, 1e30), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_distance_is_relative(size: int, scale: float, dtype: torch.dtype) -> None:
    x = (torch.arange(1, size + 1, dtype=torch.float64) * scale).to(dtype)
    assert distance(x, x) == 0
    assert distance(x * 0, x) == pytest.approx(1)
    assert NEAR < distance(x * 2, x) <= 1.01


def test_the_distance_of_what_is_no_number() -> None:
    x = torch.tensor([1.0, math.nan, math.inf])
    assert distance(x, x) == 0
    assert distance(x, torch.ones(3)) == math.inf
    assert distance(torch.ones(3), x) == math.inf
    assert distance(torch.ones(2), torch.ones(3)) == math.inf
    assert distance(torch.zeros(3), torch.zeros(3)) == 0
    assert distance(torch.ones(3), torch.zeros(3)) == math.inf
    assert distance(torch.empty(0), torch.empty(0)) == 0
    assert distance(x, torch.tensor([1.0, math.inf, math.inf])) == math.inf
    assert distance(x, torch.tensor([1.0, math.nan, -math.inf])) == math.inf


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.randoms(use_true_random=False), st.sampled_from([torch.float32, torch.bfloat16]),
       st.booleans())
def test_one_wrong_slice_of_many_is_seen(shape: list[int], draw: Any, dtype: torch.dtype, relu: bool) -> None:
    """One row, one output, one channel: wherever it is, whatever the norm of all says; rounding is not, also where half of the numbers are 0."""
    torch.manual_seed(draw.randrange(1 << 30))
    right = torch.randn(shape, dtype=torch.float32)
    found = right + torch.randn_like(right) * (3e-7 if dtype is torch.float32 else 2e-3)
    right, found = ((numbers.relu() if relu else numbers).to(dtype) for numbers in (right, found))
    near = _numbers.near(dtype)
    assert distance(found, right) < near
    dim = draw.randrange(len(shape))
    spoilt = right.clone()
    spoilt.select(dim, draw.randrange(shape[dim])).add_(2)
    assert distance(spoilt, right) > near


def test_a_row_of_thousands_is_seen() -> None:
    right = torch.randn(4096, 64, dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    found = right.clone()
    found[1000] = found[1000].flip(0)
    assert distance(found, right, slices=False) < NEAR_HALF < distance(found, right)
    right[0] *= 1000    # as the first token of a text
    found[0] = right[0]
    assert distance(found, right) > NEAR_HALF


def test_numbers_are_compared_in_little_memory() -> None:
    """What wide numbers and their squares need is that of a stretch, however large the outputs are."""
    right = torch.ones(32, nearness.STRETCH // 4, dtype=torch.float32)
    found, largest = right.clone(), 0
    given = {one.untyped_storage().data_ptr() for one in (found, right)}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                largest = max(largest, made.untyped_storage().nbytes())
            return made

    with Watched():
        assert distance(found, right) == 0
    assert nearness.STRETCH * 8 <= largest < nearness.STRETCH * 12


@pytest.mark.parametrize("stretch", [1, 7, 24, 100])
def test_the_distance_is_of_all_stretches(stretch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = torch.randn(2, 3, 4, 4).unbind(0)
    found = found.transpose(0, 2)   # not in its order in memory
    expected = expected.transpose(0, 2).contiguous()
    expected[-1, -1, -1] = math.nan
    found[-1, -1, -1] = math.nan
    whole = float(torch.linalg.vector_norm((found - expected).nan_to_num())) / float(torch.linalg.vector_norm(expected.nan_to_num()))
    monkeypatch.setattr(nearness, "STRETCH", stretch)
    assert distance(found, expected, slices=False) == pytest.approx(whole, rel=1e-5)
    farthest = distance(found, expected)
    monkeypatch.setattr(nearness, "STRETCH", 1 << 20)
    assert distance(found, expected) == pytest.approx(farthest, rel=1e-12)
    monkeypatch.setattr(nearness, "STRETCH", stretch)
    found[-1, -1, -1] = 1.0
    assert distance(found, expected) == math.inf
