"""The kernels of attend_blocks against its reference: every shape, what counts and what does not, strides, bad numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_layout import ALL, NONE, SOME, BlockLayout, from_blocks, from_places
from sparsify_compiler.codegen import attend
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.ops import attend_blocks
from sparsify_compiler.target import host


def tensors(batch: int, heads: int, groups: int, queries: int, keys: int, width: int, last: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(queries * 31 + keys)
    q, k, v = ((batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, last or width))
    return torch.randn(q, dtype=torch.float32), torch.randn(k, dtype=torch.float32), torch.randn(v, dtype=torch.float32)


def chosen(batch: int, heads: int, queries: int, keys: int, block_q: int, block_k: int, share: float) -> Tensor:
    return torch.rand(batch, heads, -(-queries // block_q), -(-keys // block_k), dtype=torch.float32) < share


def exact(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, key_mask: Tensor | None = None, scale: float | None = None,
          bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The reference in float64."""
    places = (layout.indices, layout.counts, layout.tile_of, layout.tiles, key_mask, None if bias is None else bias.double())
    options: dict[str, Any] = {"block_q": layout.grid.block_q, "block_k": layout.grid.block_k, "causal": layout.grid.causal, "scale": scale}
    found: tuple[Tensor, Tensor] = attend_blocks.reference(query.double(), key.double(), value.double(), *places, **options)
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number, or over a tenth of what values are where they cancel."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=0.1))


def check(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, key_mask: Tensor | None = None, scale: float | None = None,
          bias: Tensor | None = None) -> None:
    assert attend.refusal(query, key, value) == ""
    out, lse = layout.attend(query, key, value, key_mask, bias, scale)
    expected, total = exact(query, key, value, layout, key_mask, scale, bias)
    assert out.dtype is query.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert distance(out, expected) <= {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[out.dtype]    # shares and results are rounded
    torch.testing.assert_close(lse.double(), total, rtol=2e-6, atol=1e-4 if out.dtype is torch.bfloat16 else 4e-6)
    assert not out[total == -math.inf].any()


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.data())
def test_any_shape_and_choice_of_blocks(data: st.DataObject) -> None:
    draw = data.draw
    groups, repeat, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries = draw(st.one_of(st.integers(1, 8), st.integers(9, 150)))
    keys, width, last = draw(st.integers(1, 150)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    block_q, block_k = draw(st.sampled_from([1, 5, 16, 24, 64, 100])), draw(st.sampled_from([3, 16, 64, 100]))
    query, key, value = tensors(batch, groups * repeat, groups, queries, keys, width, last)
    of_batch, of_heads = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, groups, groups * repeat]))
    table = chosen(of_batch, of_heads, queries, keys, block_q, block_k, draw(st.sampled_from([0.3, 1.0])))
    layout = from_blocks(table, Grid(queries, keys, block_q, block_k, draw(st.booleans())))
    key_mask = torch.rand(batch, keys, dtype=torch.float32) < 0.7 if draw(st.booleans()) else None
    scale = draw(st.sampled_from([None, 0.3, -0.2, 0.0]))
    bias = draw(st.sampled_from([None, biases(batch, groups * repeat, queries, keys)[draw(st.sampled_from(BIASES))]]))
    check(query, key, value, layout, key_mask, scale, bias)
    dtype = draw(st.sampled_from([torch.bfloat16, torch.bfloat16, torch.float16]))
    check(query.to(dtype), key.to(dtype), value.to(dtype), layout, key_mask, scale, None if bias is None else bias.to(torch.bfloat16))


BIASES = ("each place", "heads last", "by distance", "mask")


def biases(batch: int, heads: int, queries: int, keys: int) -> dict[str, Tensor]:
    """As they lie in models: a tensor; a table of distances (T5); slopes times the place of the key (ALiBi); a mask that no key_mask says."""
    made = {"each place": torch.randn(batch, heads, queries, keys, dtype=torch.float32),
            "heads last": torch.randn(queries, keys, heads, dtype=torch.float32).permute(2, 0, 1)[None],
            "by distance": (torch.rand(heads, 1, 1, dtype=torch.float32) * torch.arange(keys) / 40).expand(heads, queries, keys)[None]}
    return {**made, "mask": torch.zeros(1, 1, queries, keys, dtype=torch.float32).masked_fill(torch.rand(queries, keys, dtype=torch.float32) < 0.3,
                                                                                           -math.inf)}


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("of_heads", ["one", "groups", "heads"])
@pytest.mark.parametrize("kind", BIASES)
def test_heads_that_are_widened_by_and_by_keep_what_is_said_of_each(monkeypatch: pytest.MonkeyPatch, repeat: int, of_heads: str, kind: str) -> None:
    """Lists, masks and biases of their own, over more groups than are held at a time, whose number these do not divide."""
    batch, groups, queries, keys = 2, 5, 40, 90
    query, key, value = (tensor.half() for tensor in tensors(batch, groups * repeat, groups, queries, keys, 16, 24))
    lists = {"one": 1, "groups": groups, "heads": groups * repeat}[of_heads]
    key_mask = torch.rand(batch, keys, dtype=torch.float32) < 0.7
    layout = from_blocks(chosen(batch, lists, queries, keys, 16, 16, 0.6), Grid(queries, keys, 16, 16, True))
    bias = biases(batch, groups * repeat, queries, keys)[kind]
    monkeypatch.setattr(attend, "WIDE", 2 * (16 + 24) * (keys + repeat * queries))     # two groups
    check(query, key, value, layout, key_mask, None, bias)
    check(query, key, value, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 40])
def test_a_row_whose_keys_all_have_the_least_number_stays_one_of_numbers(queries: int, dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in tensors(1, 2, 1, queries, 90, 32))
    least = torch.full((1, 1, queries, 90), torch.finfo(torch.float32).min, dtype=torch.float32)
    layout = from_blocks(torch.ones(1, 1, -(-queries // 32), 3, dtype=torch.bool), Grid(queries, 90, 32, 32, True))
    out, lse = layout.attend(query, key, value, None, least)
    assert bool(out.isfinite().all() and lse.isfinite().all())
    assert float(out.float().abs().max()) <= float(value.float().abs().max())
    least[..., 3] = 0     # what is masked with the least number does not count where another key does
    out, _ = layout.attend(query, key, value, None, least)
    torch.testing.assert_close(out, value[:, :, 3:4].expand_as(out))


def window(q: Tensor, k: Tensor) -> Tensor:
    return (q - k < 37) & (k <= q) | (k < 5)


@pytest.mark.parametrize(("queries", "keys", "block"), [(130, 130, 32), (70, 200, 64), (7, 100, 16), (100, 60, 16), (8, 100, 3)])
def test_patterns_that_cut_blocks(queries: int, keys: int, block: int) -> None:
    kinds = torch.full((-(-queries // block), -(-keys // block)), SOME, dtype=torch.int8)
    for causal in (False, True):
        check(*tensors(1, 4, 2, queries, keys, 32), from_places(kinds, window, Grid(queries, keys, block, block, causal)).layout())


@pytest.mark.parametrize("width", [32, 64, 80, 128, 256])
def test_all_blocks_are_dense_attention(width: int) -> None:
    query, key, value = tensors(1, 2, 1, 200, 200, width)
    layout = from_blocks(torch.ones(1, 1, 4, 4, dtype=torch.bool), Grid(200, 200, 64, 64, True))
    out, _ = layout.attend(query, key, value)
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=True, enable_gqa=True)
    assert distance(out, expected) <= 2e-6


@pytest.mark.parametrize("width", [32, 64, 80, 128, 256])
@pytest.mark.parametrize(("queries", "causal"), [(700, False), (700, True), (1, False)])
def test_bfloat16_is_as_good_as_that_of_torch(width: int, queries: int, causal: bool) -> None:
    query, key, value = (tensor.bfloat16() for tensor in tensors(1, 32 if queries == 1 else 4, 4, queries, 700, width))
    key, value = (tensor.repeat_interleave(query.shape[1] // 4, 1) for tensor in (key, value))
    layout = from_blocks(torch.ones(1, 1, -(-queries // 64), 11, dtype=torch.bool), Grid(queries, 700, 64, 64, causal))
    expected = scaled_dot_product_attention(query.double(), key.double(), value.double(), is_causal=causal)
    ours, theirs = ((out.double() - expected).square().mean().sqrt() for out in
                    (layout.attend(query, key, value)[0], scaled_dot_product_attention(query, key, value, is_causal=causal)))
    assert ours <= 1.05 * theirs


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    """Of a prompt of 16384 tokens: all its scores would take 2 GB."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the most that a process held is not told here")
    for text in ("Indexer(always=(SlidingWindow(window=512), Sinks(tokens=64)))",
                 "Indexer(always=(Windows(size=64),), scorer=pooled, selector='top_k(share=0.1)')"):
        most_bytes(Indexer.parse(text), 4096)       # loads what it needs
        assert most_bytes(Indexer.parse(text), 16384) < 160 << 20, text       # a shorter one's says nothing: a larger heap has room for it


def most_bytes(indexer: Indexer, length: int) -> int:
    """What attention to a prompt takes at most, beside its queries, keys and values."""
    query, key, value = tensors(1, 2, 1, length, length, 64)
    Path("/proc/self/clear_refs").write_text("5")      # the most is what it is now
    before = _held("VmRSS")
    layout = indexer.layout(query, key, True, 0.125)
    out, _ = layout.attend(query, key, value)
    assert out.shape == query.shape
    return _held("VmHWM") - before


def _held(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


@pytest.mark.parametrize("queries", [1, 40])
def test_a_plan_is_of_tensors_that_lie_alike(queries: int) -> None:
    """The same shapes with another last dimension cannot be read by what was remembered."""
    query, key, value = tensors(1, 2, 2, queries, 90, 32)
    layout = from_blocks(chosen(1, 2, queries, 90, 16, 16, 0.6), Grid(queries, 90, 16, 16, True))
    check(query, key, value, layout)
    check(*(tensor.mT.contiguous().mT for tensor in (query, key, value)), layout)


def test_strided_tensors_are_read_as_they_lie() -> None:
    held = torch.randn(2, 90, 3, 6, 40, dtype=torch.float32)     # [batch, token, q k v, head, width], as one projection makes them
    query, key, value = (held[:, :, i].transpose(1, 2) for i in range(3))
    layout = from_blocks(torch.ones(1, 1, 2, 2, dtype=torch.bool), Grid(90, 90, 64, 64, True))
    check(query, key[:, :3], value[:, :3], layout)
    check(query.mT.contiguous().mT, key[:, :2, :, :], value[:, :2].expand(2, 2, 90, 40), layout)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [1, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_places_that_count_can_spoil_a_row(bad: float, rows: int, dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in tensors(1, 2, 2, rows, 48, 16))
    key[0, 0, 20], value[0, 1, 21], value[0, 0, 47] = bad, bad, bad
    key_mask = torch.ones(1, 48, dtype=torch.bool)
    key_mask[0, 47] = False
    out, lse = from_blocks(torch.ones(1, 1, -(-rows // 16), 3, dtype=torch.bool), Grid(rows, 48, 16, 16, True)).attend(query, key, value, key_mask)
    spoilt = ~out.isfinite().all(-1)
    seen = torch.arange(48 - rows, 48)
    assert torch.equal(spoilt[0, 1], seen >= 21)
    assert not spoilt[0, 0][seen < 20].any()
    if math.isnan(bad):
        assert torch.equal(spoilt[0, 0], seen >= 20)
        assert torch.equal(lse.isnan()[0, 0], seen >= 20)
    assert not lse[0, 1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 48])
def test_a_query_that_is_no_number_spoils_its_row(dtype: torch.dtype, rows: int) -> None:
    query, key, value = (tensor.to(dtype) for tensor in tensors(1, 2, 1, rows, 40, 32))
    query[0, 1, 1, 3] = math.nan
    out, lse = from_blocks(torch.ones(1, 1, -(-rows // 64), 1, dtype=torch.bool), Grid(rows, 40, 64, 64, False)).attend(query, key, value)
    spoilt = torch.zeros(1, 2, rows, dtype=torch.bool)
    spoilt[0, 1, 1] = True
    assert torch.equal(out.isnan().all(-1), spoilt)
    assert torch.equal(out.isnan().any(-1), spoilt)
    assert torch.equal(lse.isnan(), spoilt)


def test_large_scores_and_empty_rows() -> None:
    query, key, value = tensors(1, 1, 1, 96, 96, 64)
    table = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    table[0, 0, 1] = False
    layout = from_blocks(table, Grid(96, 96, 32, 32, False))
    out, lse = layout.attend(query * 40, key * 40, value)
    expected, total = exact(query * 40, key * 40, value, layout)
    assert distance(out, expected) <= 1e-3      # float32 knows scores of thousands to a thousandth
    torch.testing.assert_close(lse.double(), total, rtol=2e-6, atol=0)


def test_indices_out_of_range_read_nothing() -> None:
    query, key, value = tensors(1, 1, 1, 16, 32, 16)
    layout = from_blocks(torch.ones(1, 1, 1, 2, dtype=torch.bool), Grid(16, 32, 16, 16, False))
    out, _ = layout.attend(query, key, value)
    for wrong in (-3, 1 << 20):
        indices = torch.cat((layout.indices, torch.full((1, 1, 1, 1), wrong, dtype=torch.int32)), -1)
        again, _ = attend_blocks.op(query, key, value, indices, layout.counts + 9, block_q=16, block_k=16)
        assert torch.equal(again, out)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    query, key, value = tensors(1, 4, 2, 130, 130, 64)
    layout = from_blocks(chosen(1, 4, 130, 130, 32, 32, 0.6), Grid(130, 130, 32, 32, True))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(layout.attend(query, key, value))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_few_rows_in_bfloat16_need_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache is read as it lies: changing its dtype at every token would cost more than attention."""
    if not host().has("avx512bf16"):
        pytest.skip("no AVX512_BF16 here")
    layout = from_blocks(chosen(1, 2, 1, 130, 1, 32, 0.6), Grid(1, 130, 1, 32, True))
    query, key, value = (tensor.bfloat16() for tensor in tensors(1, 4, 2, 1, 130, 64))
    monkeypatch.setattr(attend.permission, "tiles", lambda: False)
    attend._missing.cache_clear()
    attend.PLANS.clear()
    try:
        layout.attend(query, key, value)
        assert [(plan.dtype, plan.as_they_lie, plan.plain) for plan in attend.PLANS.values()] == [(torch.bfloat16, True, True)]
        check(query, key, value, layout)
    finally:
        attend._missing.cache_clear()
        attend.PLANS.clear()


def test_calls_without_a_kernel_say_why_and_run_the_reference() -> None:
    query, key, value = tensors(1, 1, 1, 8, 8, 4)
    layout = from_blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), Grid(8, 8, 8, 8, False))
    given: list[tuple[tuple[Tensor, Tensor, Tensor], str]] = [((query.double(), key.double(), value.double()), "float64"),
                                                              ((query, key.bfloat16(), value), "several dtypes"),
                                                              ((query[:, :, :0], key, value), "nothing to compute")]
    for arguments, reason in given:
        assert reason in attend.refusal(*arguments)
    out, _ = layout.attend(query.double(), key.double(), value.double())
    assert distance(out, exact(query, key, value, layout)[0]) < 1e-12


def test_compiled_by_torch_in_one_graph() -> None:
    kinds = torch.tensor([[ALL, NONE], [SOME, ALL]], dtype=torch.int8)
    layout = from_places(kinds, window, Grid(32, 32, 16, 16, True)).layout()

    def block(x: Tensor) -> Tensor:
        q, k, v = x.unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        return layout.attend(q, k, v)[0].transpose(1, 2).flatten(2) + 1

    x = torch.randn(1, 32, 96, dtype=torch.float32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=0)


def test_whoever_watches_sees_the_op() -> None:
    query, key, value = tensors(1, 1, 1, 16, 16, 16)
    layout = from_blocks(torch.ones(1, 1, 1, 1, dtype=torch.bool), Grid(16, 16, 16, 16, True))
    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        watched = layout.attend(query, key, value)
    assert attend_blocks.op in seen
    assert all(torch.equal(one, other) for one, other in zip(watched, layout.attend(query, key, value), strict=True))
    out, _ = layout.attend(query.requires_grad_(), key, value)
    out.sum().backward()
    assert query.grad is not None
