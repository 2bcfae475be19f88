"""Kernels on slices of 16 outputs: any mask and any n:m at few rows of x, against a float64 product; what they take in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import assert_right, mask_of
from torch import Tensor

from sparsify_compiler import catalog
from sparsify_compiler.codegen import runtime
from sparsify_compiler.codegen.bound import BoundKernel
from sparsify_compiler.codegen.kernels import slices
from sparsify_compiler.codegen.kernels.slice_layout import FURTHEST, SKIP, WINDOW, places_fit, prepare_gaps
from sparsify_compiler.cost_models import slices as cost
from sparsify_compiler.cost_models.symbols import evaluate
from sparsify_compiler.errors import KernelError
from sparsify_compiler.target import Target, host, resolve

CODINGS = ("gaps", "columns")       # of any mask
DTYPES = (torch.float32, torch.bfloat16)
PATTERNS = ((2, 4), (1, 4), (3, 4), (1, 3), (4, 8), (5, 7), (8, 16), (2, 11), (1, 1))


def bound(structure: str, weight: Tensor, mask: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None, target: Target | None = None,
          any_mask: str = "gaps", **sizes: int) -> BoundKernel:
    """The kernel for one row of x, offered here or not; of a weight in bfloat16 and x in another dtype where given. any_mask: how those are coded."""
    stored = catalog.get("format", structure).encode(weight, mask, **sizes)
    coding = "places" if structure == "nm" and places_fit(sizes["n"], sizes["m"]) else any_mask
    options = {"family": slices.NAME, "dtype": str(dtype or weight.dtype).removeprefix("torch."), "coding": coding}
    return runtime.rebind(f"linear_{structure}", options, stored.tensors(), stored.attributes(), bias, {}, target or host())  # type: ignore[no-any-return]


def check(kernel: BoundKernel, weight: Tensor, mask: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype) -> None:
    exact = torch.zeros(weight.shape[0]).double() if bias is None else bias.double()
    assert_right(kernel, weight.double() * mask, exact, torch.randn(rows, weight.shape[1]).to(dtype))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(n=st.integers(1, 70), k=st.integers(1, 300), rows=st.sampled_from([0, 1, 2, 3, 5, 16, 33]),
       density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]), structure=st.sampled_from(["csr", "bitmap", "condensed"]),
       dtype=st.sampled_from(DTYPES), bias=st.booleans(), coding=st.sampled_from(CODINGS))
def test_any_mask(n: int, k: int, rows: int, density: float, structure: str, dtype: torch.dtype, bias: bool, coding: str) -> None:
    mask, weight = mask_of(structure, n, k, density), torch.randn(n, k).to(dtype)
    offset = torch.randn(n).to(dtype) if bias else None
    check(bound(structure, weight, mask, offset, any_mask=coding), weight, mask, offset, rows, dtype)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(n=st.integers(1, 40), groups=st.integers(1, 40), rows=st.sampled_from([0, 1, 2, 15, 40]), pattern=st.sampled_from(PATTERNS),
       dtype=st.sampled_from(DTYPES), bias=st.booleans())
def test_n_of_every_m(n: int, groups: int, rows: int, pattern: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    sizes = {"n": pattern[0], "m": pattern[1]}
    mask, weight = mask_of("nm", n, groups * sizes["m"], 0.0, **sizes), torch.randn(n, groups * sizes["m"]).to(dtype)
    offset = torch.randn(n).to(dtype) if bias else None
    kernel = bound("nm", weight, mask, offset, **sizes)
    assert kernel.name == "nm_places"
    check(kernel, weight, mask, offset, rows, dtype)


def test_wide_groups_are_coded_as_gaps() -> None:
    for n, m in ((2, 32), (9, 16)):
        mask, weight = mask_of("nm", 20, 2 * m, 0.0, n=n, m=m), torch.randn(20, 2 * m)
        kernel = bound("nm", weight, mask, n=n, m=m)
        assert kernel.name == "nm_gaps"
        check(kernel, weight, mask, None, 1, torch.float32)


def test_machines_without_masks_get_the_same_numbers() -> None:
    """Not offered there, but built again for an artefact that was made elsewhere."""
    narrow = resolve("x86-avx2") if host().has("avx512f") else host()
    cases = (("csr", torch.bfloat16, {}, "gaps"), ("csr", torch.bfloat16, {}, "columns"), ("nm", torch.float32, {"n": 2, "m": 4}, ""))
    for structure, dtype, sizes, coding in cases:
        mask, weight, bias = mask_of(structure, 37, 72, 0.3, **sizes), torch.randn(37, 72).to(dtype), torch.randn(37).to(dtype)
        kernel = bound(structure, weight, mask, bias, target=narrow, any_mask=coding, **sizes)
        for rows in (1, 15, 33):
            check(kernel, weight, mask, bias, rows, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gaps_of_any_length(dtype: torch.dtype) -> None:
    """Up to and past what one code moves on, and several of them, at the beginning and inside of a row."""
    wide = 70_000
    for columns in ([0], [127], [128], [255], [256], [382], [383], [384], [wide - 1], [0, 127, 255, 383, 766, 767, 2000], [5, 6, wide - 2]):
        mask = torch.zeros(3, wide, dtype=torch.bool)
        mask[1, columns] = True
        weight = torch.randn(3, wide).to(dtype)
        check(bound("csr", weight, mask), weight, mask, None, 1, dtype)


def test_columns_as_far_as_their_bits_reach() -> None:
    """The last input, and none behind it; one more input is refused, and coded as gaps where a kernel is offered."""
    for wide in (FURTHEST, FURTHEST + 1):
        mask = torch.zeros(3, wide, dtype=torch.bool)
        mask[0, [0, 1, wide - 1]] = mask[2, wide - 1] = True
        weight = torch.randn(3, wide)
        if wide > FURTHEST:
            with pytest.raises(KernelError, match="16 bits"):
                bound("csr", weight, mask, any_mask="columns")
            continue
        for rows in (1, 5):
            check(bound("csr", weight, mask, any_mask="columns"), weight, mask, None, rows, torch.float32)
    slow, fast = resolve("x86-vnni-bf16"), resolve("x86-amx")
    found = [slices.coding_of(target, inputs) for target in (slow, fast) for inputs in (FURTHEST, FURTHEST + 1)]
    assert found == ["columns", "gaps", "gaps", "gaps"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("structure", "coding"), [("csr", "gaps"), ("csr", "columns"), ("nm", "")])
def test_only_kept_places_contribute(structure: str, coding: str, dtype: torch.dtype, bad: float) -> None:
    sizes = {"n": 2, "m": 4} if structure == "nm" else {}
    mask = mask_of(structure, 37, 36, 0.15, **sizes)
    kernel, x = bound(structure, torch.randn(37, 36).to(dtype), mask, any_mask=coding, **sizes), torch.randn(5, 36).to(dtype)
    for rows in (1, 5):
        for column in (0, 3, 17, 35):
            given = x[:rows].clone()
            given[-1, column] = bad
            y, reached = kernel(given), mask[:, column]
            assert not y[-1, reached].isfinite().any()
            assert bad != bad or not y.isnan().any()
            y[-1, reached] = 0
            assert y.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coding", CODINGS)
def test_outputs_change_places_where_that_spares_steps(coding: str, dtype: torch.dtype) -> None:
    n, k = 2 * WINDOW + 5, 200
    mask = torch.rand(n, k) < torch.rand(n, 1)
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    kernel = bound("csr", weight, mask, bias, any_mask=coding)
    assert kernel.prepared.layout.sorted  # type: ignore[attr-defined]
    assert kernel.prepared.values.numel() * (2 if dtype is torch.bfloat16 else 1) < 1.15 * int(mask.sum())  # type: ignore[attr-defined]
    for rows in (1, 2, 20, 40):
        check(kernel, weight, mask, bias, rows, dtype)
    even = torch.ones(n, k, dtype=torch.bool)
    assert not bound("csr", weight, even, any_mask=coding).prepared.layout.sorted  # type: ignore[attr-defined]


def test_narrow_weights_stay_narrow_beside_wide_inputs() -> None:
    for structure, sizes in (("csr", {}), ("nm", {"n": 2, "m": 4})):
        mask, weight = mask_of(structure, 40, 64, 0.3, **sizes), torch.randn(40, 64).bfloat16()
        kernel = bound(structure, weight, mask, dtype=torch.float32, **sizes)
        check(kernel, weight, mask, None, 2, torch.float32)
        assert kernel.resident_bytes < bound(structure, weight.float(), mask, **sizes).resident_bytes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("structure", "sizes"), [("csr", {}), ("nm", {"n": 2, "m": 4})])
def test_threads_do_not_change_a_bit(structure: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
    n, k, threads = 1000, 400, torch.get_num_threads()
    kernel, x = bound(structure, torch.randn(n, k).to(dtype), mask_of(structure, n, k, 0.3, **sizes), **sizes), torch.randn(1, k).to(dtype)
    assert kernel._variant(3).endswith("together")
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(kernel(x.expand(3, k).contiguous())[2])
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rebind_gives_the_same_bits() -> None:
    for structure, sizes in (("csr", {}), ("nm", {"n": 2, "m": 4})):
        weight, bias, x = torch.randn(48, 40), torch.randn(48), torch.randn(1, 40)
        stored = catalog.get("format", structure).encode(weight, mask_of(structure, 48, 40, 0.3, **sizes), **sizes)
        given = f"linear_{structure}", stored.tensors(), stored.attributes()
        kernel = runtime.candidates(*given, torch.float32, (1,), host())[0].bind(bias)
        again = runtime.rebind(given[0], kernel.options, *given[1:], bias, kernel.files(), kernel.target)
        assert torch.equal(again(x), kernel(x))
        assert kernel.resident_bytes == sum(t.numel() * t.element_size() for t in kernel.state().values())


def test_offered_for_few_rows_and_single_outputs_only() -> None:
    def families(structure: str, rows: tuple[int, ...], narrow: bool = False, **sizes: int) -> set[str]:
        stored = catalog.get("format", structure).encode(torch.randn(32, 32), torch.ones(32, 32, dtype=torch.bool), **sizes)
        target = replace(host(), features=tuple(f for f in host().features if not f.startswith("avx512"))) if narrow else host()
        given = f"linear_{structure}", stored.tensors(), stored.attributes(), torch.float32, rows, target
        return {str(c.options["family"]) for c in runtime.candidates(*given)}

    assert (slices.NAME in families("csr", (1,))) == host().has("avx512f")
    assert slices.NAME not in families("csr", (1, 128)) | families("csr", (1,), narrow=True) | families("bsr", (1,), r=4, c=1)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(0, 300), k=st.integers(1, 700), density=st.sampled_from([0.0, 0.02, 0.4, 1.0]), dtype=st.sampled_from(DTYPES))
def test_gaps_take_what_the_formula_says(n: int, k: int, density: float, dtype: torch.dtype) -> None:
    stored = catalog.get("format", "csr").encode(torch.randn(n, k).to(dtype), torch.rand(n, k) < density)
    groups = catalog.get("kernel", "linear_csr").groups(stored.tensors(), stored.attributes())
    for direct, size in ((False, cost.GAPS_BYTES), (True, cost.COLUMNS_BYTES)):
        made = prepare_gaps(groups, dtype, None, n, k, direct)
        sizes = {"M": 3, "N": n, "steps": made.steps, "value_bytes": stored.values.element_size()}
        assert evaluate(size, sizes) == made.resident_bytes
        computed = made.values.numel() * made.layout.step
        assert evaluate(cost.FLOPS, sizes) == 2 * 3 * computed
        assert int((made.codes < (k if direct else SKIP)).sum()) == stored.values.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_places_take_what_the_formula_says(pattern: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = pattern
    for outputs, groups in ((1, 1), (16, 16), (50, 37)):
        made = bound("nm", torch.randn(outputs, groups * m).to(dtype), mask_of("nm", outputs, groups * m, 0.0, n=n, m=m), n=n, m=m).prepared
        sizes = {"N": outputs, "K": groups * m, "n": n, "m": m, "block": made.layout.block}  # type: ignore[attr-defined]
        steps = evaluate(cost.PLACES_STEPS, sizes)
        assert steps == made.steps  # type: ignore[attr-defined]
        assert evaluate(cost.PLACES_BYTES, {**sizes, "steps": steps, "value_bytes": dtype.itemsize}) == made.resident_bytes
