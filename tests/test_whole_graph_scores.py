"""Attention by blocks of highest score in libraries: as torch chooses them, of prompts, padded texts, and single tokens over a cache."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import torch
from test_whole_graph_blocks import decoder, reader
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from whole_graph_help import runner

import sparsify_compiler as sc
from sparsify_compiler.capture import capture
from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.kernels.attend_dense import AttendDense
from sparsify_compiler.codegen.kernels.blocks_dense import Blocks
from sparsify_compiler.codegen.kernels.mask_dense import Mask
from sparsify_compiler.codegen.kernels.score_blocks import ScoreBlocks
from sparsify_compiler.codegen.vectors import vectors_of
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ModelError
from sparsify_compiler.executor import flat_function
from sparsify_compiler.export_library_blocks import table_of
from sparsify_compiler.export_library_cached import empty_caches, with_cache
from sparsify_compiler.export_library_scores import places_before, scores_of
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.passes_api import Context
from sparsify_compiler.target import host

SIZES = "block_q=8, block_k=8"
POOLED = f"Indexer(scorer='pooled', selector='top_k(share=0.4)', {SIZES})"
SPREAD = "Indexer(always=(Windows(size=8),), scorer='gaussian', selector='top_k(share=0.1, blocks=3)', block_q=16, block_k=8)"
BOUNDS = f"Indexer(always=(SlidingWindow(window=7), Sinks(tokens=11)), scorer='page_bounds(page=2)', selector='top_k(share=0.3)', {SIZES})"
BY_HEAD = (f"Indexer(always=(SlidingWindow(window=5),), {SIZES}, choices=(Indexer(always=(Sinks(tokens=9),), scorer='pooled', "
           f"selector='top_k(share=0.5)', {SIZES}),), heads=((1, 2),))")
HEADS, GROUPS, WIDTH, LONGEST = 4, 2, 24, 64
SCORED = "select_blocks(always=(Windows(size=8), Sinks(tokens=3)), scorer=pooled, selector='top_k(share=0.4)', block_q=8, block_k=8, dense_below=20)"


def attended(indexer: Indexer, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, starts: str) -> Tensor:
    """Both kernels, as a graph has them."""
    target, scores = host(), scores_of(indexer, HEADS, None)  # type: ignore[arg-type]
    before = places_before(indexer, HEADS) if starts else 0
    table, tiles = table_of(indexer, HEADS, LONGEST, causal or starts == "last", before)
    blocks = Blocks(indexer.block_q, indexer.block_k, True, True, starts if before else "", indexer.dense_below or 0, 0, True, before,
                    table.shape[1] != 1)
    facts, length = Mask("bool", (True, False, starts == "last")) if starts else Mask(), query.shape[2]
    shape = len(query), HEADS, (length + indexer.block_q - 2) // indexer.block_q + 1, -(-length // indexer.block_k)
    found, given, scale = torch.full(shape, -7, dtype=torch.int32), [] if mask is None else [mask], WIDTH**-0.5
    choose = ScoreBlocks(WIDTH, HEADS, GROUPS, scale, causal or starts == "last", scores.pages.way, scores.pages.page, starts, facts,
                         ("bhsd", "bhsd"), False, blocks, 2, vectors_of(target))
    build.load(choose, target).function(query, key, *given, scores.shares, scores.least, scores.logs, table, tiles, found)
    out = torch.full_like(query, math.nan)
    run = AttendDense(WIDTH, WIDTH, HEADS, GROUPS, scale, causal, facts, ("bhsd",) * 4, False, vectors_of(target).lanes, 2, 4, 2, blocks)
    build.load(run, target).function(query, key, value, *given, found, tiles, *([table] if blocks.starts else []), out)
    return out


@pytest.mark.parametrize(("text", "how"), [(POOLED, "causal"), (SPREAD, "first"), (BOUNDS, "last"), (BY_HEAD, "")])     # each is two kernels to build
def test_the_kernel(text: str, how: str) -> None:
    """Texts of whole and cut blocks; padded on the left by whole blocks and by less; dense below a length."""
    agrees(text, how, (1, 5, 6, 33, 64))


def agrees(text: str, how: str, lengths: tuple[int, ...]) -> None:
    """With torch over the places of the blocks that the indexer reads."""
    indexer = Indexer.parse(text[:-1] + ", dense_below=6)")
    for length in lengths:
        torch.manual_seed(length)
        query, key, value = (torch.randn(2, heads, length, WIDTH, dtype=torch.float32) for heads in (HEADS, GROUPS, GROUPS))
        counts = torch.arange(length) >= torch.tensor([[length // 4], [length // 3]])     # of 33 and 64, 8 and 16 are whole blocks
        mask = {"first": counts[:, None, None], "last": counts[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()}.get(how)
        read = counts if mask is not None else torch.ones_like(counts)
        places = torch.ones(1, 1, length, length, dtype=torch.bool)
        if not indexer.is_dense(length, length):
            places = indexer.layout(query, key, how in ("causal", "last"), WIDTH**-0.5, counts if mask is not None else None).mask()
        places = (places if mask is None else places & mask) & (torch.ones(length, length, dtype=torch.bool).tril(0 if how == "causal" else length))
        expected = scaled_dot_product_attention(query, key, value, places, enable_gqa=True)
        found = attended(indexer, query, key, value, mask, how == "causal", how if mask is not None else "")
        torch.testing.assert_close(found.transpose(1, 2)[read], expected.transpose(1, 2)[read], rtol=1e-4, atol=1e-5)


def test_no_number_is_read() -> None:
    """A key that is no number makes its block's score none, in the bounds of pages too."""
    query, key, value = (torch.randn(2, heads, 33, WIDTH, dtype=torch.float32) for heads in (HEADS, GROUPS, GROUPS))
    key[:, :, 20, 3] = math.nan
    mask = torch.ones(33, 33, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    found = attended(Indexer.parse(BOUNDS[:-1] + ", dense_below=6)"), query, key, value, mask, False, "last")
    assert bool(found[:, :, :16].isfinite().all())
    assert bool(found[:, :, 24:].isnan().all())
    query[:, :, 21], key[:, :, 20, 3] = math.nan, 0.0     # the scores of a block of queries are no numbers: it reads all that it sees
    found = attended(Indexer.parse(BOUNDS[:-1] + ", dense_below=6)"), query, key, value, mask, False, "last")
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found[:, :, 16:21], expected[:, :, 16:21], rtol=1e-4, atol=1e-5)


def test_an_encoder(tmp_path: Path) -> None:
    compiled = reader(SCORED)
    compiled.export(tmp_path / "out", longest=100)
    model = runner(tmp_path / "out").Model(tmp_path / "out")
    assert model.manifest["reference"] == []
    for batch, length in ((1, 1), (2, 19), (2, 20), (3, 50), (1, 100)):
        x, mask = torch.randn(batch, length, 32, dtype=torch.float32), torch.ones(batch, length, dtype=torch.bool)
        mask[-1, : length // 3] = False
        mask[0, length - length // 4:] = False
        with torch.no_grad():
            expected = compiled(x, mask)
        found = torch.from_numpy(numpy.array(model.run(x=x.numpy(), mask=mask.numpy())["output"]))
        torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_language_model(tmp_path: Path) -> None:
    """With a cache a token chooses for itself, as in generate() of torch; what it chose among others of a prompt is another choice."""
    dense, compiled = decoder("select_blocks(always=(Sinks(tokens=1),), scorer=pooled, selector='top_k(share=0.4)', block_q=4, block_k=4)")
    compiled.export(tmp_path / "out", cache=True, longest=24)
    exported = runner(tmp_path / "out").Model(tmp_path / "out")
    ids = torch.randint(0, 40, (2, 11))
    made = with_cache(compiled.program.regions[""], 24)
    run, caches, expected, new, past = flat_function(made.region), empty_caches(made.caches, 2, 24), [], ids, 0
    with torch.no_grad():
        for _ in range(12):
            logits = run(new, torch.tensor([past]), *caches)[0]
            past += new.shape[1]
            new = logits.argmax(-1)[:, None]
            expected.append(new)
        assert not torch.allclose(compiled(ids), dense(ids), rtol=1e-2, atol=1e-2)
    assert exported.generate(ids.numpy(), 12).tolist() == torch.cat(expected, 1).tolist()


@pytest.mark.parametrize("choice", ["scorer=pooled, selector='top_p(mass=0.9)'", "scorer='pooled(similarity=0.5)', selector='top_k(share=0.5)'",
                                    "scorer=antidiagonal, selector='top_k(share=0.5)'"])
def test_what_is_refused(choice: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="by scores, in a way that whole graphs do not") as caught:
        reader(f"select_blocks({choice})").export(tmp_path / "out")
    assert "scorer=pooled (without similarity), gaussian or page_bounds and selector=top_k" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_language_model_of_transformers(tmp_path: Path) -> None:
    """The tokens that generate() finds where torch chooses the blocks, of patterns and pages, step by step."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                                                   num_attention_heads=4, num_key_value_heads=2)).eval()
    ids, dynamic = torch.randint(1, 96, (1, 80)), {"input_ids": {0: "batch", 1: "tokens"}}
    recipe = sc.Pipeline.parse("select_blocks(always=(Windows(size=8), Sinks(tokens=8)), scorer='page_bounds(page=4)', "
                               "selector='top_k(share=0.25)', block_q=8, block_k=8, dense_below=0)")
    compiled = CompiledModel(recipe.run(capture(model, {"input_ids": ids, "use_cache": False}, dynamic), Context()))
    compiled.export(tmp_path / "out", cache=True, longest=256)
    found = runner(tmp_path / "out").Model(tmp_path / "out").generate(ids.numpy(), 24)
    by_torch = sc.compile(model, {"input_ids": ids}, recipe=recipe, dynamic=dynamic, decoding="parts")
    expected, dense = (one.generate(ids, max_new_tokens=24, do_sample=False)[:, 80:] for one in (by_torch, model))
    assert found.tolist() == expected.tolist() != dense.tolist()
