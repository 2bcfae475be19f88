"""shared_codes: matches of code words are counted, and the recipe that stands on it fine-tunes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

import sparsify_compiler as sc
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ParseError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.named import Named
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention.scorers.shared_codes import codes, learn
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(22, 22), (1, 22), (6, 21)])
def test_matches_of_pairs_are_counted(queries: int, keys: int, masked: bool) -> None:
    query, key, words = torch.randn(2, 4, queries, 8), torch.randn(2, 2, keys, 8), normalize(torch.randn(2, 2, 3, 4), dim=-1)
    mask = torch.arange(keys).expand(2, keys) >= torch.tensor([[5], [0]]) if masked else None

    def word(row: Tensor, group: int, part: int) -> int:
        return max(range(3), key=lambda c: float(row[4 * part : 4 * part + 4] @ words[group, part, c]))

    grid = Grid(queries, keys, 4, 4, False)
    scores = Named.parse("block scorer", "shared_codes(number=3, parts=2)")(query, key, mask, grid, 1.0, words)
    for b, h in ((0, 0), (1, 2), (1, 3)):
        for i, j in ((0, 0), (-(-queries // 4) - 1, 4), (0, 2)):
            rows, places = query[b, h, 4 * i : 4 * i + 4], [k for k in range(4 * j, min(4 * j + 4, keys)) if mask is None or mask[b, k]]
            pairs = sum(word(q, h // 2, part) == word(key[b, h // 2, k], h // 2, part) for q in rows for k in places for part in range(2))
            assert float(scores[b, h, i, j].exp()) == pytest.approx(pairs + 1e-3 if places else 0.0)


def test_words_are_found_and_parts_of_rows_are_told_apart() -> None:
    """Rows are made of two parts, each one of three directions: as many words find them, in whatever order, and code a row as its parts."""
    kinds = torch.randint(0, 3, (2, 200, 2))
    parts = torch.eye(4)[:3][kinds] * 5 + 0.1 * torch.randn(2, 200, 2, 4)
    rows = parts.flatten(-2)
    options, tensors = learn((normalize(rows, dim=-1),), number=3, parts=2)
    assert options == {"number": 3, "parts": 2}
    assert tensors["words"].shape == (2, 2, 3, 4)
    same = (kinds[:, :, None] == kinds[:, None]).sum(-1).float()
    coded = codes(rows[None], tensors["words"])[0]
    assert torch.equal(coded @ coded.mT, same)
    with pytest.raises(ParseError, match="do not divide"):
        learn((rows,), number=3, parts=3)


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


def test_the_keys_that_a_query_weighs_are_read() -> None:
    """Tokens in nine combinations of two parts: a query gives nearly all weight to keys of its own, and those are the blocks of most matches."""
    kinds = torch.randint(0, 3, (1, 1, 128, 2))
    rows = (torch.eye(4)[kinds] * 4 + 0.05 * torch.randn(1, 1, 128, 2, 4)).flatten(-2).repeat(1, 2, 1, 1)
    value = torch.randn(1, 2, 128, 8)
    recipe = Pipeline.parse("select_blocks(always=(), scorer='shared_codes(number=3, parts=2)', selector='top_k(share=0.25)', block_q=1, block_k=1,"
                            " dense_below=0)")
    program = recipe.run(capture(Plain().eval(), (rows, rows, value)), Context(batches=[(rows, rows, value)] * 8))
    node = next(node for _, node in program.nodes() if node.target is attend.op)
    words = program.regions[""].module.get_buffer(str(node.kwargs["learned"][0].target))
    layout = Indexer.parse(str(node.kwargs["indexer"])).layout(rows, rows, False, 1.0, None, {"words": words})
    same = (kinds[..., None, :] == kinds[..., None, :, :]).all(-1)
    assert bool((layout.mask() | ~same).all())
    torch.testing.assert_close(CompiledModel(program)(rows, rows, value), scaled_dot_product_attention(rows, rows, value), rtol=0.1, atol=0.1)


class Block(nn.Module):
    """Attention and a gated FFN on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y: Tensor = x + self.down(torch.relu(self.up(x)))
        return y


def test_the_recipe_fine_tunes_adapters_and_routers_and_nothing_else() -> None:
    model, x, y = Block().eval(), torch.randn(4, 32, 16), torch.randn(4, 32, 16)
    module, hook = sc.attach(model, (x,), sc.recipes.spt(share=0.5, experts=4, block=4), calibration=[(x,)])
    before: dict[str, Any] = {name: value.clone() for name, value in module.state_dict().items()}
    optimizer, losses = torch.optim.Adam([one for one in module.parameters() if one.requires_grad], 1e-2), []
    for _ in range(20):
        loss = (module(x) - y).square().mean()
        (loss + hook.loss()).backward()
        losses.append(float(loss.detach()))
        optimizer.step(), hook.step(optimizer), optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert any("router" in name for name in moved)
    assert moved
    assert all("router" in name or "low_rank" in name for name in moved), moved
