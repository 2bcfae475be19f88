"""How much tokens matter to a block: what route_tokens fits its routers to, and the recipe that leaves out those that get little attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import UnknownNameError
from sparsify_compiler.named import Named
from sparsify_compiler.part_run import TOKENS
from sparsify_compiler.passes.moe._depth import depths, seen
from sparsify_compiler.passes.moe.route_tokens import Block, RouteTokens
from sparsify_compiler.passes.moe.token_importances.received import weights
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
def test_what_a_token_receives_is_the_mean_of_the_weights_that_it_has(kind: str) -> None:
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    allowed = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril() if kind == "causal" else torch.rand(2, 1, 6, 6) < (2 if kind == "none" else 0.7)
    allowed[..., 0] = True
    mask: Tensor | None = {"bool": allowed, "float": torch.zeros(2, 1, 6, 6).masked_fill(~allowed, torch.finfo(torch.float32).min)}.get(kind)
    found = weights(query, key, mask, causal=kind == "causal", scale=None)
    assert found.shape == (2, 6, 1)
    for b in range(2):
        for token in range(6):
            got = []
            for head in range(4):
                for row in range(6):
                    places = [k for k in range(6) if allowed[b, 0, row, k]]
                    scores = torch.stack([query[b, head, row] @ key[b, head // 2, k] for k in places]) / 8**0.5
                    got += [float(scores.softmax(0)[places.index(token)])] if token in places else []
            assert float(found[b, token]) == pytest.approx(sum(got) / max(len(got), 1), rel=1e-4)


def test_a_router_is_fitted_to_what_is_received() -> None:
    """Both are seen on the rows that the block reads, block by block."""
    model, x = nn.Sequential(Block(16, 4), Block(16, 4)).eval(), torch.randn(3, 10, 16)
    program, ctx = capture(model, (x,)), Context(batches=[(x,)])
    found = depths(program, TOKENS, ctx, "route_tokens")
    received = seen(program, found, ctx, Named.parse("token importance", "received"))
    change = seen(program, found, ctx)
    for at, one in enumerate(found):
        stream = x if at == 0 else model[0](x)
        block = model[at]
        assert isinstance(block, Block)
        query, key, _ = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in block.qkv(block.norm(stream)).chunk(3, -1))
        torch.testing.assert_close(received[one.path][0], stream.flatten(0, 1))
        torch.testing.assert_close(received[one.path][1].flatten(), weights(query, key, causal=False, scale=None).flatten(), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(received[one.path][1], change[one.path][1], atol=1e-2)


class NoAttention(nn.Module):
    """A residual block of an FFN alone."""

    def __init__(self) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.ffn(x)
        return y


def test_a_block_without_attention_is_left_alone() -> None:
    model, x = nn.Sequential(NoAttention(), NoAttention()).eval(), torch.randn(3, 10, 16)
    ctx = Context(batches=[(x,)])
    after = Pipeline.parse("route_tokens(density=0.5, routed=1.0, wanted='received')").run(capture(model, (x,)), ctx)
    assert len(ctx.misses) == 2
    assert all("0 attentions" in miss.why for miss in ctx.misses)
    torch.testing.assert_close(instantiate(after)(x), model(x))
    with pytest.raises(UnknownNameError):
        RouteTokens(wanted="nothing")
    ctx = Context()  # a router that nothing is asked for needs no attention
    Pipeline.parse("route_tokens(density=0.5, routed=1.0, router='random', wanted='received')").run(capture(model, (x,)), ctx)
    assert ctx.rewrites == 2


class Elsewhere(nn.Module):
    """Tokens that attend to those of another text, or heads that stand beside the texts."""

    def __init__(self, merged: bool) -> None:
        super().__init__()
        self.q, self.kv, self.out, self.merged = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16), merged

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        parts = self.q(x), *self.kv(x if self.merged else z).chunk(2, -1)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in parts)
        if self.merged:
            q, k, v = (part.flatten(0, 1) for part in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).view(x.shape[0], 2, x.shape[1], 8)
        found: Tensor = x + self.out(y.transpose(1, 2).flatten(2))
        return found


@pytest.mark.parametrize("merged", [False, True])
def test_keys_that_are_not_the_blocks_own_tokens_are_a_miss(merged: bool) -> None:
    x = (torch.randn(2, 10, 16), torch.randn(2, 7, 16))
    ctx = Context(batches=[x])
    Pipeline.parse("route_tokens(density=0.5, routed=1.0, wanted='received')").run(capture(Elsewhere(merged).eval(), x), ctx)
    assert ctx.rewrites == 0
    assert any("of its own tokens" in miss.why for miss in ctx.misses), ctx.misses


def test_lemo_keeps_fewer_rows_and_trains_adapters_alone() -> None:
    model, x, y = nn.Sequential(*[Block(16, 4) for _ in range(2)]).eval(), torch.randn(3, 20, 16), torch.randn(3, 20, 16)
    module, hook = sc.attach(model, (x,), sc.recipes.lemo(density=0.5, rank=2), calibration=[(x,)])
    assert sc.recipes.lemo(density=0.5).run(capture(model, (x,)), Context(batches=[(x,)])).text().count("take_part") >= 2
    assert not any("router" in name and "low_rank" in name for name, _ in module.named_parameters())
    before: dict[str, Any] = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer, losses = torch.optim.Adam([one for one in module.parameters() if one.requires_grad], 1e-2), []
    for _ in range(20):
        loss = (module(x) - y).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step(), hook.step(optimizer), optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("low_rank" in name and "router" not in name for name in moved), moved
    assert any(".ffn." in name or "ffn" in name for name in moved)
