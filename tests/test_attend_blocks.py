"""attend_blocks and its layouts: what the op means, in every shape, and that layouts list what their pattern allows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from sparsify_compiler import catalog
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_layout import ALL, NONE, SOME, from_blocks, from_places, merge_branches
from sparsify_compiler.cost_models.symbols import evaluate
from sparsify_compiler.ops import attend_blocks


def tensors(batch: int, heads: int, groups: int, queries: int, keys: int, width: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(queries * 31 + keys)
    shapes = ((batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, width + 1))
    return tuple(torch.randn(shape, dtype=torch.float32).to(dtype) for shape in shapes)


def table(batch: int, heads: int, queries: int, keys: int, block_q: int, block_k: int, share: float = 0.5) -> Tensor:
    torch.manual_seed(batch + heads)
    return torch.rand(batch, heads, -(-queries // block_q), -(-keys // block_k), dtype=torch.float32) < share


def oracle(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Dense attention in float64; mask [B', H', Q, K]."""
    heads = query.shape[1]
    q, k, v = query.double(), *(t.double().repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    mask = mask if mask.shape[1] in (1, heads) else mask.repeat_interleave(heads // mask.shape[1], 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + (0 if bias is None else bias.double())).masked_fill(~mask, -math.inf)
    total = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(q.shape[:3], -math.inf)
    return torch.nan_to_num(torch.softmax(scores, -1)) @ v, total


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_the_op_is_dense_attention_over_the_places_that_count(data: st.DataObject) -> None:
    draw = data.draw
    groups, repeat, batch = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries, keys = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    block_q, block_k = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    heads, causal = groups * repeat, draw(st.booleans())
    query, key, value = tensors(batch, heads, groups, queries, keys)
    of_batch, of_heads = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, groups, heads]))
    layout = from_blocks(table(of_batch, of_heads, queries, keys, block_q, block_k), Grid(queries, keys, block_q, block_k, causal))
    key_mask = torch.rand(batch, keys, dtype=torch.float32) < 0.7 if draw(st.booleans()) else None
    bias = torch.randn(1, heads, queries, keys, dtype=torch.float32) if draw(st.booleans()) else None
    out, lse = layout.attend(query, key, value, key_mask, bias)
    expected = oracle(query, key, value, layout.mask() if key_mask is None else layout.mask() & key_mask[:, None, None], bias)
    torch.testing.assert_close(out.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-5, atol=1e-6)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_all_blocks_are_dense_attention(dtype: torch.dtype, causal: bool) -> None:
    query, key, value = tensors(2, 4, 2, 37, 37, 16, dtype)
    layout = from_blocks(torch.ones(1, 1, 5, 10, dtype=torch.bool), Grid(37, 37, 8, 4, causal))
    out, lse = layout.attend(query, key, value)
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    rough = {"rtol": 1.6e-2, "atol": 8e-3} if dtype is torch.bfloat16 else {}   # the kernel rounds shares to bfloat16, as torch does where it can
    torch.testing.assert_close(out, expected, **rough)
    assert out.dtype is dtype
    assert lse.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert layout.density() == 1


def test_a_row_without_a_key_gives_nothing() -> None:
    query, key, value = tensors(1, 1, 1, 8, 8)
    chosen = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    chosen[0, 0, 1] = False
    out, lse = from_blocks(chosen, Grid(8, 8, 4, 4, False)).attend(query, key, value)
    assert not out[:, :, 4:].any()
    assert bool((lse[:, :, 4:] == -math.inf).all())
    assert bool(out[:, :, :4].isfinite().all())


def test_more_queries_than_keys_leaves_the_first_rows_empty_where_causal() -> None:
    query, key, value = tensors(1, 2, 1, 9, 5)
    out, lse = from_blocks(torch.ones(1, 1, 3, 2, dtype=torch.bool), Grid(9, 5, 4, 3, True)).attend(query, key, value)
    assert not out[:, :, :4].any()
    assert bool(lse[:, :, 4:].isfinite().all())


def test_tiles_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda low, high, size, generator: torch.zeros(size, dtype=torch.int64))
    layout = from_places(torch.full((5, 5), SOME, dtype=torch.int8), window, Grid(20, 20, 4, 4, True)).layout()
    position = torch.arange(20)[:, None]
    assert torch.equal(layout.mask()[0, 0], window(position, torch.arange(20)) & (torch.arange(20) <= position))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by the kernel, and as the reference says
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_only_places_that_count_can_spoil_a_row(bad: float, dtype: torch.dtype) -> None:
    query, key, value = tensors(1, 2, 2, 8, 8, dtype=dtype)
    key[0, 0, 5], value[0, 1, 6] = bad, bad
    chosen = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    chosen[0, 0, 1] = torch.tensor([True, True, False, False])
    out, _ = from_blocks(chosen, Grid(8, 8, 2, 2, True)).attend(query, key, value)
    spoilt = ~out.isfinite().all(-1)
    assert spoilt[0, 1].tolist() == [False] * 6 + [True] * 2
    assert spoilt[0, 0, :5].tolist() == [False] * 5  # an infinite score may still give a finite row
    if math.isnan(bad):
        assert spoilt[0, 0].tolist() == [False] * 5 + [True] * 3


def test_gradients() -> None:
    query, key, value = (t.double().requires_grad_() for t in tensors(2, 4, 2, 5, 7, 3))
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    layout = from_blocks(table(2, 2, 5, 7, 2, 3, 0.7) | torch.eye(3, dtype=torch.bool), Grid(5, 7, 2, 3, True))
    places = torch.isfinite(layout.attend(query, key, value, None, bias)[1])

    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = layout.attend(*given[:3], None, given[3])
        return out, torch.where(places, lse, 0)

    assert torch.autograd.gradcheck(function, (query, key, value, bias), atol=1e-6)


def test_branches_merge_exactly() -> None:
    query, key, value = tensors(1, 2, 1, 12, 12)
    left = table(1, 1, 12, 12, 4, 4)
    both = from_blocks(torch.ones_like(left), Grid(12, 12, 4, 4, True)).attend(query, key, value)
    parts = [from_blocks(half, Grid(12, 12, 4, 4, True)).attend(query, key, value) for half in (left, ~left)]
    merged = merge_branches(parts)
    for one, other in zip(merged, both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    nothing = from_blocks(torch.zeros_like(left), Grid(12, 12, 4, 4, True)).attend(query, key, value)
    assert bool((merge_branches([nothing, nothing])[1] == -math.inf).all())
    assert not merge_branches([nothing, nothing])[0].any()


def window(q: Tensor, k: Tensor) -> Tensor:
    return (q - k < 5) & (k <= q) | (k < 2)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.integers(0, 25), st.integers(0, 25), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_a_pattern_that_cuts_blocks_is_exact(queries: int, keys: int, block_q: int, block_k: int, causal: bool) -> None:
    kinds = torch.full((-(-queries // block_q), -(-keys // block_k)), SOME, dtype=torch.int8)
    layout = from_places(kinds, window, Grid(queries, keys, block_q, block_k, causal)).layout()
    position = torch.arange(queries)[:, None] + keys - queries
    expected = window(position, torch.arange(keys)) & (torch.arange(keys) <= position if causal else torch.tensor(True))
    assert torch.equal(layout.mask()[0, 0], expected)
    assert layout.tiles is None or not layout.tiles.flatten(1).all(1).any()
    listed = torch.arange(layout.indices.shape[-1]) < layout.counts[..., None]
    assert not (layout.indices.diff(dim=-1) <= 0)[listed[..., 1:]].any()


def test_equal_tiles_are_kept_once_and_known_pairs_are_not_asked() -> None:
    kinds = torch.full((16, 16), SOME, dtype=torch.int8)
    assert from_places(kinds, window, Grid(64, 64, 4, 4, True)).layout().tiles.shape[0] <= 5  # type: ignore[union-attr]
    kinds = torch.tensor([[ALL, NONE], [NONE, ALL]], dtype=torch.int8)

    def never(q: Tensor, k: Tensor) -> Tensor:
        raise AssertionError

    layout = from_places(kinds, never, Grid(8, 8, 4, 4, False)).layout()
    assert layout.tiles is None
    assert layout.density() == 0.5


def test_the_registered_op_is_sound() -> None:
    query, key, value = (t.requires_grad_() for t in tensors(1, 2, 1, 6, 6))
    layout = from_places(torch.full((3, 2), SOME, dtype=torch.int8), window, Grid(6, 6, 2, 3, True)).layout()
    arguments = (query, key, value, layout.indices, layout.counts, layout.tile_of, layout.tiles, None, None)
    torch.library.opcheck(attend_blocks.op, arguments, {"block_q": 2, "block_k": 3, "causal": True, "scale": None},
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_shapes_that_do_not_fit_are_named() -> None:
    query, key, value = tensors(1, 2, 1, 6, 6)
    layout = from_blocks(table(1, 1, 6, 6, 2, 3), Grid(6, 6, 2, 3, False))
    given: dict[str, Any] = {"query": query, "key": key, "value": value, "indices": layout.indices, "counts": layout.counts}
    for name, wrong in (("query", query[:, :, :2]), ("key", key[:, :, :, :3]), ("value", value[:, :, :2]), ("counts", layout.counts[:, :, :1]),
                        ("indices", layout.indices[0]), ("key_mask", torch.ones(1, 5, dtype=torch.bool)), ("tile_of", layout.indices),
                        ("bias", torch.zeros(1, 2, 6, 5, dtype=torch.float32)), ("tiles", torch.ones(1, 2, 2, dtype=torch.bool))):
        with pytest.raises(RuntimeError, match=rf"attend_blocks: with blocks of 2 × 3.*{name} "):
            attend_blocks.op(**{**given, name: wrong}, block_q=2, block_k=3)


def test_cost_counts_what_the_reference_does() -> None:
    query, key, value = tensors(2, 4, 2, 12, 16)
    layout = from_blocks(torch.ones(1, 1, 3, 2, dtype=torch.bool), Grid(12, 16, 4, 8, False))
    with FlopCounterMode(display=False) as counter:
        out, lse = attend_blocks.reference(query, key, value, layout.indices, layout.counts, block_q=4, block_k=8)
    moved = sum(t.numel() * t.element_size() for t in (query, key, value, layout.indices, layout.counts, out, lse))
    sizes = {"pairs": 2 * 4 * 6, "block_q": 4, "block_k": 8, "K": 8, "E": 9, "M": lse.numel(), "x_bytes": 4,
             "listed": layout.indices.numel() + layout.counts.numel(), "read": query.numel() + key.numel() + value.numel(), "written": out.numel()}
    cost = catalog.get("cost", "attend_blocks")
    assert evaluate(cost.FLOPS, sizes) == counter.get_total_flops()
    assert evaluate(cost.BYTES, sizes) == moved
