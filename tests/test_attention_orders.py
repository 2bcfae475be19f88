"""Orders of tokens: whatever the order, what is read is exactly what dense attention would give at those places, masks and gradients included."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from sparsify_compiler import catalog, recipes
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.block_layout import ALL, BlockLayout, BlockTable
from sparsify_compiler.block_order import Order
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.named import Named
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention.patterns.sinks import Sinks
from sparsify_compiler.passes.attention.patterns.sliding_window import SlidingWindow
from sparsify_compiler.passes.attention.select_blocks import Attention
from sparsify_compiler.passes_api import Context

SCALE = 0.7


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def drawn(batch: int, queries: int, keys: int, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """query [B, 4, Q, 5], key and value [B, 2, K, 5], and padding on the left, or none."""
    mask = torch.arange(keys).expand(batch, keys) >= torch.arange(batch)[:, None] * 3 if masked else None
    return random(batch, 4, queries, 5), random(batch, 2, keys, 5, seed=1), random(batch, 2, keys, 5, seed=2), mask


def permutation(batch: int, heads: int, length: int, last: Tensor | None, seed: int) -> Tensor:
    """Random orders; the keys that do not count, where there are any, at the end."""
    rank = torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(seed))
    return (rank if last is None else rank + 2 * last[:batch, None]).argsort(-1)


@settings(max_examples=30, derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(st.integers(1, 2), st.integers(1, 13), st.integers(1, 15), st.sampled_from([1, 4]), st.sampled_from([3, 4]), st.booleans(), st.booleans(),
       st.sampled_from([(1, 1), (4, 2), (1, 2), (4, 1), (0, 2), (4, 0)]), st.integers(0, 9))
def test_chosen_blocks_of_any_order_are_attention_at_their_places(batch: int, queries: int, keys: int, block_q: int, block_k: int, causal: bool,
                                                                  masked: bool, heads: tuple[int, int], seed: int) -> None:
    query, key, value, mask = drawn(batch, queries, keys, masked)
    hidden = None if mask is None else ~mask
    order = Order(permutation(batch, heads[0], queries, None, seed) if heads[0] else None,
                  permutation(batch, heads[1], keys, hidden, seed + 1) if heads[1] else None)
    grid = Grid(queries, keys, block_q, block_k, causal)
    kinds = torch.where(torch.rand(batch, 4, grid.rows, grid.columns, generator=torch.Generator().manual_seed(seed)) < 0.6, ALL, 0).to(torch.int8)
    table = order.cut(BlockTable(kinds, None, None, grid), mask)
    layout = table.layout()
    layout = BlockLayout(layout.indices, layout.counts, layout.tile_of, layout.tiles, grid, order)
    places = torch.zeros(batch, 4, queries, keys, dtype=torch.bool)  # one by one: where the token at each place of the order stood
    for b in range(batch):
        for h in range(4):
            for r in range(queries):
                for c in range(keys):
                    row = r if order.queries is None else int(order.queries[b, h % order.queries.shape[1], r])
                    column = c if order.keys is None else int(order.keys[b, h // 2 % order.keys.shape[1], c])
                    counts = (not causal or column <= row + keys - queries) and (mask is None or bool(mask[b, column]))
                    places[b, h, row, column] = counts and bool(kinds[b, h, r // block_q, c // block_k])
    assert torch.equal(layout.mask().expand(batch, 4, queries, keys), places)
    bias = random(batch, 1, queries, keys, seed=5) if seed % 2 else None
    added = torch.zeros(batch, 4, queries, keys, dtype=torch.float32).masked_fill(~places, -math.inf) + (0 if bias is None else bias)
    found, lse = layout.attend(query, key, value, mask, bias, SCALE)
    blind = ~places.any(-1)
    expected = scaled_dot_product_attention(query, key, value, added, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(found, expected.masked_fill(blind[..., None], 0), rtol=1e-4, atol=1e-5)
    assert torch.equal(lse == -math.inf, blind)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(24, 24, True), (5, 21, True), (16, 16, False)])
def test_a_pattern_that_cuts_blocks_does_so_at_the_places_of_the_order(queries: int, keys: int, causal: bool, masked: bool) -> None:
    query, key, _, mask = drawn(2, queries, keys, masked)
    text = "by_importance(segment=8, last=4)"
    grid = Grid(queries, keys, 4, 4, causal)
    layout = Indexer((SlidingWindow(6), Sinks(2)), block_q=4, block_k=4, order=text).layout(query, key, causal, SCALE, mask)
    stood = Named.parse("token order", text)(query, key, mask, grid, SCALE).keys
    near = torch.arange(keys) - torch.arange(keys - queries, keys)[:, None]
    pattern = ((near.abs() < 6) | (torch.arange(keys) < 2)).expand(2, 2, queries, keys)  # of places
    places = torch.zeros_like(pattern).scatter(-1, stood[:, :, None].expand_as(pattern), pattern)  # of where they stood
    if causal:
        places = places & (near <= 0)
    places = places if mask is None else places & mask[:, None, None]
    assert torch.equal(layout.mask().expand_as(places), places)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(32, 32), (8, 32), (1, 29), (37, 37), (5, 5), (0, 16), (16, 0)])
def test_keys_by_importance_keep_causality_and_padding(queries: int, keys: int, masked: bool) -> None:
    """All blocks read is dense attention; what is read of some blocks is dense attention at those places."""
    query, key, value, mask = drawn(2, queries, keys, masked)
    text = ("Indexer(always=(Windows(size=8),), scorer=pooled, selector='top_k(share={})', block_q=4, block_k=4, "
            "order='by_importance(segment=8, last=4)')")
    for share in (1.0, 0.5):
        layout = Indexer.parse(text.format(share)).layout(query, key, True, SCALE, mask)
        found, _ = layout.attend(query, key, value, mask, None, SCALE)
        below = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
        seen = below if mask is None else below & mask[:, None, None]
        read = layout.mask().expand(2, -1, queries, keys)
        read = read.repeat_interleave(4 // read.shape[1], 1)
        assert not bool((read & ~seen).any())
        assert share < 1 or bool((read == seen).all())
        expected = scaled_dot_product_attention(query, key, value, read, scale=SCALE, enable_gqa=True)
        torch.testing.assert_close(found, expected.masked_fill(~read.any(-1, keepdim=True), 0), rtol=1e-4, atol=1e-5)


def test_keys_are_sorted_by_what_the_last_queries_give_them() -> None:
    """By hand, beside the authors' code (xinghaow99/pbs-attn, 512 tokens, segments of 256): the same order where nothing is masked (theirs masks
    nothing when it sorts), the same scores within 6e-8 and the same blocks at a mass of 0.9."""
    query, key, _, _ = drawn(1, 22, 22, False)
    order = Named.parse("token order", "by_importance(segment=8, last=4)")(query, key, None, Grid(22, 22, 4, 4, True), SCALE).keys
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * SCALE
    shares = torch.softmax(scores.masked_fill(torch.ones(22, 22, dtype=torch.bool).triu(1), -math.inf), -1)[:, :, -4:].mean(2)
    shares = shares.view(1, 2, 2, 22).mean(2)
    for g in range(2):
        for start in (0, 8):
            assert order[0, g, start:start + 8].tolist() == sorted(range(start, start + 8), key=lambda k: -float(shares[0, g, k]))
        assert order[0, g, 16:].tolist() == list(range(16, 22))


@pytest.mark.parametrize(("shape", "size"), [((4, 6), (2, 3)), ((2, 4, 4), (2, 2, 2)), ((2, 4, 4), (1, 4, 4)), ((8,), (4,))])
def test_cuboids_hold_the_tokens_of_a_window(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    tokens, block = math.prod(shape) + 2, math.prod(size)
    grid = Grid(tokens, tokens, block, block, False)
    order = Named.parse("token order", f"cuboids(shape={shape}, size={size})")(random(1, 1, tokens, 2), random(1, 1, tokens, 2), None, grid, SCALE)
    assert torch.equal(order.queries, order.keys)
    assert sorted(order.keys.flatten().tolist()) == list(range(tokens))
    assert order.keys[0, 0, -2:].tolist() == [0, 1]  # what stood before the image
    for block_of in order.keys[0, 0, :-2].view(-1, block) - 2:
        windows = {tuple(int(c) // w for c, w in zip(torch.unravel_index(place, shape), size, strict=True)) for place in block_of}
        assert len(windows) == 1


def routed(query: Tensor, key: Tensor, value: Tensor, size: int, regions: int, width: int) -> Tensor:
    """Bi-level routing attention as the paper writes it: regions, their means, the best for each, and attention to the tokens of those."""
    def by_region(x: Tensor) -> Tensor:
        high = x.shape[0] // width
        return x.view(high // size, size, width // size, size, -1).transpose(1, 2).reshape(-1, size * size, x.shape[1])

    q, k, v = (by_region(x) for x in (query, key, value))
    best = (q.mean(1) @ k.mean(1).T).topk(regions, -1).indices
    out = torch.stack([torch.softmax(q[r] @ k[best[r]].flatten(0, 1).T * SCALE, -1) @ v[best[r]].flatten(0, 1) for r in range(len(q))])
    places = by_region(torch.arange(len(query), dtype=torch.float32)[:, None]).flatten().long()
    found = torch.empty_like(value)
    found[places] = out.flatten(0, 1)
    return found


def test_biformer_is_bi_level_routing_attention() -> None:
    query, key, value = (random(2, 3, 48, 5, seed=seed) for seed in range(3))
    select, = recipes.biformer(shape=(8, 6), size=(2, 2), regions=3).passes
    indexer = select._indexers()[0]
    found = attend.by_indexer(indexer, query, key, value, scale=SCALE)
    for b in range(2):
        for h in range(3):
            torch.testing.assert_close(found[b, h], routed(query[b, h], key[b, h], value[b, h], 2, 3, 6), rtol=1e-4, atol=1e-5)


class Layers(nn.Module):
    """Four attentions, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            q, k, v = layer.qkv(x).view(*x.shape[:-1], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
            x = x + layer.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


def test_layers_take_orders_in_turn_and_all_blocks_are_dense_attention() -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 32, 16)
    sizes = ((1, 4, 2), (4, 1, 2), (2, 2, 2))
    for mass in (1.0, 0.3):
        program = recipes.vmoba(shape=(4, 4, 2), sizes=sizes, mass=mass).run(capture(model, (x,)), Context())
        texts = [str(node.kwargs["indexer"]) for _, node in program.nodes() if node.target is attend.op]
        assert [str(size) in text for text, size in zip(texts, (*sizes, sizes[0]), strict=True)] == [True] * 4
        near = torch.allclose(CompiledModel(program)(x), model(x), atol=1e-5)
        assert near == (mass == 1.0)


@pytest.mark.parametrize("text", ["by_importance(segment=4, last=3)", "cuboids(shape=(2, 6), size=(2, 2))"])
def test_gradients_flow_through_an_order(text: str) -> None:
    indexer = f"Indexer(always=(Windows(size=4),), scorer=pooled, selector='top_k(share=0.5)', block_q=4, block_k=4, order='{text}')"
    given = [random(1, heads, 12, 2, seed=heads).double().requires_grad_() for heads in (2, 1, 1)]

    def function(*tensors: Tensor) -> Tensor:
        out: Tensor = attend.op(*tensors, is_causal="importance" in text, indexer=indexer)
        return out

    assert torch.autograd.gradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(22, 22), (1, 22), (6, 21)])
def test_clusters_lie_together_and_what_they_share_is_counted(queries: int, keys: int, masked: bool) -> None:
    query, key, _, mask = drawn(2, queries, keys, masked)
    centroids = torch.nn.functional.normalize(random(2, 3, 5, seed=9), dim=-1)
    grid = Grid(queries, keys, 4, 4, True)

    def cluster(row: Tensor, group: int) -> int:
        return max(range(3), key=lambda c: float(row @ centroids[group, c]))

    order = Named.parse("token order", "by_cluster(number=3)")(query, key, mask, grid, SCALE, centroids)
    scores = Named.parse("block scorer", "shared_clusters(number=3)")(query, key, mask, grid, SCALE, centroids)
    for b, h in ((0, 0), (1, 2), (1, 3)):
        own = [cluster(row, h // 2) for row in query[b, h]]
        of_keys = [cluster(row, h // 2) if mask is None or mask[b, k] else 3 for k, row in enumerate(key[b, h // 2])]
        assert order.queries[b, h].tolist() == sorted(range(queries), key=own.__getitem__)
        assert order.keys[b, h // 2].tolist() == sorted(range(keys), key=of_keys.__getitem__)
        for i, j in ((0, 0), (-(-queries // 4) - 1, 4), (0, 2)):
            pairs = sum(q == k for q in own[4 * i:4 * i + 4] for k in of_keys[4 * j:4 * j + 4])
            assert float(scores[b, h, i, j].exp()) == pytest.approx(pairs)


def test_routing_finds_the_clusters_that_there_are() -> None:
    """Tokens in four directions: with as many centroids, each query reads the keys of its own direction, and attention to these is what comes out."""
    torch.manual_seed(3)
    directions, which = torch.eye(4, 8, dtype=torch.float32) * 3, torch.randint(0, 4, (1, 2, 64))
    rows = directions[which] + 0.05 * torch.randn(1, 2, 64, 8)
    value = torch.randn(1, 2, 64, 8)
    program = recipes.routing_transformer(clusters=4, blocks=16, block=4).run(capture(Plain().eval(), (rows, rows, value)),
                                                                             Context(batches=[(rows, rows, value)] * 8))
    node = next(node for _, node in program.nodes() if node.target is attend.op)
    assert len(node.kwargs["learned"]) == 1  # what the order and the scorer share
    layout = Indexer.parse(str(node.kwargs["indexer"])).layout(rows, rows, False, 1.0, None, {
        "centroids": program.regions[""].module.get_buffer(str(node.kwargs["learned"][0].target))})
    same = which[..., None] == which[..., None, :]
    assert bool((layout.mask() | ~same).all())
    assert layout.density() < 0.5
    torch.testing.assert_close(CompiledModel(program)(rows, rows, value), scaled_dot_product_attention(rows, rows, value), rtol=0.1, atol=0.1)


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


def test_orders_that_cannot_be() -> None:
    query, key = random(1, 1, 12, 2), random(1, 1, 12, 2)
    for text in ("by_importance(segment=6)", "cuboids(shape=(3, 4), size=(2, 2))", "cuboids(shape=(4, 4), size=(2, 2))",
                 "cuboids(shape=(12,), size=(3,))"):
        with pytest.raises(SparsifyError, match=r"segment|windows"):
            Named.parse("token order", text)(query, key, None, Grid(12, 12, 4, 4, True), SCALE)
    with pytest.raises(SparsifyError, match="the same order"):
        Indexer.parse("Indexer(scorer=pooled, selector=top_k, order=by_importance, choices=(Indexer(scorer=pooled, selector=top_k),), heads=((0,),))")


def test_every_order_is_tested() -> None:
    assert set(catalog.names("token order")) == {"by_importance", "cuboids", "by_cluster"}


def test_some_pairs_of_a_head_hold_its_likeness() -> None:
    """By hand, beside the authors' selection (KwaiVGI/VMoBA, threshold by head at 0.4; 16 blocks, 64 queries, 3 heads, 20 seeds): equal."""

    def chosen(scores: Any, read: Any = None, **options: Any) -> list[list[int]]:
        table = torch.tensor([[scores]], dtype=torch.float32)
        taken = torch.zeros_like(table, dtype=torch.bool) if read is None else torch.tensor([[read]])
        text = f"head_mass({', '.join(f'{name}={value}' for name, value in options.items())})"
        found: Tensor = Named.parse("block selector", text)(table, taken)
        return found[0, 0].int().tolist()

    assert chosen([[0.0, 4, 3], [1, 2, 0]], mass=0.7, blocks=0) == [[0, 1, 1], [0, 0, 0]]
    assert chosen([[0.0, 4, 3], [1, 2, 0]], mass=0.71, blocks=0) == [[0, 1, 1], [0, 1, 0]]
    assert chosen([[0.0, 4, 3], [1, 2, 0]], mass=0.7) == [[0, 1, 1], [0, 1, 0]]  # a row is never empty
    assert chosen([[0.0, 4, 3], [1, 2, 0]], [[True, False, False], [True, False, False]], mass=0.5, blocks=0) == [[1, 1, 0], [1, 0, 0]]
    assert chosen([[0.0, 4], [-math.inf, math.inf]], mass=0.9, blocks=0) == [[0, 1], [0, 1]]
    assert chosen([[-math.inf, -math.inf]], mass=1.0) == [[0, 0]]
    assert chosen([[2.0, 2.0]], mass=0.5) == [[1, 0]]
