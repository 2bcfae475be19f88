"""Branches of attention — compressed, chosen, near — and what stands for the blocks that are not read: as slow references say, and trainable."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models.language import llama
from torch import Tensor

import sparsify_compiler as sc
from sparsify_compiler import catalog, recipes
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.branches import Branches, parse
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import InputError, ModelError, ParseError, StructureError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.named import Named
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention.branches.compressed import Compressed
from sparsify_compiler.passes.attention.choose_blocks import ChooseBlocks
from sparsify_compiler.passes.attention.select_blocks import Attention
from sparsify_compiler.passes_api import Context

SCALE = 0.7
NSA = {"length": 4, "stride": 2, "block": 4, "blocks": 3, "window": 6}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def drawn(queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    return random(2, 4, queries, 3), random(2, 2, keys, 3, seed=1), random(2, 2, keys, 3, seed=2)


def weights_of(part: Any, seed: int = 7, **more: tuple[int, ...]) -> dict[str, Tensor]:
    """Random values of what a branch learns."""
    found = part.initial(4, 2, 3, 3) | {name: torch.zeros(size, dtype=torch.float32) for name, size in more.items()}
    return {name: random(*tensor.shape, seed=seed + i) for i, (name, tensor) in enumerate(found.items())}


class Row:
    """One query of one head: NSA's three branches, written out (arXiv:2502.11089, equations 5 to 12)."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, weights: dict[str, Tensor], group: int, position: int,
                 options: dict[str, int]) -> None:
        self.k, self.v, self.position, self.options = key, value, position, options
        self.q, length, stride = query, options["length"], options["stride"]
        starts = [s for s in range(0, len(key) - length + 1, stride) if s + length - 1 <= position]
        self.starts = starts
        self.windows = [[sum((x[s + i] + weights[f"place_{name}"][group, i]) @ weights[f"compress_{name}"][group, i] for i in range(length))
                         for s in starts] for x, name in ((key, "key"), (value, "value"))]
        self.shares = torch.softmax(torch.stack([SCALE * query @ k for k in self.windows[0]]), 0) if starts else torch.zeros(0)

    def compressed(self) -> Tensor:
        return sum((p * v for p, v in zip(self.shares, self.windows[1], strict=True)), start=torch.zeros(3))

    def importance(self, block: int) -> float:
        """Equation 9, as the sum over the steps that a window shares with a block."""
        size, length, stride = self.options["block"], self.options["length"], self.options["stride"]
        cells = set(range(block * size // stride, (block + 1) * size // stride))
        return sum(float(p) * len(cells & set(range(s // stride, (s + length) // stride))) for p, s in zip(self.shares, self.starts, strict=True))

    def over(self, keys: list[int]) -> Tensor:
        return torch.softmax(SCALE * self.q @ self.k[keys].T, 0) @ self.v[keys]


def nsa(query: Tensor, key: Tensor, value: Tensor, weights: dict[str, Tensor], options: dict[str, int]) -> Tensor:
    out, heads, block = torch.zeros_like(query), query.shape[1] // key.shape[1], options["block"]
    for b, g, i in product(range(len(query)), range(key.shape[1]), range(query.shape[2])):
        position = i + key.shape[2] - query.shape[2]
        rows = [Row(query[b, g * heads + h, i], key[b, g], value[b, g], weights, g, position, options) for h in range(heads)]
        own = position // block
        always = {0, own, max(own - 1, 0)}
        order = sorted(set(range(own + 1)) - always, key=lambda j: -sum(row.importance(j) for row in rows))
        chosen = sorted(always | set(order[:options["blocks"] - len(always)]))
        near = list(range(max(position - options["window"] + 1, 0), position + 1))
        picked = [k for j in chosen for k in range(j * block, min((j + 1) * block, position + 1))]
        for h, row in enumerate(rows):
            gates = torch.sigmoid(row.q @ weights["gate_weight"][g * heads + h] + weights["gate_bias"][g * heads + h])
            out[b, g * heads + h, i] = gates[0] * row.compressed() + gates[1] * row.over(picked) + gates[2] * row.over(near)
    return out


def nsa_branches(**options: int) -> Branches:
    one, = recipes.nsa(**{**NSA, **options}).passes
    return Branches(one.parts, one.merge)


@pytest.mark.parametrize(("queries", "keys"), [(14, 14), (5, 18), (1, 16), (3, 3)])
def test_nsa_is_what_the_paper_writes(queries: int, keys: int) -> None:
    """The authors published no code. By hand, beside the torch reference of XunhaoLai/native-sparse-attention-triton (256 tokens, 4 heads, 2 groups,
    windows of 32 every 16, blocks of 64, six seeds): compressed attention within 9e-8, the chosen blocks of all 512 queries of each seed equal."""
    query, key, value = (t[:1] for t in drawn(queries, keys))
    branches = nsa_branches()
    weights = weights_of(branches.parts[0], gate_weight=(4, 3, 3), gate_bias=(4, 3))
    found = attend.by_indexer(branches, query, key, value, None, [weights[name] for name in branches.learned], is_causal=True, scale=SCALE)
    torch.testing.assert_close(found, nsa(query, key, value, weights, NSA), rtol=1e-4, atol=1e-4)


def test_nsa_looks_at_nothing_after_a_query() -> None:
    query, key, value = drawn(24, 24)
    branches = nsa_branches()
    weights = weights_of(branches.parts[0], gate_weight=(4, 3, 3), gate_bias=(4, 3))
    given = [weights[name] for name in branches.learned]
    whole = attend.by_indexer(branches, query, key, value, None, given, is_causal=True, scale=SCALE)
    for tokens in (1, 7, 16, 23):
        part = attend.by_indexer(branches, *(t[:, :, :tokens] for t in (query, key, value)), None, given, is_causal=True, scale=SCALE)
        torch.testing.assert_close(whole[:, :, :tokens], part, rtol=1e-5, atol=1e-5)


def test_every_tensor_of_the_branches_has_its_gradient() -> None:
    branches = nsa_branches(blocks=2)
    weights = {name: tensor.double().requires_grad_() for name, tensor in weights_of(
        branches.parts[0], gate_weight=(4, 3, 3), gate_bias=(4, 3)).items()}
    given = [t.double().requires_grad_() for t in drawn(9, 9)]

    def function(*tensors: Tensor) -> Tensor:
        out: Tensor = attend.op(*tensors[:3], None, list(tensors[3:]), is_causal=True, scale=SCALE, indexer=str(branches))
        return out

    assert torch.autograd.gradcheck(function, [*given, *(weights[name] for name in branches.learned)], fast_mode=True)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("stride", [2, 3])
def test_mean_windows_score_blocks_for_a_group(largest: bool, masked: bool, stride: int) -> None:
    query, key, _ = drawn(10, 17)
    mask = torch.arange(17).expand(2, 17) >= torch.tensor([[0], [3]]) if masked else None
    text = f"mean_windows(length=4, stride={stride}, largest={largest})"
    found = Named.parse("block scorer", text)(query, key, mask, Grid(10, 17, 3, 4, True), SCALE)
    assert found.shape == (2, 2, 4, 5)
    for b, g, i, j in product(range(2), range(2), range(4), range(5)):
        total = 0.0 if not largest else None
        of_windows: dict[int, float] = {}
        for r in range(3 * i, min(3 * i + 3, 10)):
            starts = [s for s in range(0, 14, stride) if s + 3 <= r + 7 and (mask is None or bool(mask[b, s:s + 4].all()))]
            for h in (2 * g, 2 * g + 1):
                shares = torch.softmax(torch.tensor([float(SCALE * query[b, h, r] @ key[b, g, s:s + 4].mean(0)) for s in starts]), 0)
                for s, share in zip(starts, shares.tolist(), strict=True):
                    of_windows[s] = of_windows.get(s, 0.0) + share
        shared = {s: max(0, min(s + 4, 4 * j + 4) - max(s, 4 * j)) / stride for s in of_windows}
        total = max((of_windows[s] for s in of_windows if shared[s]), default=0.0) if largest else sum(of_windows[s] * shared[s] for s in of_windows)
        assert float(found[b, g, i, j].exp()) == pytest.approx(total, abs=1e-5)


def test_infllm_v2_is_dense_below_a_length_and_shares_blocks_in_a_group() -> None:
    select, = recipes.infllm_v2(blocks=3, window=4, length=4, stride=2, block=4, dense_below=20).passes
    indexer = select._indexers()[0]
    query, key, value = drawn(20, 20)
    short = [t[:, :, :19] for t in (query, key, value)]
    torch.testing.assert_close(attend.by_indexer(indexer, *short, is_causal=True), attend.dense(*short, is_causal=True))
    layout = indexer.layout(query, key, True, SCALE)
    assert layout.counts.shape == (2, 2, 20)
    assert int(layout.counts.max()) <= 4  # three, or the window lies in two blocks beside the first one
    assert bool((layout.counts <= torch.arange(20) // 4 + 1).all())


def lse_reference(query: Tensor, key: Tensor, value: Tensor, read: Tensor, rest: Any) -> Tensor:
    """Exact attention where read, and exp(score) of a stand-in elsewhere, in one softmax: rest(b, h) -> (sums [Q], sums of values [Q, E])."""
    out = torch.empty(*query.shape[:3], value.shape[-1])
    for b, h in product(range(query.shape[0]), range(query.shape[1])):
        exact = torch.where(read[b, h], torch.exp(query[b, h] @ key[b, h // 2].T * SCALE), 0)
        total, values = rest(b, h)
        out[b, h] = (exact @ value[b, h // 2] + values) / (exact.sum(-1) + total)[:, None]
    return out


REST = "Indexer(always=(Windows(size=4),), scorer=pooled, selector='top_k(share=0.4)', block_q=4, block_k=4, rest='{}'{})"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys", "causal", "order"), [
    (14, 14, True, ""), (14, 14, False, ""), (3, 15, True, ""), (16, 16, True, "by_importance(segment=8)")])
def test_random_features_stand_for_what_is_not_read(queries: int, keys: int, causal: bool, order: str, masked: bool) -> None:
    query, key, value = drawn(queries, keys)
    mask = torch.arange(keys).expand(2, keys) >= torch.tensor([[0], [2]]) if masked else None
    text = REST.format("random_features(features=16)", f", order='{order}'" if order else "")
    text = text.replace("Windows(size=4)", "Windows(size=8)") if order else text
    indexer = Indexer.parse(text)
    layout = indexer.layout(query, key, causal, SCALE, mask)
    found, _ = indexer.branch(query, key, value, mask, None, causal, SCALE)
    seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries if causal else torch.ones(queries, keys, dtype=torch.bool)
    seen = seen.expand(2, 4, queries, keys) if mask is None else seen & mask[:, None, None].expand(2, 4, queries, keys)
    read = layout.mask().expand(2, -1, -1, -1)
    read = read.repeat_interleave(4 // read.shape[1], 1) & seen
    assert bool((seen & ~read).any())
    w = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()

    def features(x: Tensor) -> Tensor:
        x = x * math.sqrt(SCALE)
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / 4

    def rest(b: int, h: int) -> tuple[Tensor, Tensor]:
        estimate = torch.where(seen[b, h] & ~read[b, h], features(query[b, h]) @ features(key[b, h // 2]).T, 0)
        return estimate.sum(-1), estimate @ value[b, h // 2]

    blind = ~seen.any(-1, keepdim=True)
    expected = lse_reference(query, key, value, read, rest).masked_fill(blind, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_random_features_have_no_bias() -> None:
    query, key = random(1, 1, 1, 4) / 2, random(1, 1, 6, 4, seed=1) / 2
    left, grid = torch.ones(1, 1, 1, 2, dtype=torch.bool), Grid(1, 6, 1, 3, False)
    sums = []
    for seed in range(400):
        _, lse = Named.parse("block rest", f"random_features(features=64, seed={seed})")(query, key, key, None, left, grid, SCALE)
        sums.append(float(lse.exp()))
    truth = float(torch.exp(query @ key.transpose(-1, -2) * SCALE).sum())
    spread = float(torch.tensor(sums).std()) / math.sqrt(len(sums))
    assert abs(sum(sums) / len(sums) - truth) < 4 * spread < 0.1 * truth


@pytest.mark.parametrize(("by", "queries", "causal"), [("queries", 14, True), ("queries", 16, False), ("keys", 14, True), ("keys", 3, True)])
@pytest.mark.parametrize("masked", [False, True])
def test_summaries_stand_for_what_is_not_read(by: str, queries: int, causal: bool, masked: bool) -> None:
    """Combiner's fixed pattern, as its authors' code has it (google-research, combiner/tf/approx_attention.py, sqrt_fixed_full), written out."""
    keys = max(queries, 14)
    query, key, value = drawn(queries, keys)
    mask = torch.arange(keys).expand(2, keys) >= torch.tensor([[0], [2]]) if masked else None
    select, = recipes.combiner(block=4, by=by).passes
    indexer = select._indexers()[0]
    found, _ = indexer.branch(query, key, value, mask, None, causal, SCALE)
    counts = torch.ones(2, keys, dtype=torch.bool) if mask is None else mask
    below = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries if causal else torch.ones(queries, keys, dtype=torch.bool)
    seen = (below & counts[:, None, None]).expand(2, 4, queries, keys)
    read = indexer.layout(query, key, causal, SCALE, mask).mask().expand(2, 4, queries, keys) & seen
    if queries == keys and not masked:
        assert torch.equal(read[0, 0], (torch.arange(keys) // 4 == torch.arange(keys)[:, None] // 4) & below)

    def rest(b: int, h: int) -> tuple[Tensor, Tensor]:
        total, values = torch.zeros(queries), torch.zeros(queries, 3)
        for j in range(-(-keys // 4)):
            of = [k for k in range(4 * j, min(4 * j + 4, keys)) if counts[b, k]]
            if of:
                mean = key[b, h // 2, of].mean(0)
                asks = query[b, h, of].mean(0) if by == "queries" else mean
                inside = torch.softmax(SCALE * asks @ key[b, h // 2, of].T, 0) @ value[b, h // 2, of]
                weight = torch.exp(SCALE * query[b, h] @ mean) * (seen[b, h][:, of].all(-1) & ~read[b, h][:, of].any(-1))
                total, values = total + weight, values + weight[:, None] * inside
        return total, values

    blind = ~seen.any(-1, keepdim=True)
    expected = lse_reference(query, key, value, read, rest).masked_fill(blind, 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rest", ["random_features(features=4)", "summaries(by=keys)"])
def test_gradients_flow_through_the_rest(rest: str) -> None:
    given = [random(1, heads, 12, 2, seed=heads).double().requires_grad_() for heads in (2, 1, 1)]

    def function(*tensors: Tensor) -> Tensor:
        out: Tensor = attend.op(*tensors, is_causal=True, indexer=REST.format(rest, ""))
        return out

    assert torch.autograd.gradcheck(function, given, fast_mode=True)


def test_disjoint_branches_merge_into_one_softmax() -> None:
    query, key, value = drawn(16, 16)
    near, far = "Indexer(always=(Windows(size=4),), block_q=4, block_k=4)", "Indexer(always=(Sinks(tokens=4),), block_q=4, block_k=4)"
    branches = parse(f"Branches(parts=({near}, {far}), merge=lse)")
    assert parse(str(branches)) == branches
    assert branches.learned == ()
    found = attend.by_indexer(branches, query[:, :, 4:], key, value, is_causal=True, scale=SCALE)
    both = Indexer.parse("Indexer(always=(Windows(size=4), Sinks(tokens=4)), block_q=4, block_k=4)")
    torch.testing.assert_close(found, attend.by_indexer(both, query[:, :, 4:], key, value, is_causal=True, scale=SCALE))


def test_what_cannot_be() -> None:
    query, key, value = drawn(6, 8)
    bias = torch.zeros(1, 1, 6, 8, dtype=torch.float32)
    for indexer in (Indexer.parse(REST.format("summaries(by=keys)", "")), Branches((Compressed(2, 1),), "lse")):
        with pytest.raises(ModelError, match="added to the scores"):
            attend.by_indexer(indexer, query, key, value, bias, weights_of(Compressed(2, 1)).values() if isinstance(indexer, Branches) else None)
    for text in ("Branches(parts=())", "Branches(parts=(Compressed(),), merge=sum)",
                 "Branches(parts=(Indexer(always=(Sinks(tokens=1),), dense_below=9),))", "Branches(parts=(3,))"):
        with pytest.raises(ParseError, match="branch"):
            parse(text)
    with pytest.raises(InputError, match="needs gate_query, gate_key"):
        attend.by_indexer(Indexer(scorer="gate", selector="top_k"), query, key, value)
    with pytest.raises(ParseError, match="learns tensors"):
        ChooseBlocks((Indexer(scorer="gate", selector="top_k"),))
    with pytest.raises(StructureError, match="window is at least"):
        Compressed(4, 5)
    with pytest.raises(StructureError, match="by queries"):
        attend.by_indexer(Indexer.parse(REST.format("summaries", "")), query, key, value, is_causal=True)


def test_every_rest_and_branch_is_tested() -> None:
    assert set(catalog.names("block rest")) == {"random_features", "summaries"}
    assert set(catalog.names("attention branch")) == {"compressed"}


@pytest.mark.parametrize("kind", ["graph", "python"])
def test_an_attached_model_learns_its_branches_and_is_compiled_after(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = (torch.randn(4, 24, 16),) if kind == "graph" else {"input_ids": torch.randint(1, 96, (2, 24))}
    make = (lambda: Attention().eval()) if kind == "graph" else llama
    given = make()
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    model, _ = sc.attach(given, x, recipes.nsa(**NSA), dynamic=None if kind == "graph" else {"input_ids": {0: "batch", 1: "tokens"}})
    assert all(torch.equal(given.state_dict()[name], tensor) for name, tensor in before.items())
    gates = {name: p for name, p in model.named_parameters() if any(part in name for part in ("gate_weight", "gate_bias", "compress_"))}
    assert len(gates) == (4 if kind == "graph" else 8)
    assert all("sparsify_" in name for name in gates) == (kind == "python")
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    def run(of: Any) -> Tensor:
        out: Tensor = of(*x) if kind == "graph" else of(**x).logits
        return out

    losses = []
    for _ in range(6):
        loss = run(model).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for name, p in gates.items() if "gate_bias" in name)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    if kind == "graph":  # the laws compile, save and load it
        return
    with torch.no_grad():
        expected = run(model)
        cache = model(input_ids=x["input_ids"][:, :-3], use_cache=True).past_key_values
        for i in (-3, -2, -1):  # in decoding, as in the prompt: a query chooses alone
            said = model(input_ids=x["input_ids"][:, i:][:, :1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(said.logits[:, 0], expected[:, i], rtol=1e-3, atol=1e-3)
        compiled = sc.compile(model.eval(), x, recipe="pack() | lower(rounds=1)", target="cpu")
        torch.testing.assert_close(run(compiled), expected, rtol=1e-3, atol=1e-3)
        compiled.save(tmp_path / "out")
        torch.testing.assert_close(run(sc.load(tmp_path / "out", model=llama())), expected, rtol=1e-3, atol=1e-3)


def test_the_pass_rewrites_and_says_so() -> None:
    program = recipes.nsa(**NSA).run(capture(Attention().eval(), (torch.randn(1, 24, 16),)), Context())
    row = next(iter(program.decisions.values()))
    assert row.structure.startswith("Compressed(length=4, stride=2) + ")
