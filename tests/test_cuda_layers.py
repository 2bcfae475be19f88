"""Layers on a GPU against their references: layout, choice and launch of the kernels are the real ones, the GPU is emulated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_help import ANY, close, emulated, hopper, needs_compiler, numbers
from emulator.emulate import conflicts
from torch import Tensor

from sparsify_compiler.codegen import runtime
from sparsify_compiler.codegen.cuda import device as gpu
from sparsify_compiler.codegen.cuda import experts, ffn, gather, layout, linear
from sparsify_compiler.codegen.cuda.build import source_of
from sparsify_compiler.codegen.cuda.gather_rows import SPLIT
from sparsify_compiler.errors import InputError, KernelError
from sparsify_compiler.formats.bitmap import Bitmap
from sparsify_compiler.formats.bsr import Bsr
from sparsify_compiler.formats.condensed import Condensed
from sparsify_compiler.formats.csr import Csr
from sparsify_compiler.formats.nm import Nm
from sparsify_compiler.ops import experts_ffn, linear_bsr, linear_csr, predicted_ffn, select_ffn, select_linear
from sparsify_compiler.target import resolve

pytestmark = needs_compiler
__all__ = ["emulated", "hopper"]
N, K = 72, 192
MORE = pytest.mark.cuda     # what `make test-cuda` adds


def blocks(r: int, c: int, density: float, outputs: int = N) -> Tensor:
    """A mask [outputs, K] of r x c blocks; the first block row keeps none."""
    kept = torch.rand(-(-outputs // r), K // c) < density
    kept[0] = False
    return kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:outputs]


def two_of_four() -> Tensor:
    return (torch.rand(N, K // 4, 4).argsort(-1) < 2).view(N, K)


def bound(op: str, stored: Any, bias: Tensor | None = None, **epilogue: Any) -> linear.CudaLinear:
    attributes = {**stored.attributes(), **epilogue}
    (_, options), = linear.offer(op, stored.tensors(), attributes, stored.values.dtype, (1,), ANY)
    return linear.bind(op, options, stored.tensors(), attributes, bias, {}, ANY, [])


def by_mask(weight: Tensor, mask: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    product = torch.where(mask, weight, 0).float()
    return torch.nn.functional.linear(x.float(), product, None if bias is None else bias.float())


def without_conflicts(emulated: list[Any]) -> None:
    """Matrices in shared memory are read without waiting for a bank twice: rows of chunks are exchanged as tiles.py says."""
    for schedule in set(emulated):
        reads, again = conflicts(schedule)
        assert again == 0, f"{schedule}: {again} of {reads}"


@pytest.mark.parametrize(("r", "c", "rows", "dtype"), [(16, 1, 70, torch.bfloat16), (32, 8, 3, torch.bfloat16), (32, 1, 70, torch.float32),
                                                     pytest.param(64, 4, 40, torch.float16, marks=MORE), (16, 4, 1, torch.float32)])
def test_blocks(emulated: list[Any], r: int, c: int, rows: int, dtype: torch.dtype) -> None:
    mask, weight, x, bias = blocks(r, c, 0.4), numbers(N, K, dtype=dtype, scale=0.1), numbers(rows, K, dtype=dtype), numbers(N, dtype=dtype)
    layer = bound("linear_bsr", Bsr.encode(weight * mask, mask, r=r, c=c), bias)
    close(layer(x), by_mask(weight, mask, x, bias))
    without_conflicts(emulated)
    many = {"cuda_strips_wide"} if dtype is torch.float32 else {"cuda_turn", "cuda_strips"}
    assert {one.name for one in emulated} == ({"cuda_strip_rows"} if rows < 5 else many)


@pytest.mark.parametrize(("rows", "dtype"), [
    (2, torch.bfloat16), (37, torch.float16), pytest.param(66, torch.bfloat16, marks=MORE)])
def test_two_of_four(emulated: list[Any], rows: int, dtype: torch.dtype) -> None:
    mask, weight, x = two_of_four(), numbers(N, K, dtype=dtype, scale=0.1), numbers(rows, K, dtype=dtype)
    layer = bound("linear_nm", Nm.encode(weight * mask, mask, n=2, m=4))
    close(layer(x), by_mask(weight, mask, x))
    without_conflicts(emulated)
    assert {one.name for one in emulated} == {"cuda_sparse24_rows" if rows < 5 else "cuda_sparse24"}


@pytest.mark.parametrize(("kind", "dtype", "rows"), [(Csr, torch.bfloat16, 1), (Bitmap, torch.float32, 6), (Condensed, torch.float16, 2)])
def test_any_structure_for_few_rows(emulated: list[Any], kind: Any, dtype: torch.dtype, rows: int) -> None:
    mask = torch.rand(N, K) < 0.3
    mask[4] = False
    if kind is Condensed:
        mask = torch.rand(N, K).argsort(-1) < 30
    weight, x, bias = numbers(N, K, dtype=dtype, scale=0.1), numbers(rows, K, dtype=dtype), numbers(N, dtype=dtype)
    close(bound(f"linear_{kind.name()}", kind.encode(weight * mask, mask), bias)(x), by_mask(weight, mask, x, bias))


@pytest.mark.parametrize("rows", [2, 40])
def test_what_is_added_and_activated(emulated: list[Any], rows: int) -> None:
    mask, weight = blocks(16, 1, 0.4), numbers(N, K, dtype=torch.bfloat16, scale=0.1)
    x, other = (numbers(rows, n, dtype=torch.bfloat16) for n in (K, N))
    layer = bound("linear_bsr", Bsr.encode(weight * mask, mask, r=16, c=1), add=True, activation="gelu", arguments={})
    close(layer(x, other), torch.nn.functional.gelu(by_mask(weight, mask, x) + other.float()))
    with pytest.raises(InputError, match="to add"):
        layer(x)


def test_a_nan_reaches_the_outputs_that_read_it_only(emulated: list[Any]) -> None:
    cases = ((blocks(16, 1, 0.3), linear_bsr, lambda w, m: Bsr.encode(w, m, r=16, c=1)), (torch.rand(N, K) < 0.3, linear_csr, Csr.encode))
    for mask, op, make in cases:
        weight, x = numbers(N, K, dtype=torch.bfloat16, scale=0.1), numbers(5, K, dtype=torch.bfloat16)
        x[2, 7], x[3, 8] = torch.nan, torch.inf
        stored = make(weight * mask, mask)
        found = bound(op.op._schema.name.partition("::")[2], stored)(x)
        wanted = op.reference(x, *stored.tensors().values(), None, **stored.attributes())
        assert torch.equal(found.isnan(), wanted.isnan())
        assert found.isnan().any(0).sum() < N


def test_places_of_mma_sp_are_those_of_the_instruction() -> None:
    """Row 9 of a tile is the high half of the words of group 1; input 17 belongs to the second of a pair of lanes."""
    offsets = torch.tensor([0, 1], dtype=torch.uint8).repeat(16, 8)
    offsets[9, 8:10] = torch.tensor([1, 3], dtype=torch.uint8)
    words = layout.places_of(offsets).view(16)
    plain = 0x44444444
    assert words.tolist() == [plain if i != 3 else plain - (0x4 << 16) + (0xD << 16) for i in range(16)]


@pytest.mark.parametrize(("dtype", "rows", "scaled", "stored"), [
    (torch.bfloat16, 1, False, True), (torch.float32, 3, True, False), (torch.float16, 9, True, True)])
def test_gather(emulated: list[Any], dtype: torch.dtype, rows: int, scaled: bool, stored: bool) -> None:
    inputs, outputs = 1100, 264
    x, weight, bias = numbers(rows, inputs, dtype=dtype), numbers(inputs, outputs, dtype=dtype, scale=0.03), numbers(outputs, dtype=dtype)
    limit = torch.tensor(0.7, dtype=torch.float32) if stored else torch.rand(rows, 1, dtype=torch.float32)
    tensors = {"weight": weight, **({"limit": limit} if stored else {})}
    if scaled:
        tensors |= {"scale": torch.rand(inputs, dtype=torch.float32) + 0.5, "center": numbers(inputs, dtype=torch.float32, scale=0.1)}
    (_, options), = gather.offer("select_linear", tensors, {}, dtype, (1,), ANY)
    layer = gather.bind("select_linear", options, tensors, {}, bias, {}, ANY, [])
    found = layer(x) if stored else layer(x, limit)
    wide = [None if t is None else t.float() for t in (tensors.get("scale"), tensors.get("center"), bias)]
    close(found, select_linear.reference(x.float(), limit, weight.float(), *wide))
    assert len(emulated) == (rows < 5)


@pytest.mark.parametrize(("dtype", "rows", "outputs"), [(torch.bfloat16, 1, 264), (torch.float32, 3, 264), (torch.float16, 2, 2056)])
def test_gather_by_clusters(hopper: list[Any], dtype: torch.dtype, rows: int, outputs: int) -> None:
    """Blocks share the inputs of a tile of columns; the last tile is not whole, nor are the inputs of a step."""
    inputs = 4100
    x, weight, bias = numbers(rows, inputs, dtype=dtype), numbers(inputs, outputs, dtype=dtype, scale=0.03), numbers(outputs, dtype=dtype)
    tensors = {"weight": weight, "limit": torch.tensor(1.2, dtype=torch.float32)}
    layer = gather.bind("select_linear", {"dtype": str(dtype)[6:]}, tensors, {}, bias, {}, ANY, [])
    close(layer(x), select_linear.reference(x.float(), tensors["limit"], weight.float(), None, None, bias.float()))
    assert {one.cluster for one in hopper} == {8}


def test_kernels_of_few_rows_fit_every_gpu(hopper: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each column has threads that finish it, each block whole lanes to push; shared memory suffices."""
    for processors, name, memory in ((132, "sm_90", 227 << 10), (108, "sm_80", 99 << 10)):
        monkeypatch.setattr(gpu, "processors", lambda _, count=processors: count)
        monkeypatch.setattr(gpu, "target_of", lambda _, name=name: resolve(name))
        for dtype in (torch.bfloat16, torch.float32):
            found = {gather.schedule_of(dtype, rows, outputs, torch.device("cpu"))
                     for outputs in (8, 1024, 4096, 11008, 28672, 151936) for rows in (1, 2, 4)}
            for how in found:
                finished = how.columns // how.cluster
                assert finished % 4 == 0 < finished * SPLIT <= how.warps * 32
            assert max(source_of(how).block["shared"] for how in found if how.rows == 4) <= memory


def test_gather_selects_a_nan_and_nothing_at_all(emulated: list[Any]) -> None:
    x, weight = numbers(1, 256, dtype=torch.bfloat16), numbers(256, 256, dtype=torch.bfloat16)
    tensors = {"weight": weight, "limit": torch.tensor(1e9, dtype=torch.float32)}
    layer = gather.bind("select_linear", {"dtype": "bfloat16"}, tensors, {}, None, {}, ANY, [])
    assert not layer(x).any()
    x[0, 3] = torch.nan
    assert layer(x).isnan().all()
    assert layer(x[:0]).shape == (0, 256)
    with pytest.raises(InputError, match="expected"):
        layer(x.float())


def test_gather_of_an_infinity_gives_no_nan(emulated: list[Any]) -> None:
    """Where lists are filled up to what a warp reads at once, the last input that is listed is not counted again, as infinity times zero."""
    x, weight = torch.zeros(1, 72, dtype=torch.float32), numbers(72, 40, dtype=torch.float32)
    x[0, :5] = torch.tensor([1.0, 2.0, 3.0, 4.0, torch.inf], dtype=torch.float32)
    tensors = {"weight": weight, "limit": torch.tensor(0.5, dtype=torch.float32)}
    (_, options), = gather.offer("select_linear", tensors, {}, torch.float32, (1,), ANY)
    found = gather.bind("select_linear", options, tensors, {}, None, {}, ANY, [])(x)
    assert torch.equal(found, torch.where(weight[4] > 0, torch.inf, -torch.inf)[None])


@pytest.mark.parametrize(("activation", "biased", "rows"), [("silu", True, 1), pytest.param("drelu", False, 1, marks=MORE), ("relu", True, 3)])
def test_selected_neurons(emulated: list[Any], activation: str, biased: bool, rows: int) -> None:
    inputs, hidden, outputs = 136, 90, 264
    x, gate, up = numbers(rows, inputs, dtype=torch.bfloat16), *(numbers(hidden, inputs, dtype=torch.bfloat16, scale=0.1) for _ in range(2))
    down, limit = numbers(hidden, outputs, dtype=torch.bfloat16, scale=0.1), torch.tensor(0.1, dtype=torch.float32)
    tensors = {"gate": gate, "up": up, "down": down, "limit": limit}
    if biased:
        tensors |= {"gate_bias": numbers(hidden, dtype=torch.bfloat16), "scale": torch.rand(hidden, dtype=torch.float32)}
    (_, options), = ffn.offer("select_ffn", tensors, {"activation": activation}, torch.bfloat16, (1,), ANY)
    layer = ffn.bind("select_ffn", options, tensors, {"activation": activation}, None, {}, ANY, [])
    wanted = select_ffn.reference(x.float(), limit, gate.float(), up.float(), down.float(), tensors.get("scale"),
                                  tensors["gate_bias"].float() if biased else None, activation=activation)
    close(layer(x), wanted)
    assert len(emulated) == (2 if rows == 1 else 0)


@pytest.mark.parametrize("gated", [pytest.param(True, marks=MORE), False])
def test_predicted_neurons(emulated: list[Any], gated: bool) -> None:
    inputs, hidden, outputs = 64, 40, 32
    x, gate, up = numbers(1, inputs, dtype=torch.float16), *(numbers(hidden, inputs, dtype=torch.float16, scale=0.1) for _ in range(2))
    down, scores, limit = numbers(hidden, outputs, dtype=torch.float16, scale=0.1), numbers(1, hidden), torch.tensor([[0.2]], dtype=torch.float32)
    gate[scores[0] < 0.2] = torch.nan    # never met
    tensors = {"gate": gate, "down": down, **({"up": up} if gated else {})}
    layer = ffn.bind("predicted_ffn", {"dtype": "float16"}, tensors, {"activation": "gelu_tanh"}, None, {}, ANY, [])
    kept = torch.nan_to_num(gate)
    close(layer(x, scores, limit), predicted_ffn.reference(x.float(), scores, limit, kept.float(), down.float(), up.float() if gated else None,
                                                            activation="gelu_tanh"))


@pytest.mark.parametrize(("rows", "gated", "biased", "dtype"), [
    (1, True, True, torch.float32), (1, False, False, torch.bfloat16), (30, True, True, torch.float16),
    pytest.param(170, False, False, torch.bfloat16, marks=MORE)])
def test_experts(emulated: list[Any], rows: int, gated: bool, biased: bool, dtype: torch.dtype) -> None:
    count, inputs, hidden, outputs, each = 3, 40, 72, 136, 2
    x, gate, up = numbers(rows, inputs, dtype=dtype), *(numbers(count, hidden, inputs, dtype=dtype, scale=0.2) for _ in range(2))
    down, weights = numbers(count, outputs, hidden, dtype=dtype, scale=0.1), torch.rand(rows, each, dtype=torch.float32)
    chosen = torch.randint(-1, count - 1, (rows, each))     # none, and one that nobody chooses
    tensors = {"gate": gate, "down": down, **({"up": up} if gated else {})}
    if biased:
        tensors |= {"gate_bias": numbers(count, hidden, dtype=dtype), "bias": numbers(count, outputs, dtype=dtype)}
    (_, options), = experts.offer("experts_ffn", tensors, {"activation": "silu"}, dtype, (rows,), ANY)
    layer = experts.bind("experts_ffn", options, tensors, {"activation": "silu"}, None, {}, ANY, [])
    wide = {name: tensor.float() for name, tensor in tensors.items()}
    wanted = experts_ffn.reference(x.float(), chosen, weights, wide["gate"], wide.get("up"), wide["down"], wide.get("gate_bias"), None,
                                   wide.get("bias"), activation="silu")
    close(layer(x, chosen, weights), wanted)
    without_conflicts(emulated)
    with pytest.raises(InputError, match="chosen is int32"):
        layer(x, chosen[..., :1], weights)


def test_offers_and_refusals() -> None:
    weight, mask = numbers(N, K, dtype=torch.bfloat16), blocks(16, 1, 0.5)
    stored = Bsr.encode(weight * mask, mask, r=16, c=1)
    offer = linear.offer
    assert [options["kind"] for _, options in offer("linear_bsr", stored.tensors(), stored.attributes(), torch.bfloat16, (128,), ANY)] == ["strips"]
    assert not offer("linear_bsr", stored.tensors(), stored.attributes(), torch.float32, (128,), ANY)       # x of another dtype
    assert not offer("linear_bsr", stored.tensors(), {**stored.attributes(), "activation": "tanh"}, torch.bfloat16, (1,), ANY)
    csr = Csr.encode(weight * mask, mask)
    assert not offer("linear_csr", csr.tensors(), csr.attributes(), torch.bfloat16, (128,), ANY)            # many rows of no structure
    assert not gather.offer("select_linear", {"weight": weight[:, :9]}, {}, torch.bfloat16, (1,), ANY)      # rows that do not begin at 16 bytes
    wide = {"n": 1, "m": 4, "out_features": 8, "in_features": 1 << 16}                                      # a row that shared memory cannot hold
    assert not offer("linear_nm", {"values": weight}, wide, torch.bfloat16, (1,), ANY)
    assert offer("linear_nm", {"values": weight}, {**wide, "in_features": 3 << 14}, torch.bfloat16, (1,), ANY)
    assert offer("linear_nm", {"values": weight}, {**wide, "n": 2}, torch.bfloat16, (128,), ANY)            # which need not lie there for 2:4
    with pytest.raises(KernelError, match="does not fit"):
        linear.bind("linear_csr", {"dtype": "bfloat16", "kind": "strips"}, csr.tensors(), csr.attributes(), None, {}, ANY, [])
    with pytest.raises(KernelError, match="no family of kernels called 'cuda_nothing'"):
        runtime.rebind("linear_csr", {"family": "cuda_nothing"}, csr.tensors(), csr.attributes(), None, {}, ANY)
