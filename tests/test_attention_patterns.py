"""Static patterns of attention: what they say of blocks is what they say of places, and they are FlexAttention's masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from sparsify_compiler import catalog
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_layout import ALL, NONE
from sparsify_compiler.block_pattern import union
from sparsify_compiler.errors import SparsifyError, StructureError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention.patterns.random_blocks import RandomBlocks
from sparsify_compiler.pipeline_text import parse_value, print_value

PATTERNS = ("SlidingWindow(window=1)", "SlidingWindow(window=9)", "SlidingWindow(window=2, growth=0.3)", "Sinks(tokens=3)",
            "GlobalTokens(tokens=5)", "Dilated(step=3)", "Dilated(step=1)",
            "Dilated(step=2, window=4)", "FixedColumns(stride=6, columns=2)", "RandomBlocks(blocks=2, block=4)",
            "RandomBlocks(blocks=3, block=5, seed=1)", "Butterfly(block=4)", "Butterfly(levels=1, block=3)",
            "Windows(size=7)", "Windows(size=(2, 3), width=6, prefix=1)", "Everything()")


def places(patterns: tuple[Any, ...], grid: Grid) -> Tensor:
    """bool [Q, K], place by place."""
    q, k = torch.arange(grid.queries)[:, None] + grid.offset, torch.arange(grid.keys)[None]
    found = torch.zeros(grid.queries, grid.keys, dtype=torch.bool)
    for pattern in patterns:
        found = found | pattern.allows(q, k, grid)
    return found & (k <= q) if grid.causal else found


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3), st.integers(0, 30), st.integers(0, 30), st.sampled_from([1, 3, 4, 5, 8]),
       st.sampled_from([1, 3, 4, 5, 8]), st.booleans())
def test_blocks_are_what_their_places_are(texts: list[str], queries: int, keys: int, block_q: int, block_k: int, causal: bool) -> None:
    patterns, grid = tuple(map(parse_value, texts)), Grid(queries, keys, block_q, block_k, causal)
    layout = union(patterns, grid).layout()
    assert torch.equal(layout.mask()[0, 0], places(patterns, grid))
    for pattern in patterns:
        for kind, wrong in ((NONE, 1), (ALL, 0)):
            of_kind = (pattern.kinds(grid) == kind).repeat_interleave(block_q, 0).repeat_interleave(block_k, 1)[:queries, :keys]
            open_grid = Grid(queries, keys, block_q, block_k, False)
            seen = places((pattern,), open_grid) if not causal else places((pattern,), grid) | ~places((parse_value("Dilated(step=1)"),), grid)
            below = places((parse_value("Dilated(step=1)"),), grid)
            assert not (of_kind & below & (seen == bool(wrong))).any()


@pytest.mark.parametrize("text", PATTERNS)
def test_decoding_continues_what_the_prompt_began(text: str) -> None:
    patterns = (parse_value(text),)
    whole = union(patterns, Grid(23, 23, 4, 4, True)).layout().mask()[0, 0]
    for queries, keys in ((1, 23), (1, 12), (5, 20)):
        part = union(patterns, Grid(queries, keys, 4, 4, True)).layout().mask()[0, 0]
        assert torch.equal(part, whole[keys - queries:keys, :keys])


def near(q: Any, k: Any, window: Any) -> Any:
    return (q - k < window) & (k - q < window)


MASKS: dict[tuple[str, ...], Callable[[Any, Any], Any]] = {  # patterns -> the mask as one would write it for FlexAttention
    ("SlidingWindow(window=20)", "Sinks(tokens=4)"): lambda q, k: near(q, k, 20) | (k < 4),
    ("SlidingWindow(window=2, growth=0.25)",): lambda q, k: near(q, k, 2 + q // 4),
    ("GlobalTokens(tokens=2)", "Dilated(step=3, window=6)"): lambda q, k: (k < 2) | (q < 2) | near(q, k, 18) & ((q - k) % 3 == 0),
    ("Dilated(step=5)",): lambda q, k: (q - k) % 5 == 0,
    ("FixedColumns(stride=6, columns=2)",): lambda q, k: (q // 6 == k // 6) | (k % 6 >= 4),
    ("Butterfly(block=16)",): lambda q, k: sum((q // 16 ^ k // 16) == bits for bits in (0, 1, 2, 4)) > 0,
    ("Butterfly(levels=1, block=16)",): lambda q, k: (q // 16 ^ k // 16) < 2,
    ("Windows(size=16)",): lambda q, k: q // 16 == k // 16,
    ("Windows(size=8, before=1)",): lambda q, k: (q // 8 == k // 8) | (q // 8 - 1 == k // 8),
    ("Windows(size=(2, 3), width=6, prefix=3)",): lambda q, k: (q < 3) | (k < 3) | (
        ((q - 3) // 12 == (k - 3) // 12) & ((q - 3) % 6 // 3 == (k - 3) % 6 // 3)),
    ("RandomBlocks(blocks=2, block=4)", "SlidingWindow(window=33)", "GlobalTokens(tokens=16)"): lambda q, k: (
        near(q, k, 33) | (k < 16) | (q < 16)),  # and what is drawn
    ("Everything()",): lambda q, k: q == q,
}


@pytest.mark.parametrize("texts", list(MASKS))
@pytest.mark.parametrize("causal", [True, False])
def test_equals_flex_attention(texts: tuple[str, ...], causal: bool) -> None:
    torch.manual_seed(0)
    patterns, length = tuple(map(parse_value, texts)), 75
    grid = Grid(length, length, 16, 16, causal)
    random = places(tuple(pattern for pattern in patterns if isinstance(pattern, RandomBlocks)), grid)
    query, key, value = (torch.randn(2, heads, length, 16, dtype=torch.float32) for heads in (4, 2, 2))

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (MASKS[texts](q, k) | random[q, k]) & ((k <= q) | (not causal))

    flex = flex_attention(query, key, value, block_mask=create_block_mask(mask, None, None, length, length, device="cpu"), enable_gqa=True)
    ours = union(patterns, grid).layout().attend(query, key, value)[0]
    torch.testing.assert_close(ours, flex, rtol=2e-6, atol=2e-6)


def test_heads_of_their_own_patterns_and_padding_equal_flex_attention() -> None:
    """A window for two heads and a stride for the others, of which one text begins late: its positions do, too."""
    torch.manual_seed(0)
    length, begins = 50, torch.tensor([0, 11])
    query, key, value = (torch.randn(2, heads, length, 16, dtype=torch.float32) for heads in (4, 2, 2))
    text = ("Indexer(always=(SlidingWindow(window=9), Sinks(tokens=3)), {0}, choices=(Indexer(always=(FixedColumns(stride=8),), {0}),), "
            "heads=((2, 3),))")
    counts = torch.arange(length) >= begins[:, None]
    ours = attend.by_indexer(Indexer.parse(text.format("block_q=8, block_k=8")), query, key, value, counts[:, None, None], is_causal=True)

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        own_q, own_k = q - begins[b], k - begins[b]
        window = (own_q - own_k < 9) | (own_k < 3)
        columns = (own_q // 8 == own_k // 8) | (own_k % 8 == 7)
        return (own_k >= 0) & (own_k <= own_q) & torch.where(h < 2, window, columns)

    flex = flex_attention(query, key, value, block_mask=create_block_mask(mask, 2, 4, length, length, device="cpu"), enable_gqa=True)
    for entry in range(2):
        torch.testing.assert_close(ours[entry, :, begins[entry]:], flex[entry, :, begins[entry]:], rtol=2e-6, atol=2e-6)
    assert not ours[1, :, :11].any()


def test_every_pattern_is_tested_and_prints_back() -> None:
    known = {catalog.get("attention pattern", name).__name__ for name in catalog.names("attention pattern")}
    assert known == {text.partition("(")[0] for text in PATTERNS} == {text.partition("(")[0] for texts in MASKS for text in texts}
    for text in PATTERNS:
        assert print_value(parse_value(text)) == text


def test_bigbird_draws_as_many_blocks_as_it_says() -> None:
    table = union((parse_value("RandomBlocks(blocks=3, block=4)"),), Grid(64, 64, 4, 4, False)).layout()
    assert table.counts.unique().tolist() == [3]
    other = union((parse_value("RandomBlocks(blocks=3, block=4, seed=7)"),), Grid(64, 64, 4, 4, False)).layout()
    assert not torch.equal(table.indices, other.indices)
    columns = torch.bincount(union((parse_value("RandomBlocks(blocks=8, block=1)"),), Grid(512, 512, 1, 1, False)).layout().indices.flatten().long())
    assert columns.float().std() < 2 * 8**0.5  # as even as chance makes it


@pytest.mark.parametrize("text", [
    "SlidingWindow(window=0)", "SlidingWindow(window=3, growth=-0.5)",
    "Sinks(tokens=-1)", "GlobalTokens(tokens=-1)", "Dilated(step=0)", "Dilated(step=1, window=0)",
    "FixedColumns(stride=2, columns=3)", "RandomBlocks(blocks=-1)", "Butterfly(levels=-1)", "Butterfly(block=0)", "Windows(size=0)",
    "Windows(size=(2, 2))", "Windows(size=4, width=3)"])
def test_options_that_cannot_be(text: str) -> None:
    with pytest.raises(StructureError, match=text.partition("(")[0]):
        parse_value(text)


@pytest.mark.parametrize(("text", "message"), [
    ("Indexer()", "nothing would be read"), ("Indexer(scorer=pooled)", "go together"),
    ("Indexer(always=(Sinks(tokens=1),), block_q=0)", "at least one"),
    ("Indexer(always=(3,))", "no pattern"), ("Indexxer()", "no indexer"), ("Indexer(window=3)", "no option 'window'")])
def test_indexers_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(SparsifyError, match=message):
        Indexer.parse(text)


def test_an_indexer_prints_back() -> None:
    indexer = Indexer.parse("Indexer(always=(SlidingWindow(window=70), Sinks(tokens=5)), block_q=16, dense_below=100)")
    assert Indexer.parse(str(indexer)) == indexer
