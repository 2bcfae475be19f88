"""Dynamic indexers: every scorer and selector says what a slow reference says that looks at all scores, and what does not count is never scored."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsify_compiler import catalog
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.named import Named

SCALE = 0.7


class Case:
    """One head of one entry of a batch: query [Q, D], key [K, D], and which keys and queries count."""

    def __init__(self, query: Tensor, key: Tensor, mask: Tensor, grid: Grid) -> None:
        self.q, self.k, self.grid, self.mask = query.double(), key.double(), grid, mask
        position = torch.arange(grid.queries)[:, None] + grid.keys - grid.queries
        self.below = torch.arange(grid.keys) <= position if grid.causal else torch.ones(grid.queries, grid.keys, dtype=torch.bool)
        self.visible = self.below & mask
        knows = grid.queries <= grid.keys and (grid.causal or grid.queries == grid.keys)
        self.own = mask[grid.keys - grid.queries:] if knows else torch.ones(grid.queries, dtype=torch.bool)
        self.scores = self.q @ self.k.T * SCALE
        self.shares = torch.softmax(self.scores.masked_fill(~self.visible, -math.inf), -1).nan_to_num(0)

    def rows(self, i: int) -> range:
        return range(i * self.grid.block_q, min((i + 1) * self.grid.block_q, self.grid.queries))

    def keys(self, j: int, block: int = 0) -> range:
        block = block or self.grid.block_k
        return range(j * block, min((j + 1) * block, self.grid.keys))

    def pairs(self) -> Iterator[tuple[int, int]]:
        return ((i, j) for i in range(-(-self.grid.queries // self.grid.block_q)) for j in range(-(-self.grid.keys // self.grid.block_k)))

    def mean(self, i: int) -> Tensor:
        rows = [self.q[r] for r in self.rows(i) if self.own[r]]
        return torch.stack(rows).mean(0) if rows else torch.zeros(self.q.shape[1], dtype=torch.float64)

    def open(self, i: int, j: int) -> float:
        places = self.below[list(self.rows(i))][:, list(self.keys(j))]
        return float(places.double().mean())


def log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def cosine(rows: list[Tensor]) -> float:
    return sum(float(torch.cosine_similarity(a, b, dim=0)) for a in rows for b in rows) / len(rows) ** 2 if rows else 1.0


def pooled(case: Case, i: int, j: int, similarity: float = -1.0) -> float:
    keys = [k for k in case.keys(j) if case.mask[k]]
    if not keys or not case.open(i, j):
        return -math.inf
    if min(cosine([case.q[r] for r in case.rows(i) if case.own[r]]), cosine([case.k[k] for k in keys])) < similarity:
        return math.inf
    return float(case.mean(i) @ case.k[keys].mean(0)) * SCALE + log(len(keys) * case.open(i, j))


def gaussian(case: Case, i: int, j: int) -> float:
    keys = [k for k in case.keys(j) if case.mask[k]]
    spread = case.k[keys].var(0, correction=0) if keys else torch.zeros(case.q.shape[1], dtype=torch.float64)
    return pooled(case, i, j) + SCALE**2 / 2 * float(case.mean(i).square() @ spread)


def page_bounds(case: Case, i: int, j: int, page: int) -> float:
    total = 0.0
    for p in range(j * case.grid.block_k // page, (j + 1) * case.grid.block_k // page):
        keys = [k for k in case.keys(p, page) if case.mask[k]]
        if keys:
            ends = torch.stack((case.mean(i) * case.k[keys].amin(0), case.mean(i) * case.k[keys].amax(0)))
            total += len(keys) * math.exp(SCALE * float(ends.amax(0).sum()))
    return log(total * case.open(i, j))


def sampled_rows(case: Case, i: int, j: int, rows: int) -> float:
    step = max(case.grid.block_q // rows, 1) if rows else 1
    taken = case.rows(i)[::-1][::step]
    return log(sum(float(case.shares[r, k]) for r in taken for k in case.keys(j)) / len(taken))


def vertical_slash(case: Case, i: int, j: int, last: int, step: int, slashes: bool) -> float:
    taken = range(case.grid.queries - 1, max(case.grid.queries - last, 0) - 1 if last else -1, -step)
    column = sum(float(case.shares[r, k]) for r in taken for k in case.keys(j)) / len(taken)
    if not slashes:
        return log(column)
    distances = {(r, k): r + case.grid.keys - case.grid.queries - k for r in range(case.grid.queries) for k in range(case.grid.keys)}
    slash: dict[int, float] = {}
    for r in taken:
        for k in range(case.grid.keys):
            slash[distances[r, k]] = slash.get(distances[r, k], 0) + float(case.shares[r, k]) / len(taken)
    return log(column + sum(slash.get(distances[r, k], 0) for r in case.rows(i) for k in case.keys(j)) / len(case.rows(i)))


def antidiagonal(case: Case, i: int, j: int, stride: int) -> float:
    grid, share = case.grid, 0.0
    offset = grid.keys - grid.queries
    for u in case.rows(i)[::stride]:
        scores: dict[int, float] = {}
        for v in range(0, grid.keys, stride):
            inside = [k for k in range(v, min(v + stride, grid.keys)) if case.mask[k]]
            if inside and (not grid.causal or v <= min(u + stride, grid.queries) - 1 + offset):
                places = [(u + stride - 1 - d, v + d) for d in range(stride)]
                scores[v] = sum(float(case.scores[r, k]) for r, k in places
                                if r < grid.queries and k < grid.keys and case.own[r] and case.mask[k]) / stride
        total = sum(map(math.exp, scores.values()))
        share += sum(math.exp(scores[v]) / total for v in scores if v in case.keys(j))
    return log(share / -(-grid.block_q // stride))


def channels(case: Case, i: int, j: int, kept: tuple[int, ...]) -> float:
    which = list(kept) or list(range(case.q.shape[1]))
    return log(case.open(i, j) * sum(math.exp(SCALE * float(case.mean(i)[which] @ case.k[k][which])) for k in case.keys(j) if case.mask[k]))


SCORERS: dict[str, tuple[Callable[..., float], list[str]]] = {
    "pooled": (pooled, ["pooled", "pooled(similarity=0.2)"]),
    "gaussian": (gaussian, ["gaussian"]),
    "page_bounds": (page_bounds, ["page_bounds(page=1)", "page_bounds(page=2)", "page_bounds(page=4)"]),
    "sampled_rows": (sampled_rows, ["sampled_rows(rows=0)", "sampled_rows(rows=2)", "sampled_rows(rows=100)"]),
    "vertical_slash": (vertical_slash, ["vertical_slash(last=5, step=1, slashes=True)", "vertical_slash(last=0, step=3, slashes=False)",
                                        "vertical_slash(last=0, step=1, slashes=True)"]),
    "antidiagonal": (antidiagonal, ["antidiagonal(stride=2)", "antidiagonal(stride=4)"]),
    "channels": (channels, ["channels", "channels(kept=((0, 2), (1, 3), (0, 1), (2, 4)))"]),
}


def drawn(seed: int, batch: int, queries: int, keys: int, masked: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """query [B, 4, Q, 5] and key [B, 2, K, 5], and a mask of padding on either side."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, heads, length, 5, generator=generator, dtype=torch.float32) for heads, length in ((4, queries), (2, keys)))
    place = torch.arange(keys)
    mask = torch.stack([(place >= b * 2) & (place < keys - 3 * (b == 0)) for b in range(batch)]) if masked else None
    if mask is not None:
        key = torch.where(mask[:, None, :, None], key, math.nan)  # nobody may look there
        if keys >= queries:
            query = torch.where(mask[:, None, keys - queries:, None], query, 0.0)
    return query, key, mask


@settings(max_examples=80, derandomize=True, deadline=None, phases=(Phase.explicit, Phase.generate), report_multiple_bugs=False)
@given(st.sampled_from([(name, text) for name, (_, texts) in SCORERS.items() for text in texts]), st.integers(1, 2), st.integers(1, 14),
       st.integers(1, 18), st.sampled_from([1, 4, 6]), st.sampled_from([4, 8]), st.booleans(), st.booleans(), st.integers(0, 9))
def test_scorers_equal_a_reference_that_sees_all_scores(named: tuple[str, str], batch: int, queries: int, keys: int, block_q: int, block_k: int,
                                                        causal: bool, masked: bool, seed: int) -> None:
    name, text = named
    grid = Grid(queries, keys, block_q, block_k, causal)
    query, key, mask = drawn(seed, batch, queries, keys, masked)
    scorer: Any = Named.parse("block scorer", text)
    found = scorer(query, key, mask, grid, SCALE)
    assert found.shape == (batch, 4, -(-queries // block_q), -(-keys // block_k))
    counted = torch.ones(batch, keys, dtype=torch.bool) if mask is None else mask
    options = dict(scorer.options)
    if "stride" in options:
        options["stride"] = math.gcd(options["stride"], block_q, block_k)
    for b in range(batch):
        for h in range(4):
            case = Case(query[b, h], torch.nan_to_num(key[b, h // 2]), counted[b], grid)
            given_options = {"kept": options.get("kept", ((),) * 4)[h]} if name == "channels" else options
            for i, j in case.pairs():
                if case.below[list(case.rows(i))][:, list(case.keys(j))].any() and case.mask[list(case.keys(j))].any():
                    expected = SCORERS[name][0](case, i, j, **given_options)
                    assert float(found[b, h, i, j]) == pytest.approx(expected, rel=1e-3, abs=1e-3), (b, h, i, j)


@pytest.mark.parametrize("proxies", [1, 2, 4])
def test_proxy_heads_order_as_the_proxy_and_fall_as_the_head(proxies: int) -> None:
    query, key, _ = drawn(3, 1, 24, 24, False)
    grid = Grid(24, 24, 4, 4, False)
    found = Named.parse("block scorer", f"proxy_heads(proxies={proxies}, rows=0)")(query, key, None, grid, SCALE)
    mean_q, mean_k = query.unflatten(1, (proxies, -1)).mean(2), key.repeat_interleave(2, 1).unflatten(1, (proxies, -1)).mean(2)
    for h in range(4):
        proxy = Case(mean_q[0, h * proxies // 4], mean_k[0, h * proxies // 4], torch.ones(24, dtype=torch.bool), grid)
        own = Case(query[0, h], key[0, h // 2], torch.ones(24, dtype=torch.bool), grid)
        curve = own.shares[20:].mean(0).view(6, 4).sum(1).sort(descending=True).values.float()
        for i in range(6):
            order = torch.tensor([sampled_rows(proxy, i, j, 0) for j in range(6)]).argsort(descending=True)
            torch.testing.assert_close(found[0, h, i, order].exp(), curve, rtol=1e-3, atol=1e-4)


def rows_of(scores: list[float], read: list[bool] | None = None) -> tuple[Tensor, Tensor]:
    return torch.tensor([[[scores]]]), torch.tensor([[[read or [False] * len(scores)]]], dtype=torch.bool)


def chosen(text: str, scores: list[float], read: list[bool] | None = None) -> list[int]:
    found: Tensor = Named.parse("block selector", text)(*rows_of(scores, read))
    return [i for i, taken in enumerate(found.flatten().tolist()) if taken]


def test_selectors_take_what_they_say() -> None:
    inf, shares = math.inf, [math.log(x) for x in (0.1, 0.4, 0.3, 0.15, 0.05)]
    assert chosen("top_k(share=0.4)", shares) == [1, 2]
    assert chosen("top_k(share=0.41)", shares) == [1, 2, 3]
    assert chosen("top_k(share=0.5)", [*shares, -inf, -inf]) == [1, 2, 3]  # of what is visible
    assert chosen("top_k(share=0.01, blocks=2)", shares) == [1, 2]
    assert chosen("top_k(share=0.4)", shares, [True, False, False, False, False]) == [0, 1]  # what is read anyway counts
    assert chosen("top_k(share=0.2)", [*shares[:3], inf, inf]) == [3, 4]  # all that must be
    assert chosen("top_p(mass=0.4)", shares) == [1]
    assert chosen("top_p(mass=0.69)", shares) == [1, 2]
    assert chosen("top_p(mass=0.71)", shares) == [1, 2, 3]
    assert chosen("top_p(mass=1.0)", shares) == [0, 1, 2, 3, 4]
    assert chosen("top_p(mass=0.49)", shares, [True, False, False, False, False]) == [0, 1]
    assert chosen("top_p(mass=0.5, rest=True)", shares, [False, True, False, False, False]) == [1, 2]
    assert chosen("top_p(mass=0.51, rest=True)", shares, [False, True, False, False, False]) == [1, 2, 3]
    assert chosen("top_p(mass=0.9, rest=True)", shares[:1], [True]) in ([], [0])  # it is read anyway
    assert chosen("top_p(mass=0.4)", [*shares, inf]) == [1, 5]
    assert chosen("top_p(mass=0.1, blocks=2)", shares) == [1, 2]
    assert chosen("threshold(share=0.15)", [x + 3 for x in shares]) == [1, 2, 3]
    assert chosen("threshold(share=0.9)", [*shares, inf, -inf]) == [1, 5]
    for text in ("top_k", "top_p", "threshold"):
        assert chosen(text, [-inf, -inf]) == []
        assert chosen(text, [inf, -inf]) == [0]
        assert Named.parse("block selector", text)(*rows_of([])).shape == (1, 1, 1, 0)


def test_every_scorer_and_selector_is_tested() -> None:
    assert set(catalog.names("block scorer")) == {*SCORERS, "proxy_heads", *ELSEWHERE}
    assert set(catalog.names("block selector")) == {"top_k", "top_p", "threshold", "head_mass"}  # the latter: test_attention_orders.py


# in the tests of attention that learns, its branches, its orders and its codes
ELSEWHERE = {"gate", "compressed_keys", "mean_windows", "shared_clusters", "shared_codes"}


TEXTS = [f"Indexer(always=(Windows(size=4),), scorer='{text}', selector='{selector}', block_q=4, block_k=4)"
         for text in ("pooled(similarity=0.1)", "gaussian", "page_bounds", "sampled_rows", "vertical_slash(last=8)", "antidiagonal(stride=2)",
                      "channels", "proxy_heads") for selector in ("top_k", "top_p(mass=0.8)")]


@pytest.mark.parametrize("text", TEXTS)
def test_indexers_at_every_length(text: str) -> None:
    """Empty, one row, cut blocks; all entries of a batch and heads; nothing after the diagonal, and no padding alone, is listed."""
    indexer = Indexer.parse(text)
    for queries, keys, causal in ((0, 0, True), (0, 5, False), (1, 1, True), (1, 17, True), (7, 7, True), (5, 13, True), (6, 9, False), (9, 5, True)):
        query, key, _ = drawn(1, 2, queries, keys, False)
        mask = torch.arange(keys).expand(2, keys) >= torch.tensor([[4], [0]])
        layout = indexer.layout(query, key, causal, SCALE, mask)
        out, lse = layout.attend(query, key, key, mask)
        assert out.shape == query.shape
        assert bool(out.isfinite().all())
        seen = (torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries) | torch.tensor(not causal)
        for b, places in enumerate(seen & mask[:, None]):
            assert bool((places.any(-1) | (lse[b] == -math.inf)).all())


@pytest.mark.parametrize("text", TEXTS)
def test_padding_is_not_scored_and_what_is_no_number_is_read(text: str) -> None:
    indexer = Indexer.parse(text.replace("always=(Windows(size=4),), ", ""))
    query, key, _ = drawn(2, 2, 16, 16, False)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[1, :6] = False
    tables = []
    for fill in (0.0, 1e4, math.nan):
        there = torch.where(mask[:, None, :, None], key, fill)
        tables.append(indexer.layout(query, there, True, SCALE, mask).mask())
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])
    assert not tables[0][1, :, :, :4].any()  # a block of padding alone
    nothing = indexer.layout(query, key, True, SCALE, torch.zeros_like(mask))
    assert not nothing.counts.any()
    key[:, :, 1] = math.nan
    spoilt = indexer.layout(query, key, True, SCALE).attend(query, key, key)[0]
    assert bool(spoilt[:, :, 4:].isnan().all())  # as dense attention has it, not hidden by a choice


@pytest.mark.parametrize("order", ["", "by_importance(segment=4)"])
def test_a_block_of_which_some_keys_count_can_be_chosen(order: str) -> None:
    indexer = Indexer.parse(f"Indexer(scorer=pooled, selector='top_k(share=1.0)', block_q=4, block_k=4, order='{order}')")
    query, key, _ = drawn(3, 2, 14, 14, False)
    mask = torch.stack((torch.arange(14) >= 2, torch.arange(14) < 13))  # the first block, and the last, which is cut
    seen = (mask[:, None, None] & torch.ones(14, 14, dtype=torch.bool).tril()).expand(2, 4, 14, 14)
    found = indexer.layout(query, key, True, SCALE, mask).mask().expand_as(seen)
    assert torch.equal(found & seen, seen)


def test_choices_of_heads() -> None:
    query, key, mask = drawn(5, 2, 22, 22, False)
    own = "always=(Sinks(tokens=3), Windows(size=4)), scorer=pooled, selector='top_k(share=0.5)', block_q=4, block_k=4"
    window = Indexer.parse("Indexer(always=(SlidingWindow(window=6),), block_q=4, block_k=4)")
    whole = Indexer.parse(f"Indexer({own})")
    mixed = Indexer.parse(f"Indexer({own}, choices=({window},), heads=((0, 3),))")
    assert Indexer.parse(str(mixed)) == mixed
    mask = torch.arange(22).expand(2, 22) >= torch.tensor([[5], [0]])
    for given_mask in (None, mask):
        found = mixed.layout(query, key, True, SCALE, given_mask).mask().expand(2, 4, 22, 22)
        of_window, of_scores = (one.layout(query, key, True, SCALE, given_mask).mask().expand(2, 4, 22, 22) for one in (window, whole))
        for head, expected in enumerate((of_window, of_scores, of_scores, of_window)):
            assert torch.equal(found[:, head], expected[:, head])
    every = Indexer.parse(f"Indexer({own}, choices=({window}, {window}), heads=((2, 0), (3, 1)))")
    assert torch.equal(every.layout(query, key, True, SCALE).mask(), window.layout(query, key, True, SCALE).mask().expand(2, 4, 22, 22))


@pytest.mark.parametrize(("options", "message"), [
    ("choices=(Indexer(always=(Sinks(tokens=1),)),)", "heads of its own"),
    ("choices=(Indexer(always=(Sinks(tokens=1),)),), heads=((0, 0),)", "heads of its own"),
    ("choices=(Indexer(always=(Sinks(tokens=1),), block_q=3),), heads=((0,),)", "no choice"),
    ("choices=(Sinks(tokens=1),), heads=((0,),)", "no choice"),
    ("choices=(Indexer(always=(Sinks(tokens=1),)),), heads=((9,),)", "head 9 of 4")])
def test_choices_that_cannot_be(options: str, message: str) -> None:
    query, key, _ = drawn(1, 1, 8, 8, False)
    with pytest.raises(SparsifyError, match=message):
        Indexer.parse(f"Indexer(always=(Sinks(tokens=2),), {options})").layout(query, key, True, SCALE)


def largest_tensor(scorer: str, length: int) -> int:
    """How many numbers the largest tensor has that is made to find the blocks of a prompt."""
    most = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            most[0] = max([most[0], *(t.numel() for t in tree_leaves(made) if isinstance(t, Tensor))])
            return made

    query, key = (torch.randn(1, heads, length, 8, dtype=torch.float32) for heads in (4, 2))
    indexer = Indexer.parse(f"Indexer(scorer='{scorer}', selector='top_k(share=0.1)', block_q=64, block_k=64)")
    with Watch():
        indexer.layout(query, key, True, SCALE)
    return most[0]


@pytest.mark.parametrize("scorer", ["pooled", "gaussian", "page_bounds(page=16)", "sampled_rows(rows=0)", "proxy_heads(proxies=2)", "antidiagonal",
                                    "vertical_slash(last=64)", "vertical_slash(last=0, step=8)", "channels"])
def test_memory_to_find_blocks_does_not_grow_with_the_square_of_the_length(scorer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One number for each pair of blocks aside, which are 4096 pairs of tokens."""
    for name in ("antidiagonal", "channels", "sampled_rows", "vertical_slash"):
        monkeypatch.setattr(importlib.import_module(f"sparsify_compiler.passes.attention.scorers.{name}"), "CHUNK", 1)
    assert largest_tensor(scorer, 2048) <= 2.1 * largest_tensor(scorer, 1024)


@pytest.mark.parametrize("name", ["antidiagonal", "channels", "sampled_rows", "vertical_slash"])
@pytest.mark.parametrize("sizes", [(64, 64, 16, 32), (50, 61, 16, 16), (61, 40, 16, 16)], ids=str)
@pytest.mark.parametrize(("causal", "masked"), [(True, False), (True, True), (False, True)])
def test_scores_do_not_depend_on_how_many_are_held_at_once(name: str, sizes: tuple[int, int, int, int], causal: bool, masked: bool,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the diagonal crosses a block of keys, too."""
    module, grid = importlib.import_module(f"sparsify_compiler.passes.attention.scorers.{name}"), Grid(*sizes, causal)
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, sizes[0], 8), torch.randn(2, 2, sizes[1], 8)
    mask = torch.rand(2, sizes[1]) > 0.2 if masked else None
    whole = getattr(module, name)(query, key, mask, grid, SCALE)
    monkeypatch.setattr(module, "CHUNK", 1)
    torch.testing.assert_close(getattr(module, name)(query, key, mask, grid, SCALE), whole, rtol=1e-4, atol=1e-5)


def test_options_that_do_not_fit_the_heads() -> None:
    query, key, _ = drawn(1, 1, 8, 8, False)
    for text in ("channels(kept=((0,),))", "proxy_heads(proxies=3)"):
        with pytest.raises(SparsifyError, match="heads"):
            Named.parse("block scorer", text)(query, key, None, Grid(8, 8, 4, 4, True), SCALE)


def test_other_dtypes() -> None:
    values: dict[torch.dtype, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        query, key, _ = drawn(1, 1, 8, 8, False)
        values[dtype] = [Named.parse("block scorer", name)(query.to(dtype), key.to(dtype), None, Grid(8, 8, 4, 4, True), SCALE) for name in SCORERS]
    for low, high in zip(values[torch.bfloat16], values[torch.float32], strict=True):
        assert low.dtype is torch.float32
        torch.testing.assert_close(low.tril(), high.tril(), rtol=0.1, atol=0.1)
