"""What finds the pages of a step of decoding: one kernel says what scorer, selector and patterns say, and keeps what it needs of the keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsify_compiler import catalog, key_sums, page_choice
from sparsify_compiler.cost_models.symbols import evaluate
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.key_sums import KeySums, kept_blocks, of_blocks
from sparsify_compiler.ops import top_pages
from sparsify_compiler.ops.top_pages import KINDS, Heads, Pages

needs_kernel = pytest.mark.skipif(not top_pages.has_kernel(*(torch.zeros(1, 1, 1, 16, dtype=torch.float32),) * 2), reason="no kernels here")
SCALE = 0.25


def whole_numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of which every product and sum is exact, so that equal scores are equal however they are added up."""
    return torch.randint(-3, 4, shape).to(dtype)


def padded(batch: int, keys: int, sides: str) -> Tensor | None:
    """Which keys count: all, those behind some, or any."""
    if sides == "none":
        return None
    if sides == "holes":
        return torch.rand(batch, keys) < 0.6
    first = torch.randint(0, keys, (batch, 1))
    return torch.arange(keys) >= first


@st.composite
def calls(draw: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the op."""
    torch.manual_seed(draw(st.integers(0, 1 << 16)))
    way, dtype = draw(st.sampled_from(list(KINDS))), draw(st.sampled_from([torch.float32, torch.bfloat16]))
    batch, groups, shared, rows = (draw(st.integers(1, most)) for most in (3, 3, 5, 8))
    page, split = draw(st.sampled_from([1, 4, 16, 20])), draw(st.integers(1, 4))
    keys, width = draw(st.integers(1, 700)), 16 * draw(st.sampled_from([1, 2, 3, 8, 16]))
    block, heads = page * split, groups * shared
    query, key = whole_numbers(batch, heads, rows, width, dtype=dtype), whole_numbers(batch, groups, keys, width, dtype=dtype)
    mask = padded(batch, keys, draw(st.sampled_from(["none", "left", "holes"])))
    own = None if draw(st.booleans()) else torch.rand(batch, rows) < 0.7
    blocks, held = -(-keys // block), draw(st.integers(0, keys // page))
    kept = tuple(key_sums._reduced(key[:, :, :held * page], kind, page, None if mask is None else mask[:, :held * page]) for kind in KINDS[way])
    cut = draw(st.booleans())
    kinds = torch.randint(0, 3, (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), blocks)).to(torch.int8)
    kinds = kinds if cut else kinds // 2 * 2
    least = torch.randint(-1, max(blocks // 2, 1) + 2, (heads,), dtype=torch.int32)
    least = torch.where(least == 0, 1, least)
    of_heads = Heads(torch.randint(0, 5, (heads,)) / 4, least, kinds, torch.randint(0, 9, kinds.shape, dtype=torch.int32) if cut else None)
    share = None if draw(st.booleans()) else torch.where(torch.rand(blocks) < 0.1, -math.inf, 0.0)
    return (query, key, kept, mask, own, share, of_heads), {"pages": Pages(way, page), "block": block, "scale": SCALE}


def chosen(found: tuple[Tensor, Tensor, Tensor | None], blocks: int) -> Tensor:
    """bool [B, H, NK]: the blocks of a list."""
    indices, counts, _ = found
    place = torch.arange(indices.shape[-1]) < counts[..., None]
    listed = torch.where(place, indices, blocks)[:, :, 0].long()
    return torch.zeros(*indices.shape[:2], blocks + 1, dtype=torch.bool).scatter_(-1, listed, True)[..., :-1]


def read(found: tuple[Tensor, Tensor, Tensor | None], blocks: int) -> Tensor:
    """int [B, H, NK]: what is read of each block: -2 nothing, -1 all, else the number of a tile."""
    indices, counts, tiles = found
    place = torch.arange(indices.shape[-1]) < counts[..., None]
    listed = torch.where(place, indices, blocks)[:, :, 0].long()
    what = torch.full_like(listed, -1) if tiles is None else tiles[:, :, 0].long()
    return torch.full((*indices.shape[:2], blocks + 1), -2).scatter_(-1, listed, what)[..., :-1]


def check(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The kernel against the reference."""
    wanted, found = top_pages.reference(*arguments, **options), top_pages.computed(*arguments, **options)
    blocks = found[0].shape[-1]
    ours, theirs = read(found, blocks), read(wanted, blocks)
    differ = ours != theirs
    if differ.any():  # logarithms and means round: what has nearly the least score that is taken may change places with what has it
        scores, of_heads = top_pages._scores(*arguments[:2], *arguments[3:6], options["pages"], options["block"], SCALE), arguments[6]
        visible = scores > -math.inf
        first = scores.masked_fill((of_heads.kinds > top_pages.SOME) & visible, math.inf).sort(-1, descending=True).values
        wanted_number = (visible.sum(-1) * of_heads.shares - 1e-6).ceil().maximum(of_heads.least).clamp(1, blocks).long()
        least = first.gather(-1, wanted_number[..., None] - 1)
        assert ((scores - least).abs() <= 1e-5 * least.abs().clamp(min=1))[differ].all()
        assert ((ours == -1) | (theirs == -1))[differ].all()     # chosen by one of the two; by the other left to its pattern
        return
    for one, other in zip(wanted, found, strict=True):
        assert one is other is None or torch.equal(one, other)


@needs_kernel
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_the_kernel_finds_what_the_reference_finds(call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    check(*call)


@needs_kernel
@pytest.mark.parametrize("way", list(KINDS))
@pytest.mark.parametrize("side", ["query", "key"])
@pytest.mark.parametrize("held", [0, 3])
def test_what_is_no_number_is_read_and_padding_is_not_looked_at(way: str, side: str, held: int) -> None:
    torch.manual_seed(0)
    query, key = whole_numbers(1, 2, 1, 32), whole_numbers(1, 1, 16 * 8, 32)
    mask = torch.arange(16 * 8)[None] >= 16
    (query[0, 1, 0] if side == "query" else key[0, 0, 40])[5] = math.nan
    key[0, 0, 3] = math.nan     # padding
    kept = tuple(key_sums._reduced(key[:, :, :held * 16], kind, 16, mask[:, :held * 16]) for kind in KINDS[way])
    heads = Heads(torch.zeros(2), torch.ones(2, dtype=torch.int32), torch.zeros(1, 1, 8, dtype=torch.int8), None)
    found = chosen(top_pages.computed(query, key, kept, mask, None, None, heads, pages=Pages(way, 16), block=16, scale=SCALE), 8)[0]
    wanted = chosen(top_pages.reference(query, key, kept, mask, None, None, heads, pages=Pages(way, 16), block=16, scale=SCALE), 8)[0]
    assert torch.equal(found, wanted)
    if side == "query":
        assert found[1].tolist() == [False] + 7 * [True]
        assert found[0].sum() == 1
    else:
        assert found.sum(1).tolist() == [1, 1]
        assert found[:, 2].all()


PATTERNS = ("Windows(size=16), Sinks(tokens=16)", "SlidingWindow(window=21), Sinks(tokens=3)", "")
SCORERS = ("pooled", "gaussian", "page_bounds(page=4)", "page_bounds(page=16)")


@needs_kernel
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("selector", ["top_k(share=0.3)", "top_k(share=0.0, blocks=4)"])
@settings(max_examples=6, deadline=None)
@given(st.data())
def test_an_indexer_finds_the_same_with_and_without(scorer: str, selector: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    pattern = data.draw(st.sampled_from(PATTERNS))
    always = f"always=({pattern},), " if pattern else ""
    text = f"{always}scorer='{scorer}', selector='{selector}', block_q=16, block_k=16"
    if data.draw(st.booleans()):
        text = f"always=(SlidingWindow(window=21),), block_q=16, block_k=16, choices=(Indexer({text}),), heads=((1, 2),)"
    indexer = Indexer.parse(f"Indexer({text})")
    batch, rows, keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(8, 300))
    query, key = torch.randn(batch, 4, rows, 32), torch.randn(batch, 2, keys, 32)
    mask, causal = padded(batch, keys, data.draw(st.sampled_from(["none", "left"]))), data.draw(st.booleans())
    KeySums().give(key)
    asked: list[int] = []
    kernel = top_pages._kernels().run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_pages._kernels(), "run", lambda *given: asked.append(1) or kernel(*given))
        found = indexer.layout(query, key, causal, SCALE, mask).mask().expand(batch, 4, -1, -1)
        assert asked
        patch.setattr(page_choice, "layout", lambda *given: None)
        wanted = indexer.layout(query, key, causal, SCALE, mask).mask().expand(batch, 4, -1, -1)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("text", ["scorer='pooled(similarity=0.2)', selector='top_k'", "scorer='pooled', selector='top_p'",
                                  "scorer='vertical_slash', selector='top_k'",
                                  "scorer='pooled', selector='top_k', order='by_importance(segment=64)'"])
def test_what_is_not_kept_of_pages_the_files_say_themselves(text: str) -> None:
    indexer = Indexer.parse(f"Indexer(always=(Sinks(tokens=64),), {text})")
    query, key = torch.randn(1, 2, 1, 32), torch.randn(1, 2, 256, 32)
    grid = indexer.layout(query, key, True, SCALE).grid
    assert page_choice.layout(indexer, query, key, None, grid, SCALE) is None


def test_tensors_without_a_kernel_are_refused() -> None:
    refusal = top_pages._kernels().refusal
    one, of = torch.zeros(1, 1, 1, 64), torch.zeros(1, 1, 8, 64)
    assert "fills no vectors" in refusal(one[..., :5], of[..., :5])
    assert "no kernel for" in refusal(one.half(), of.half())
    assert "no kernel for" in refusal(one, of.bfloat16())
    assert refusal(one, of[:, :, :0]) == "nothing to compute"
    assert refusal(one, of.mT.contiguous().mT) == "queries and keys lie apart"


@pytest.mark.parametrize("kind", ["sum", "squares", "min", "max"])
def test_what_is_kept_follows_a_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    room, sums, looked, reduced = torch.randn(2, 3, 400, 16), KeySums(), [], key_sums._reduced
    monkeypatch.setattr(key_sums, "_reduced", lambda key, *rest: looked.append(key.shape[2]) or reduced(key, *rest))
    mask = torch.arange(400) >= torch.tensor([[5], [33]])
    for tokens in (40, 41, 47, 48, 49, 300, 301):
        key, own = sums.give(room[:, :, :tokens]), mask[:, :tokens]
        looked.clear()
        torch.testing.assert_close(of_blocks(key, kind, 8, own), reduced(room[:, :, :tokens], kind, 8, own))
        assert max(looked, default=0) <= (tokens if tokens in (40, 300) else 8)
        assert kept_blocks(key, kind, 8, own).shape[2] == tokens // 8
    other = mask.clone()
    other[1, 3] = True
    for changed in (other, None, mask):
        key = sums.give(room[:, :, :300])
        own = None if changed is None else changed[:, :300]
        torch.testing.assert_close(of_blocks(key, kind, 8, own), reduced(room[:, :, :300], kind, 8, own))
    sums.keep(20)
    room[:, :, 20:] += 1
    torch.testing.assert_close(of_blocks(sums.give(room[:, :, :60]), kind, 8, mask[:, :60]), reduced(room[:, :, :60], kind, 8, mask[:, :60]))


def test_the_registered_op_is_sound() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 40, 32)
    kept = [key[:, :, :32].unflatten(2, (4, 8)).sum(3)]
    numbers = torch.full((4,), 0.3), torch.ones(4, dtype=torch.int32), torch.zeros(1, 1, 5, dtype=torch.int8), torch.zeros(1, 1, 5, dtype=torch.int32)
    torch.library.opcheck(top_pages.op, (query, key, kept, None, None, None, *numbers), {"way": "mean", "page": 8, "block": 8, "scale": SCALE},
                          test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("way", ["mean", "bounds"])
def test_the_cost_is_of_what_is_kept(way: str) -> None:
    batch, groups, heads, pages, width = 2, 3, 6, 7, 32
    kept = [torch.zeros(batch, groups, pages, width) for _ in KINDS[way]]
    lists = [torch.zeros(batch, heads, 1, pages, dtype=torch.int32), torch.zeros(batch, heads, 1, dtype=torch.int32)]
    sizes = {"M": batch * groups * pages * len(kept), "K": width, "group": heads // groups, "x_bytes": 4, "read": batch * heads * width,
             "listed": sum(one.numel() for one in lists)}
    cost = catalog.get("cost", "top_pages")
    assert evaluate(cost.BYTES, sizes) == sum(one.numel() for one in (*kept, *lists)) * 4 + batch * heads * width * 4
    assert evaluate(cost.FLOPS, sizes) == 2 * batch * heads * pages * width * len(kept)
