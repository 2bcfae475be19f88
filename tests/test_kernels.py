"""Every kernel against a float64 product with the decoded weight: shapes, dtypes, structures, edges, threads, artefacts."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_help import needs_tiles
from torch import Tensor, nn

from sparsify_compiler import catalog, pages
from sparsify_compiler.codegen import build, omp, permission, runtime
from sparsify_compiler.codegen.bound import BoundKernel
from sparsify_compiler.codegen.kernels import strips
from sparsify_compiler.codegen.kernels.finish import finish_of
from sparsify_compiler.codegen.kernels.tile_layout import prepare_tiles
from sparsify_compiler.codegen.kernels.tiles import Tiles
from sparsify_compiler.codegen.laid import Laid, Variants
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.target import Target, host, resolve

ROWS = (0, 1, 7, 16, 129)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # of the sum of |w||x|: float32 sums of a few hundred terms; one bfloat16 rounding


def mask_of(structure: str, rows: int, columns: int, density: float, **sizes: int) -> Tensor:
    """A random mask [rows, columns] of a structure."""
    noise = torch.rand(rows, columns)
    if structure in ("csr", "bitmap"):
        return noise < density
    if structure == "condensed":
        return torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, noise.topk(round(columns * density), 1).indices, True)
    if structure == "nm":
        best = noise.view(rows, -1, sizes["m"]).topk(sizes["n"], 2).indices
        return torch.zeros(rows, columns // sizes["m"], sizes["m"], dtype=torch.bool).scatter_(2, best, True).view(rows, columns)
    r, c = sizes["r"], sizes["c"]
    blocks = torch.rand(-(-rows // r), columns // c) < density
    return blocks.repeat_interleave(r, 0).repeat_interleave(c, 1)[:rows]


Bound = tuple[BoundKernel, Tensor, Tensor]


def bound(structure: str, mask: Tensor, dtype: torch.dtype, bias: bool = True, choice: int = 0, **sizes: int) -> Bound:
    """A kernel of random values, and its masked weight and bias in float64."""
    n, k = mask.shape
    weight = torch.randn(n, k).to(dtype)
    stored = catalog.get("format", structure).encode(weight, mask, **sizes)
    offset = torch.randn(n).to(dtype) if bias else None
    found = runtime.candidates(f"linear_{structure}", stored.tensors(), stored.attributes(), dtype, ROWS, host())
    return found[choice % len(found)].bind(offset), weight.double() * mask, torch.zeros(n).double() if offset is None else offset.double()


def assert_right(kernel: BoundKernel, weight: Tensor, bias: Tensor, x: Tensor) -> None:
    y, exact = kernel(x), x.double() @ weight.T + bias
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    scale = x.double().abs() @ weight.abs().T + bias.abs()
    assert ((y.double() - exact).abs() <= TOLERANCE[x.dtype] * scale + 1e-30).all()


STRUCTURES: list[tuple[str, dict[str, int]]] = [
    ("csr", {}), ("bitmap", {}), ("condensed", {}), ("nm", {"n": 2, "m": 4}), ("nm", {"n": 1, "m": 3}),
    *(("bsr", {"r": r, "c": c}) for r, c in ((16, 1), (32, 1), (8, 1), (4, 1), (4, 4), (2, 1), (3, 2), (24, 3))),
]
CASES = [pytest.param(name, sizes, dtype, id=f"{name}-{'x'.join(map(str, sizes.values()))}-{str(dtype)[6:]}")
         for name, sizes in STRUCTURES for dtype in (torch.float32, torch.bfloat16)]


pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("choice", [0, -1])
@pytest.mark.parametrize(("structure", "sizes", "dtype"), CASES)
def test_numbers(structure: str, sizes: dict[str, int], dtype: torch.dtype, choice: int) -> None:
    kernel, weight, bias = bound(structure, mask_of(structure, 37, 60, 0.2, **sizes), dtype, choice=choice, **sizes)
    for rows in (*ROWS, 100):
        assert_right(kernel, weight, bias, torch.randn(rows, 60).to(dtype))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(n=st.integers(1, 90), k=st.integers(1, 90), rows=st.integers(0, 70), density=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
       case=st.sampled_from([("csr", {}), ("condensed", {}), *(("bsr", {"r": r, "c": 1}) for r in (32, 16, 8, 4, 5))]),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), bias=st.booleans(), choice=st.integers(0, 2))
def test_any_shape(n: int, k: int, rows: int, density: float, case: tuple[str, dict[str, int]], dtype: torch.dtype, bias: bool, choice: int) -> None:
    structure, sizes = case
    kernel, weight, offset = bound(structure, mask_of(structure, n, k, density, **sizes), dtype, bias, choice, **sizes)
    assert_right(kernel, weight, offset, torch.randn(rows, k).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("structure", "sizes"), [("csr", {}), ("bsr", {"r": 16, "c": 1}), ("bsr", {"r": 4, "c": 1})])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("choice", [0, -1])
def test_only_kept_places_contribute(structure: str, sizes: dict[str, int], dtype: torch.dtype, bad: float, choice: int) -> None:
    mask = mask_of(structure, 40, 33, 0.15, **sizes)
    mask[16:32] = False  # rows that keep nothing
    kernel, _, bias = bound(structure, mask, dtype, choice=choice, **sizes)
    for rows in (1, 3, 40):
        for column in (0, 17, 32):
            x = torch.randn(rows, 33).to(dtype)
            x[rows // 2, column] = bad
            y, reached = kernel(x), mask[:, column]
            assert not y[rows // 2, reached].isfinite().any()
            if bad == float("inf"):
                assert not y.isnan().any()
            y[rows // 2, reached] = 0
            assert y.isfinite().all()
            assert torch.equal(y[0 if rows > 1 else rows // 2, 16:32].double(), bias[16:32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    for structure, sizes in (("bsr", {"r": 16, "c": 1}), ("csr", {})):
        kernel, _, _ = bound(structure, mask_of(structure, 400, 300, 0.3, **sizes), dtype, **sizes)
        for rows in (1, 16, 129):
            x = torch.randn(rows, 300).to(dtype)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(kernel(x))
            assert torch.equal(results[0], results[1])
            assert torch.equal(results[0], results[2])


def test_any_tensor_that_linear_takes() -> None:
    kernel, weight, bias = bound("bsr", mask_of("bsr", 48, 40, 0.3, r=16, c=1), torch.float32, r=16, c=1)
    x = torch.randn(2, 3, 40)
    expected = kernel(x.view(6, 40)).view(2, 3, 48)
    assert_right(kernel, weight, bias, x)
    for view in (x.clone().requires_grad_(), x.transpose(0, 1).contiguous().transpose(0, 1), torch.randn(2, 3, 80)[..., ::2].copy_(x)):
        assert torch.equal(kernel(view), expected)
    assert torch.equal(kernel(x[0, 0]), expected[0, 0])
    assert kernel(x[:0]).shape == (0, 3, 48)
    with torch.inference_mode():
        assert torch.equal(kernel(x.clone()), expected)
    with torch.no_grad():
        assert torch.equal(kernel(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_need_no_alignment(dtype: torch.dtype) -> None:
    kernel, _, _ = bound("bsr", mask_of("bsr", 48, 64, 0.3, r=16, c=1), dtype, r=16, c=1)
    for rows in (1, 40):
        for offset in (1, 7):
            x = torch.randn(rows * 64 + 8).to(dtype)[offset : offset + rows * 64].view(rows, 64)
            assert torch.equal(kernel(x), kernel(x.clone()))


def test_bad_input_is_refused() -> None:
    kernel, _, _ = bound("csr", mask_of("csr", 8, 10, 0.5), torch.float32)
    for x in (torch.randn(3, 9), torch.randn(()), torch.randn(3, 10, dtype=torch.float64), torch.randn(3, 10, device="meta")):
        with pytest.raises(InputError):
            kernel(x)


def test_many_rows_are_cut_into_slabs() -> None:
    kernel, weight, bias = bound("bsr", mask_of("bsr", 32, 20, 0.3, r=16, c=1), torch.float32, r=16, c=1)
    kernel._slab = 32
    assert_right(kernel, weight, bias, torch.randn(100, 20))


def test_unknown_dtypes_and_ops_have_no_candidates() -> None:
    stored = catalog.get("format", "csr").encode(torch.randn(4, 4), torch.ones(4, 4, dtype=torch.bool))
    for op, dtype in (("linear_csr", torch.float64), ("linear_csr", torch.bfloat16), ("linear_other", torch.float32)):
        assert runtime.candidates(op, stored.tensors(), stored.attributes(), dtype, (1,), host()) == []


def test_candidates_of_one_weight_share_its_layout() -> None:
    mask, bias = mask_of("bsr", 256, 512, 0.5, r=16, c=1), torch.randn(256)
    form = catalog.get("format", "bsr").encode(torch.randn(256, 512), mask, r=16, c=1)
    shared: dict[str, list[Any]] = {}
    found = [one for more in ({}, {"activation": "relu"}) for one in runtime.candidates(
        "linear_bsr", form.tensors(), {**form.attributes(), **more}, torch.float32, (64,), host(), shared)]
    made = [one for one in (candidate.bind(bias) for candidate in found) if isinstance(one, BoundKernel)]
    layouts = {type(one.prepared): one.prepared for one in made}
    assert len(made) > len(layouts), "there is nothing to share"
    assert all(one.prepared is layouts[type(one.prepared)] for one in made)
    assert all(_in_huge_pages(one.prepared.values) for one in made)
    other = found[0].bind(torch.randn(256))
    assert all(other.prepared is not one.prepared for one in made), "another bias is another layout"


def _in_huge_pages(tensor: Tensor) -> bool:
    return not hasattr(mmap, "MADV_HUGEPAGE") or any(tensor.data_ptr() in room.range for room in pages._rooms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rebind_gives_the_same_bits(dtype: torch.dtype) -> None:
    weight, bias = torch.randn(48, 40).to(dtype), torch.randn(48).to(dtype)
    stored = catalog.get("format", "bsr").encode(weight, mask_of("bsr", 48, 40, 0.3, r=16, c=1), r=16, c=1)
    given = "linear_bsr", stored.tensors(), stored.attributes()
    kernel = runtime.candidates(*given, dtype, (20,), host())[0].bind(bias)
    again = runtime.rebind(given[0], kernel.options, *given[1:], bias, kernel.files(), kernel.target)
    x = torch.randn(20, 40).to(dtype)
    assert torch.equal(again(x), kernel(x))
    assert kernel.resident_bytes == sum(t.numel() * t.element_size() for t in kernel.state().values())


def test_an_artefact_for_another_machine_is_refused_or_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = catalog.get("format", "csr").encode(torch.randn(20, 20), mask_of("csr", 20, 20, 0.3))
    kernel = runtime.candidates("linear_csr", stored.tensors(), stored.attributes(), torch.float32, (5,), host())[0].bind()
    rest: tuple[Any, ...] = (kernel.options, stored.tensors(), stored.attributes(), None)
    x, files = torch.randn(5, 20), kernel.files()
    other_arch = Target("board", "aarch64", "generic", ("neon",), 4) if host().arch != "aarch64" else Target("pc", "x86_64", "x86-64", (), 4)
    with pytest.raises(KernelError, match=other_arch.arch):
        runtime.rebind("linear_csr", *rest, files, other_arch)
    poorer = replace(host(), features=tuple(f for f in host().features if f in ("avx2", "fma")))
    monkeypatch.setattr(build, "host", lambda: poorer)
    if host().features != poorer.features:
        with pytest.raises(KernelError, match="lacks"):
            runtime.rebind("linear_csr", *rest, files, host())
    monkeypatch.undo()
    damaged = {name: data[:-1] if name.endswith("binary") else data for name, data in files.items()}
    assert torch.equal(runtime.rebind("linear_csr", *rest, damaged, host())(x), kernel(x))
    newer = {name: data.replace(build.version().encode(), b"99.0") if name.endswith("json") else data for name, data in files.items()}
    assert torch.equal(runtime.rebind("linear_csr", *rest, newer, host())(x), kernel(x))
    with pytest.raises(KernelError, match="damaged"):
        runtime.rebind("linear_csr", *rest, {name: b"{" if name.endswith("json") else data for name, data in files.items()}, host())
    for op, options, why in (("linear_csr", {"family": "lanes"}, "does not fit"), ("linear_other", kernel.options, "does not fit"),
                             ("linear_csr", {}, "no family of kernels called 'None'")):
        with pytest.raises(KernelError, match=why):
            runtime.rebind(op, options, *rest[1:], files, host())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 130])
def test_dense_packed(dtype: torch.dtype, rows: int) -> None:
    for size in ((1, 1), (7, 5), (384, 100)):
        weight, bias = torch.randn(size).to(dtype), torch.randn(size[0]).to(dtype)
        found = runtime.candidates("linear", {"weight": weight}, {}, dtype, (16,), host())
        if not found:
            pytest.skip("this torch has no packed dense linear for the dtype")
        x = torch.randn(2, rows, size[1]).to(dtype)
        for kernel in (found[0].bind(bias), runtime.rebind("linear", {"family": "linear", "rows": 16}, {"weight": weight}, {}, bias, {}, host())):
            assert_close(kernel(x), torch.nn.functional.linear(x, weight, bias))
    assert runtime.candidates("linear", {"weight": weight.half()}, {}, torch.float16, (16,), host()) == []




@needs_tiles
@pytest.mark.parametrize(("n", "k", "r", "c", "density"), [
    (64, 96, 32, 32, 0.5), (96, 64, 32, 32, 1.0), (40, 64, 32, 32, 0.5), (100, 320, 64, 1, 0.3), (24, 40, 8, 2, 0.4), (12, 33, 4, 1, 1.0),
    (32, 32, 16, 1, 0.0)])
def test_tiles(n: int, k: int, r: int, c: int, density: float) -> None:
    kernel, weight, bias = bound("bsr", mask_of("bsr", n, k, density, r=r, c=c), torch.bfloat16, r=r, c=c)
    assert "_amx_" in kernel.name
    for rows in (0, 1, 15, 16, 17, 32, 33, 64, 200):
        assert_right(kernel, weight, bias, torch.randn(rows, k).bfloat16())


FINISHES: list[tuple[str, dict[str, Any], Any]] = [
    ("relu", {}, torch.relu), ("gelu", {"approximate": "none"}, nn.functional.gelu), ("silu", {}, nn.functional.silu),
    ("gelu", {"approximate": "tanh"}, partial(nn.functional.gelu, approximate="tanh")),
    ("hardtanh", {"min_val": -1.0, "max_val": 2.0}, nn.Hardtanh(-1, 2)), ("", {}, nn.Identity())]


@needs_tiles
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("name", "numbers", "activation", "r"), [*((*finish, 32) for finish in FINISHES), (*FINISHES[1], 16), (*FINISHES[1], 4)])
def test_tiles_finish(name: str, numbers: dict[str, Any], activation: Any, r: int, add: bool) -> None:
    """bias, then + other, then the activation, over edges of y too; a NaN goes through."""
    finish = finish_of(({"activation": name, "arguments": numbers} if name else {}) | ({"add": True} if add else {}), rough=True)
    assert finish is not None
    weight, mask, bias = torch.randn(76, 64).bfloat16(), mask_of("bsr", 76, 64, 0.3, r=r, c=1), torch.randn(76).bfloat16()
    stored = catalog.get("format", "bsr").encode(weight, mask, r=r, c=1)
    prepared = prepare_tiles(catalog.get("kernel", "linear_bsr").groups(stored.tensors(), stored.attributes()), bias, 76, 64)
    kernel = BoundKernel(Laid("tiles", {}, prepared, Variants({"it": Tiles(prepared.layout, 2, 1, finish)}, lambda rows: "it", add), host()))
    for rows in (1, 16, 39):
        x, other = torch.randn(rows, 64).bfloat16(), torch.randn(rows, 76).bfloat16()
        sums = nn.functional.linear(x.float(), (weight * mask).float(), bias.float())
        x[-1, 0] = float("nan")
        sums[-1, mask[:, 0]] = float("nan")
        got = kernel(x, other) if add else kernel(x)
        want = activation(sums + other.float() if add else sums)
        assert torch.equal(got.isnan(), want.isnan())
        assert_close(got[:-1], want[:-1].bfloat16())
    if add:
        with pytest.raises(InputError, match="what is added"):
            kernel(x)
        with pytest.raises(InputError, match="what is added"):
            kernel(x, other[:1])
        kernel._slab, x = 64, torch.randn(2, 65, 64).bfloat16()
        other = torch.randn(76, 65, 2).bfloat16().transpose(0, 2)
        want = torch.cat([kernel(part, more) for part, more in zip(x.flatten(0, 1).split(64), other.flatten(0, 1).split(64), strict=True)])
        kernel._plans.clear()
        assert torch.equal(kernel(x, other).flatten(0, 1), want)


def test_gelu_in_float32_is_as_near_as_float32_can_be() -> None:
    """Also where Φ is 0 or 1 for all that float32 knows; the quotient itself goes beyond them there."""
    width = 64
    stored = catalog.get("format", "csr").encode(torch.eye(width), torch.eye(width) > 0)
    after = {"activation": "gelu", "arguments": {"approximate": "none"}}
    kernel = next(one for one in runtime.candidates("linear_csr", stored.tensors(), stored.attributes() | after, torch.float32, (width,), host())
                  if one.options["family"] == "strips").bind()
    x = torch.cat((torch.linspace(-7, 7, 4 * width * width), torch.logspace(-30, 30, 2 * width), -torch.logspace(-30, 30, 2 * width))).view(-1, width)
    got, want = kernel(x).double(), x.double() * torch.special.ndtr(x.double())
    assert bool(((got - want).abs() <= 2.5e-7 * x.abs()).all())
    assert torch.equal(got[x > 6], x[x > 6].double())
    assert not got[x < -6].any()


def test_a_stored_kernel_with_an_unknown_activation_is_refused() -> None:
    stored = catalog.get("format", "csr").encode(torch.randn(32, 32), torch.ones(32, 32, dtype=torch.bool))
    after = {"activation": "tanh", "arguments": {}}
    with pytest.raises(KernelError, match="activation"):
        runtime.rebind("linear_csr", {"family": "strips", "dtype": "float32"}, stored.tensors(), stored.attributes() | after, None, {}, host())


@needs_tiles
@pytest.mark.parametrize(("workers", "c", "across"), [(1, 1, 1), (2, 1, 2), (3, 32, 2), (5, 1, 1)])
def test_tiles_shared_out(workers: int, c: int, across: int) -> None:
    """Panels of x with one owner each, and those left over with several, give the same numbers for any number of workers and threads."""
    weight, mask = torch.randn(160, 64).bfloat16(), mask_of("bsr", 160, 64, 0.4, r=32, c=c)
    stored = catalog.get("format", "bsr").encode(weight, mask, r=32, c=c)
    groups = catalog.get("kernel", "linear_bsr").groups(stored.tensors(), stored.attributes())
    prepared = prepare_tiles(groups, None, 160, 64)
    kernel = BoundKernel(Laid("tiles", {}, prepared, Variants({"it": Tiles(prepared.layout, across, workers)}, lambda rows: "it"), host()))
    for rows in (1, 33, 16 * across * workers, 16 * across * (workers + 1), 16 * across * (2 * workers - 1) + 3):
        assert_right(kernel, weight.double() * mask, torch.zeros(160).double(), torch.randn(rows, 64).bfloat16())


@needs_tiles
@pytest.mark.parametrize(("n", "k"), [(1, 32), (40, 96), (64, 64)])
def test_dense_tiles(n: int, k: int) -> None:
    weight, bias = torch.randn(n, k).bfloat16(), torch.randn(n).bfloat16()
    found = {c.name: c for c in runtime.candidates("linear", {"weight": weight}, {}, torch.bfloat16, (16,), host())}
    kernel = found["dense amx"].bind(bias)
    for rows in (0, 1, 16, 40):
        assert_right(kernel, weight.double(), bias.double(), torch.randn(2, rows, k).bfloat16())
    odd = {"weight": torch.randn(8, 33).bfloat16()}
    assert not any("amx" in c.name for c in runtime.candidates("linear", odd, {}, torch.bfloat16, (16,), host()))


def test_tiles_are_not_offered_where_the_system_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permission, "tiles", lambda: False)
    stored = catalog.get("format", "bsr").encode(torch.randn(32, 32).bfloat16(), torch.ones(32, 32, dtype=torch.bool), r=32, c=1)
    given = stored.tensors(), stored.attributes()
    assert not any("amx" in c.name for c in runtime.candidates("linear_bsr", *given, torch.bfloat16, (16,), host()))
    with pytest.raises(KernelError, match="AMX"):
        runtime.rebind("linear_bsr", {"family": "amx"}, *given, None, {}, host())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("structure", "sizes"), [("csr", {}), ("nm", {"n": 2, "m": 4}), *(("bsr", {"r": r, "c": 1}) for r in (2, 4, 16))])
def test_strips(structure: str, sizes: dict[str, int], threads: int) -> None:
    """Several blocks of columns, strips and tiles; workers that share a tile; groups that keep nothing of a block, or nothing at all."""
    torch.set_num_threads(threads)
    for dtype, (n, k), density in ((torch.float32, (48, 2100), 0.02), (torch.float32, (3200, 36), 0.3), (torch.bfloat16, (68, 300), 0.2)):
        mask = mask_of(structure, n, k, density, **sizes)
        if structure != "nm":
            mask[:, 128:260] = False
        weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
        stored = catalog.get("format", structure).encode(weight, mask, **sizes)
        given = f"linear_{structure}", stored.tensors(), stored.attributes(), dtype
        found = {c.options["family"]: c for c in runtime.candidates(*given, (64,), host())}
        if "strips" not in found:
            assert dtype is torch.bfloat16
            assert sizes["r"] >= strips.PAIRS_FROM
            continue
        kernel = found["strips"].bind(bias)
        for rows in (1, 16, 50, 64, 65, 130, 200):
            assert_right(kernel, weight.double() * mask, bias.double(), torch.randn(rows, k).to(dtype))


needs_dots = pytest.mark.skipif(not host().has("avx512bf16"), reason="this machine does not multiply pairs of bfloat16")
PAIRS = {"family": "strips", "dtype": "bfloat16", "pairs": True}


@needs_dots
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(n=st.integers(1, 90), quads=st.integers(1, 60), rows=st.integers(0, 140), finish=st.sampled_from([{}, {"activation": "relu"}, {"add": True}]))
def test_pairs_of_2_4(n: int, quads: int, rows: int, finish: dict[str, Any]) -> None:
    """Whole blocks and parts, one kernel for all: what is kept of four inputs is one word."""
    k = 4 * quads
    weight, mask, bias = torch.randn(n, k).bfloat16(), mask_of("nm", n, k, 0.5, n=2, m=4), torch.randn(n).bfloat16()
    stored = catalog.get("format", "nm").encode(weight, mask, n=2, m=4)
    kernel = runtime.rebind("linear_nm", PAIRS, stored.tensors(), stored.attributes() | finish, bias, {}, host())
    x, other = torch.randn(rows, k).bfloat16(), torch.randn(rows, n).bfloat16()
    exact = x.double() @ (weight.double() * mask).T + bias.double() + (other.double() if "add" in finish else 0)
    got, want = kernel(x, other) if "add" in finish else kernel(x), exact.relu() if "activation" in finish else exact
    scale = x.double().abs() @ (weight.double() * mask).abs().T + bias.double().abs() + other.double().abs()
    assert ((got.double() - want).abs() <= TOLERANCE[torch.bfloat16] * scale + 1e-30).all()


@needs_dots
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pairs_read_kept_places_only(bad: float) -> None:
    weight, mask = torch.randn(40, 132).bfloat16(), mask_of("nm", 40, 132, 0.5, n=2, m=4)
    stored = catalog.get("format", "nm").encode(weight, mask, n=2, m=4)
    kernel = runtime.rebind("linear_nm", PAIRS, stored.tensors(), stored.attributes(), None, {}, host())
    for column in (0, 3, 62, 127, 131):
        x = torch.randn(40, 132).bfloat16()
        x[7, column] = bad
        assert torch.equal(kernel(x).isfinite()[7], ~mask[:, column])
        assert kernel(x)[:7].isfinite().all()


def test_pairs_are_for_machines_that_multiply_them_and_have_no_tiles() -> None:
    stored = catalog.get("format", "nm").encode(torch.randn(32, 32).bfloat16(), mask_of("nm", 32, 32, 0.5, n=2, m=4), n=2, m=4)
    given = "linear_nm", stored.tensors(), stored.attributes()
    for name, wanted in (("x86-vnni-bf16", True), ("x86-amx", False), ("x86-avx512", False), ("neoverse-v2", False)):
        names = {c.name for c in runtime.candidates(*given, torch.bfloat16, (64,), resolve(name)) if c.options["family"] == "strips"}
        assert names == {"nm_pairs4x4" if wanted else "nm_strips4x4"}, name
    assert not any("pairs" in c.name for c in runtime.candidates(*given, torch.float32, (64,), resolve("x86-vnni-bf16")))
    other = catalog.get("format", "nm").encode(torch.randn(32, 32).bfloat16(), mask_of("nm", 32, 32, 0.5, n=1, m=4), n=1, m=4)
    found = runtime.candidates("linear_nm", other.tensors(), other.attributes(), torch.bfloat16, (64,), resolve("x86-vnni-bf16"))
    assert not any("pairs" in c.name for c in found)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "numbers", "activation"), FINISHES)
def test_strips_finish(name: str, numbers: dict[str, Any], activation: Any, dtype: torch.dtype, add: bool) -> None:
    """bias, then + other, then the activation, over edges of y too."""
    weight, mask, bias = torch.randn(76, 64).to(dtype), mask_of("csr", 76, 64, 0.3), torch.randn(76).to(dtype)
    stored = catalog.get("format", "csr").encode(weight, mask)
    follows = ({"activation": name, "arguments": numbers} if name else {}) | ({"add": True} if add else {})
    given = "linear_csr", stored.tensors(), stored.attributes() | follows, dtype
    kernel = next(c for c in runtime.candidates(*given, (39,), host()) if c.options["family"] == "strips").bind(bias)
    for rows in (1, 16, 39):
        x, other = torch.randn(rows, 64).to(dtype), torch.randn(rows, 76).to(dtype)
        sums = nn.functional.linear(x.float(), (weight * mask).float(), bias.float())
        got = kernel(x, other) if add else kernel(x)
        assert_close(got, activation(sums + other.float() if add else sums).to(dtype))



def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1.6e-2 if got.dtype is torch.bfloat16 else 1e-5, atol=1e-1 if got.dtype is torch.bfloat16 else 1e-4)


def test_narrower_machines_get_the_same_numbers() -> None:
    """Code for AVX2 alone, run here: other registers, no bfloat16 dot product."""
    if not host().has("avx512f"):
        pytest.skip("this machine is the narrow one")
    narrow = replace(host(), name="x86-avx2", features=tuple(f for f in host().features if not f.startswith(("avx512", "amx"))))
    for dtype in (torch.float32, torch.bfloat16):
        mask, weight = mask_of("bsr", 48, 40, 0.3, r=16, c=1), torch.randn(48, 40).to(dtype)
        stored = catalog.get("format", "bsr").encode(weight, mask, r=16, c=1)
        kernel = runtime.candidates("linear_bsr", stored.tensors(), stored.attributes(), dtype, ROWS, narrow)[0].bind()
        for rows in ROWS:
            assert_right(kernel, weight.double() * mask, torch.zeros(48).double(), torch.randn(rows, 40).to(dtype))


def test_kernels_run_on_torchs_threads() -> None:
    """No thread is started for kernels: with one torch thread, the process has as many after parallel kernels ran as before."""
    library, reason = omp.runtime()
    if library is None or not Path("/proc/self/task").exists():
        pytest.skip(reason or "threads cannot be counted here")
    script = """
import os, torch
from sparsify_compiler.codegen import omp, runtime
from sparsify_compiler.formats.csr import Csr
from sparsify_compiler.target import host
torch.set_num_threads(1)
stored = Csr.encode(torch.randn(512, 512), torch.rand(512, 512) < 0.5)
found = {c.options["family"]: c for c in runtime.candidates("linear_csr", stored.tensors(), stored.attributes(), torch.float32, (1, 128), host())}
kernel = found["lanes"].bind()
torch.mm(torch.randn(512, 512), torch.randn(512, 512))
before = len(os.listdir("/proc/self/task"))
for rows in (1, 16, 128):
    assert kernel._variant(rows).endswith("together")
    kernel(torch.randn(rows, 512))
assert len(os.listdir("/proc/self/task")) == before, "kernels started threads of their own"
print(omp.status())
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch's OpenMP threads\n"


def test_bitcode_and_the_jit_where_our_linker_cannot_help(tmp_path: Path) -> None:
    """The way of every machine but x86-64 Linux: same numbers, still on torch's threads; built first, then from the cache."""
    code = """
import os, torch
from sparsify_compiler import catalog
from sparsify_compiler.codegen import elf, runtime
from sparsify_compiler.target import host
def refuse(data): raise elf.UnsupportedError("another format")
elf.shared_library = refuse
weight, mask = torch.randn(384, 300), torch.rand(384, 300) < 0.2
stored = catalog.get("format", "csr").encode(weight, mask)
kernel = runtime.candidates("linear_csr", stored.tensors(), stored.attributes(), torch.float32, (1, 128), host())[0].bind()
threads = len(os.listdir("/proc/self/task"))
for rows in (1, 7, 128):
    x = torch.randn(rows, 300)
    torch.testing.assert_close(kernel(x), x @ (weight * mask).T, rtol=1e-4, atol=1e-4)
assert len(os.listdir("/proc/self/task")) <= threads + torch.get_num_threads(), "a second thread pool was started"
"""
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env={**os.environ, "SPARSIFY_CACHE": str(tmp_path)})


@pytest.mark.parametrize(("l2", "structure", "block"), [(1 << 20, (32, 1), 512), (2 << 20, (32, 1), 1024), (1 << 20, (2, 1), 256),
                                                        (1 << 20, (1, 1), 128)])
def test_strips_are_cut_for_the_second_cache(monkeypatch: pytest.MonkeyPatch, l2: int, structure: tuple[int, int], block: int) -> None:
    """Wide blocks of x only where they fit beside the sums; options alone say how, so that an artefact is laid out as it was."""
    monkeypatch.setattr(strips, "second_cache", lambda target: l2)
    r, c = structure
    mask = (torch.rand(-(-40 // r), 1100 // c) < 0.3).repeat_interleave(r, 0)[:40]
    weight, bias, x = torch.randn(40, 1100), torch.randn(40), torch.randn(33, 1100)
    form = catalog.get("format", "bsr").encode(weight, mask, r=r, c=c)
    [(_, options)] = strips.offer("linear_bsr", form.tensors(), form.attributes(), torch.float32, (33,), host())
    assert ("block" in options) == (block == 512)   # elsewhere as before there was a choice: artefacts of then have no such option
    monkeypatch.setattr(strips, "second_cache", lambda target: 0)
    shared: list[Any] = []
    strips.lay("linear_bsr", {**options, "block": 640}, form.tensors(), form.attributes(), bias, host(), shared)
    laid = strips.lay("linear_bsr", options, form.tensors(), form.attributes(), bias, host(), shared)
    assert laid.prepared.layout.block == block      # not the layout of another cut
    torch.testing.assert_close(BoundKernel(laid)(x), x @ form.decode().T + bias, rtol=1e-4, atol=1e-4)
