"""Kernels over planes against torch's convolution in float64: geometry, structures, epilogues, edges, threads, artefacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_kernels import mask_of
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import conv2d

from sparsify_compiler import catalog
from sparsify_compiler.codegen import planes, runtime
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.target import Target, host, resolve

ACTIVATIONS: Mapping[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "relu": ({}, torch.relu), "relu6": ({}, functional.relu6), "hardswish": ({}, functional.hardswish), "silu": ({}, functional.silu),
    "hardtanh": ({"min_val": -1.0, "max_val": 2.0}, lambda x: functional.hardtanh(x, -1, 2)),
    "leaky_relu": ({"negative_slope": 0.2}, lambda x: functional.leaky_relu(x, 0.2)),
    "gelu": ({"approximate": "none"}, functional.gelu), "sigmoid": ({}, torch.sigmoid), "hardsigmoid": ({}, functional.hardsigmoid),
}  # fmt: skip
STRUCTURES: list[tuple[str, dict[str, int]]] = [("csr", {}), ("condensed", {}), ("bitmap", {}), ("nm", {"n": 1, "m": 2}),
                                                *(("bsr", {"r": r, "c": 1}) for r in (16, 8, 4, 2, 3))]
PLANES = {"layout": "planes"}
PLAIN = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


pytestmark = pytest.mark.usefixtures("seeded")


def sparse(structure: str, sizes: dict[str, int], weight: Tensor, geometry: dict[str, Any], density: float, shape: tuple[int, ...],
           bias: Tensor | None = None, **epilogue: Any) -> tuple[list[planes.BoundPlanes], Tensor]:
    """Every kernel for a random mask, and the masked weight."""
    matrix = weight.flatten(1)
    mask = mask_of("csr" if structure == "bitmap" else structure, *matrix.shape, density, **sizes)
    form = catalog.get("format", structure).encode(matrix, mask, **sizes)
    numbers = {**form.attributes(), **geometry, "kernel_size": list(weight.shape[2:]), **epilogue}
    found = runtime.candidates(f"conv2d_{structure}", form.tensors(), numbers, torch.float32, shape, host())
    return [candidate.bind(bias) for candidate in found], (matrix * mask).view_as(weight)  # type: ignore[misc]


def assert_right(kernel: Any, weight: Tensor, bias: Tensor | None, x: Tensor, geometry: dict[str, Any]) -> None:
    rest = [geometry[name] for name in ("stride", "padding", "dilation", "groups")]
    y, offset = kernel(x), None if bias is None else bias.double()
    exact, scale = conv2d(x.double(), weight.double(), offset, *rest), conv2d(x.double().abs(), weight.double().abs(), None, *rest) + 1
    assert y.shape == exact.shape
    assert y.stride()[2:] == y.contiguous().stride()[2:]
    assert y.stride(1) % 16 == 0 or y[0, 0].numel() <= 16
    assert bool(((y.double() - exact).abs() <= 2e-6 * scale).all())


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw, pair = data.draw, lambda low, high: [data.draw(st.integers(low, high)) for _ in range(2)]
    structure, sizes = draw(st.sampled_from(STRUCTURES))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels, outputs = (groups * n for n in pair(1, 6))
    channels *= 2 if structure == "nm" else 1
    kernel = draw(st.sampled_from([[1, 1], [1, 1], [3, 3], [2, 3], [1, 5]]))
    geometry: dict[str, Any] = {"stride": pair(1, 3), "padding": pair(0, 2), "dilation": pair(1, 2), "groups": groups}
    geometry = PLAIN | {"groups": groups} if draw(st.booleans()) and kernel == [1, 1] else geometry
    size = [max(1, (k - 1) * d + 1 - 2 * p + draw(st.integers(0, 37)))
            for k, d, p in zip(kernel, geometry["dilation"], geometry["padding"], strict=True)]
    weight, bias = torch.randn(outputs, channels // groups, *kernel), torch.randn(outputs) if draw(st.booleans()) else None
    kernels, masked = sparse(structure, sizes, weight, geometry, draw(st.sampled_from([0.0, 0.2, 1.0])), (1, channels, *size), bias)
    assert kernels
    for kernel_ in kernels:
        for batch, more in ((1, 0), (3, 5)):
            assert_right(kernel_, masked, bias, torch.randn(batch, channels, size[0] + more, size[1] + more), geometry)


@pytest.mark.parametrize("structure", ["csr", "bsr"])
def test_many_inputs_come_in_chunks(structure: str) -> None:
    weight = torch.randn(40, 500, 1, 1)
    kernels, masked = sparse(structure, {"r": 4, "c": 1} if structure == "bsr" else {}, weight, PLAIN, 0.1, (1, 500, 9, 9))
    assert structure == "bsr" or any("c128" in kernel.name for kernel in kernels)
    for kernel in kernels:
        assert_right(kernel, masked, None, torch.randn(2, 500, 9, 9), PLAIN)


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_dense_depthwise_and_small_convolutions(data: st.DataObject) -> None:
    draw, pair = data.draw, lambda low, high: [data.draw(st.integers(low, high)) for _ in range(2)]
    groups, outputs, taken = draw(st.sampled_from([(4, 4, 1), (3, 6, 1), (1, 10, 3), (2, 16, 2)]))
    kernel, geometry = pair(1, 5), {"stride": pair(1, 3), "padding": pair(0, 2), "dilation": pair(1, 2), "groups": groups}
    size = [max(1, (k - 1) * d + 1 - 2 * p + draw(st.integers(0, 40)))
            for k, d, p in zip(kernel, geometry["dilation"], geometry["padding"], strict=True)]  # type: ignore[call-overload]
    weight, bias, shape = torch.randn(outputs, taken, *kernel), torch.randn(outputs), (2, groups * taken, *size)
    (candidate,) = runtime.candidates("conv2d", {"weight": weight}, {**geometry, **PLANES}, torch.float32, shape, host())
    assert ("depthwise" in candidate.name) == (taken == 1 and groups > 1)
    for x in (torch.randn(shape), torch.randn(1, shape[1], size[0] + 3, size[1] + 17)):
        assert_right(candidate.bind(bias), weight, bias, x, geometry)


@pytest.mark.parametrize("name", ["native", "x86-avx2"])
def test_depthwise_planes_of_many_blocks(name: str) -> None:
    """Wider and higher than a block, one column wider, of as many columns as a register and fewer; groups of columns that are not whole."""
    target = host() if name == "native" or host().arch != "x86_64" else resolve(name)
    for kernel, stride, padding, dilation in (((3, 3), 1, 1, 1), ((5, 3), 2, 2, 1), ((2, 3), 3, 4, 2)):
        geometry = {"stride": [stride] * 2, "padding": [padding] * 2, "dilation": [dilation] * 2, "groups": 3}
        weight, bias = torch.randn(3, 1, *kernel), torch.randn(3)
        (candidate,) = runtime.candidates("conv2d", {"weight": weight}, {**geometry, **PLANES}, torch.float32, (2, 3, 40, 140), target)
        bound = candidate.bind(bias)
        for height, width in ((40, 140), (8, 57), (57, 113), (7, 8), (9, 4), (7, 7), (5, 3), (6, 505)):
            assert_right(bound, weight, bias, torch.randn(2, 3, height * stride, width * stride + height % 2), geometry)


@pytest.mark.parametrize(("name", "residual"), [*((name, False) for name in ACTIVATIONS), ("", True), ("relu", True)])
def test_what_follows_is_computed_before_y_is_written(name: str, residual: bool) -> None:
    numbers, function = ACTIVATIONS.get(name, ({}, lambda y: y))
    epilogue = ({"activation": name, "arguments": numbers} if name else {}) | ({"add": True} if residual else {})
    padded, x = {**PLAIN, "padding": [1, 1]}, 4 * torch.randn(2, 8, 7, 9)
    x[1, 3, 2, 2] = float("nan")
    for weight, geometry in ((torch.randn(8, 8, 1, 1), PLAIN), (torch.randn(8, 8, 3, 3), padded), (torch.randn(8, 1, 3, 3), {**padded, "groups": 8})):
        bias = torch.randn(8)
        kernels, masked = sparse("csr", {}, weight, geometry, 1.0, tuple(x.shape), bias, **epilogue)
        dense = runtime.candidates("conv2d", {"weight": weight}, {**geometry, **epilogue, **PLANES}, torch.float32, tuple(x.shape), host())
        kernels += [c.bind(bias) for c in dense]  # type: ignore[misc]
        assert len(kernels) == 3
        y = conv2d(x, masked, bias, *(geometry[key] for key in ("stride", "padding", "dilation", "groups")))
        other = torch.randn(y.shape)
        want = function(y + other if residual else y)
        for kernel in kernels:
            got = kernel(x, other) if residual else kernel(x)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_only_kept_places_contribute(bad: float) -> None:
    weight = torch.randn(20, 33, 1, 1)
    kernels, masked = sparse("csr", {}, weight, PLAIN, 0.2, (1, 33, 5, 7))
    x = torch.randn(1, 33, 5, 7)
    x[0, 17, 2, 3] = bad
    for kernel in kernels:
        y, reached = kernel(x), masked[:, 17, 0, 0] != 0
        assert torch.equal(~y[0, :, 2, 3].isfinite(), reached)
        y[0, :, 2, 3] = 0
        assert bool(y.isfinite().all())


def test_any_tensor_that_a_convolution_takes() -> None:
    weight = torch.randn(6, 5, 3, 3)
    geometry = {**PLAIN, "padding": [1, 1]}
    (kernel, *_), masked = sparse("csr", {}, weight, geometry, 0.5, (2, 5, 6, 8))
    x = torch.randn(2, 5, 6, 8)
    expected = kernel(x)
    assert_right(kernel, masked, None, x, geometry)
    offset = torch.randn(x.numel() + 3)[3:].view_as(x).copy_(x)
    last = x.contiguous(memory_format=torch.channels_last)
    for view in (last, x.flip(0).flip(0), x.clone().requires_grad_(), offset, torch.randn(2, 5, 6, 16)[..., ::2].copy_(x)):
        assert torch.equal(kernel(view), expected)
    assert kernel(x[:0]).shape == (0, 6, 6, 8)
    assert torch.equal(kernel(x[:1].expand(3, 5, 6, 8))[2], expected[0])


def test_threads_and_slabs_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = torch.randn(64, 64, 3, 3), torch.randn(4, 64, 20, 20)
    geometry = {**PLAIN, "padding": [1, 1]}
    (kernel, *_), _ = sparse("csr", {}, weight, geometry, 0.3, tuple(x.shape))
    assert kernel.options["parallel"]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(kernel(x))
    monkeypatch.setattr(planes, "SLAB", 1000)
    kernel._plans.clear()
    assert all(torch.equal(results[0], other) for other in (*results[1:], kernel(x)))


def test_bad_input_is_refused() -> None:
    geometry = {**PLAIN, "dilation": [2, 2]}
    (kernel, *_), _ = sparse("csr", {}, torch.randn(4, 3, 3, 3), geometry, 0.5, (1, 3, 8, 8))
    for x in (torch.randn(1, 4, 8, 8), torch.randn(3, 8, 8), torch.randn(1, 3, 4, 8), torch.randn(1, 3, 8, 8).double(),
              torch.randn(1, 3, 8, 8, device="meta")):
        with pytest.raises(InputError):
            kernel(x)
    with pytest.raises(InputError):
        kernel(torch.randn(1, 3, 8, 8), torch.randn(1, 4, 4, 4))


def test_what_has_no_kernel_has_no_candidates() -> None:
    weight = torch.randn(4, 4, 1, 1)
    for dtype, epilogue in ((torch.bfloat16, {}), (torch.float64, {}), (torch.float32, {"activation": "tanh", "arguments": {}})):
        made = weight.to(dtype)
        found = runtime.candidates("conv2d", {"weight": made}, {**PLAIN, **epilogue, **PLANES}, dtype, (1, 4, 5, 5), host())
        assert not found
    options = {"family": "planes", "layout": "planes", "r": 5, "vectors": 2, "chunk": 9, "parallel": False}
    with pytest.raises(KernelError):
        runtime.rebind("conv2d", options, {"weight": weight}, PLAIN, None, {}, host())
    with pytest.raises(KernelError, match="does not fit"):
        runtime.rebind("conv2d", {"family": "planes", "layout": "planes"}, {"weight": weight}, PLAIN, None, {}, host())


def test_rebind_gives_the_same_bits() -> None:
    weight, bias, x = torch.randn(8, 6, 3, 3), torch.randn(8), torch.randn(2, 6, 9, 9)
    form = catalog.get("format", "csr").encode(weight.flatten(1), torch.rand(8, 54) < 0.4)
    numbers = {**form.attributes(), **PLAIN, "kernel_size": [3, 3]}
    for candidate in runtime.candidates("conv2d_csr", form.tensors(), numbers, torch.float32, tuple(x.shape), host()):
        kernel = candidate.bind(bias)
        again = runtime.rebind("conv2d_csr", kernel.options, form.tensors(), numbers, bias, kernel.files(), kernel.target)
        assert torch.equal(again(x), kernel(x))
        assert kernel.resident_bytes >= form.values.numel() * 8
        with pytest.raises(KernelError, match="aarch64"):
            runtime.rebind("conv2d_csr", kernel.options, form.tensors(), numbers, bias, kernel.files(), Target("board", "aarch64", "generic", (), 1))
