"""Attention by blocks in libraries: a table for the longest text serves shorter ones, prompts in pieces, padding on either side and single tokens."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_whole_graph_models import Decoder
from torch import Tensor, nn
from whole_graph_help import build_example, example, runner

import sparsify_compiler as sc
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.capture import capture
from sparsify_compiler.cli import main
from sparsify_compiler.codegen import build
from sparsify_compiler.codegen.kernels.attend_dense import AttendDense
from sparsify_compiler.codegen.kernels.attend_step import AttendStep
from sparsify_compiler.codegen.kernels.blocks_dense import Blocks
from sparsify_compiler.codegen.kernels.mask_dense import Mask
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ModelError
from sparsify_compiler.export_library_blocks import places_read, table_of
from sparsify_compiler.export_library_cached import attend_cached, with_cache
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.ops import attend
from sparsify_compiler.passes_api import Context
from sparsify_compiler.target import host

WINDOW = "Indexer(always=(SlidingWindow(window=7), Sinks(tokens=3)), block_q=8, block_k=8)"
HEADS = ("Indexer(always=(SlidingWindow(window=5),), block_q=16, block_k=8, choices=(Indexer(always=(Dilated(step=4), GlobalTokens(tokens=1)), "
         "block_q=16, block_k=8),), heads=((1, 2),))")
WIDE = "Indexer(always=(SlidingWindow(window=200),), block_q=8, block_k=160)"
PATTERNS = (WINDOW, HEADS, "Indexer(always=(Windows(size=6, before=1),), block_q=4, block_k=16)", "Indexer(always=(Everything(),))")


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(PATTERNS), st.integers(1, 60), st.integers(0, 8))
def test_a_table_of_the_longest_text_is_that_of_all(text: str, length: int, new: int) -> None:
    indexer = Indexer.parse(text)
    table, tiles = table_of(indexer, 4, 64, True)
    found = places_read(min(new, length), length, table, tiles, (indexer.block_q, indexer.block_k, 0, 0))
    rows = torch.randn(1, 4, length, 2, dtype=torch.float32)
    layout = indexer.layout(rows[:, :, length - min(new, length):], rows, True, 1.0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()[length - min(new, length):]
    assert torch.equal((found & causal).expand(1, 4, -1, -1), layout.mask().expand(1, 4, -1, -1))


@pytest.mark.parametrize(("text", "starts", "registers"), [(WINDOW, "first", (16, 2, 8)), (HEADS, "", (4, 4, 4)), (HEADS, "last", (8, 1, 2)),
                                                           (PATTERNS[2], "", (4, 2, 4))])
def test_the_kernel(text: str, starts: str, registers: tuple[int, int, int]) -> None:
    """Texts that are padded on the left, dense attention below a length, and what the op says."""
    indexer = Indexer.parse(text[:-1] + ", dense_below=12)")
    table, tiles = table_of(indexer, 4, 64, starts == "last")
    for queries in (1, 11, 12, 45):
        query, key, value = (torch.randn(2, heads, queries, 8, dtype=torch.float32) for heads in (4, 2, 2))
        mask = torch.arange(queries)[None] >= torch.tensor([0, queries // 3])[:, None]
        mask = mask[:, None, None] if starts != "last" else mask[:, None, None] & torch.ones(queries, queries, dtype=torch.bool).tril()
        expected = attend.reference(query, key, value, mask if starts else None, indexer=str(indexer)).contiguous()
        blocks = Blocks(indexer.block_q, indexer.block_k, False, table.shape[1] != 1, starts, 12, 0)
        facts = Mask("bool", (True, False, starts == "last")) if starts else Mask()
        schedule = AttendDense(8, 8, 4, 2, 8**-0.5, False, facts, ("bhsd",) * 4, False, *registers, workers=2, blocks=blocks)
        found = torch.full_like(expected, math.nan)
        inputs = [query, key, value, *([mask] if starts else []), table, tiles]
        build.load(schedule, host()).function(*inputs, found)
        counts = mask.expand(2, 1, queries, queries)[:, 0].diagonal(dim1=1, dim2=2) if starts else torch.ones(2, queries, dtype=torch.bool)
        assert found.isfinite().all()
        torch.testing.assert_close(found.transpose(1, 2)[counts], expected.transpose(1, 2)[counts], rtol=1e-4, atol=1e-5)


def test_the_kernel_over_a_cache() -> None:
    """Pieces of any size, behind which anything may be in the cache."""
    indexer = Indexer.parse(HEADS)
    table, tiles = table_of(indexer, 4, 64, True)
    query, key, value = (torch.randn(1, heads, 40, 8, dtype=torch.float32) for heads in (4, 2, 2))
    expected = attend.reference(query, key, value, is_causal=True, indexer=str(indexer))
    caches = [torch.cat([one, torch.full_like(one[:, :, :9], math.nan)], 2) for one in (key, value)]
    schedule = AttendDense(8, 8, 4, 2, 8**-0.5, True, Mask(), ("bhsd",) * 4, True, 4, 2, 4, 1, Blocks(16, 8, False, True, "", 0, 0))
    plain, past = [torch.zeros_like(one) for one in caches], 0
    for size in (13, 1, 1, 20, 5):
        part = [one[:, :, past:past + size].contiguous() for one in (query, key, value)]
        found = torch.full_like(part[0], math.nan)
        build.load(schedule, host()).function(part[0], *caches, torch.tensor([past]), table, tiles, found)
        torch.testing.assert_close(found, expected[:, :, past:past + size], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attend_cached(*part, torch.tensor([past]), *plain, None, table, tiles, 16, 8, 0, 0), found, rtol=1e-4, atol=1e-5)
        past += size


@pytest.mark.parametrize("text", [WINDOW, HEADS, PATTERNS[2], WIDE])
def test_the_kernel_of_one_token(text: str) -> None:
    """Lines of the table that hide whole blocks from some heads of a group, tiles, also of more keys than are read at once, dense below a length."""
    indexer = Indexer.parse(text[:-1] + ", dense_below_decoding=12)")
    table, tiles = table_of(indexer, 4, 400, True)
    blocks = Blocks(indexer.block_q, indexer.block_k, False, table.shape[1] != 1, "", 0, 12)
    step = build.load(AttendStep(8, 8, 4, 2, 8**-0.5, 8, 8, 1, blocks), host()).function
    for keys in (1, 11, 12, 33, 60, 390):
        query, key, value = (torch.randn(1, heads, size, 8, dtype=torch.float32) for heads, size in ((4, 1), (2, keys), (2, keys)))
        expected = attend.reference(query, key, value, is_causal=True, indexer=str(indexer))
        found = torch.full((4, 8), math.nan, dtype=torch.float32)
        step(query.view(4, 8), key, value, torch.tensor([keys - 1]), table, tiles, found)
        torch.testing.assert_close(found.view(1, 4, 1, 8), expected, rtol=1e-4, atol=1e-5)


class Reader(nn.Module):
    """One attention under a mask of keys, as an encoder has it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2))


def reader(passes: str, dynamic: bool = True) -> CompiledModel:
    torch.manual_seed(0)
    both = {0: "batch", 1: "length"}
    inputs = {"x": torch.randn(2, 12, 32, dtype=torch.float32), "mask": torch.ones(2, 12, dtype=torch.bool)}
    program = capture(Reader().eval(), inputs, {"x": both, "mask": both} if dynamic else None)
    return CompiledModel(sc.Pipeline.parse(passes).run(program, Context()))


STREAM = "select_blocks(always=(SlidingWindow(window=6), Sinks(tokens=2)), block_q=16, block_k=8, dense_below=20)"


def test_an_encoder(tmp_path: Path) -> None:
    compiled = reader(STREAM)
    compiled.export(tmp_path / "out", longest=100)
    module = runner(tmp_path / "out")
    model = module.Model(tmp_path / "out")
    assert model.manifest["symbols"]["length"] == [1, 100]
    assert model.manifest["reference"] == []
    for batch, length in ((1, 1), (2, 19), (2, 20), (3, 50), (1, 100)):
        x, mask = torch.randn(batch, length, 32, dtype=torch.float32), torch.ones(batch, length, dtype=torch.bool)
        mask[-1, : length // 3] = False
        with torch.no_grad():
            expected = compiled(x, mask)
        found = torch.from_numpy(numpy.array(model.run(x=x.numpy(), mask=mask.numpy())["output"]))
        torch.testing.assert_close(found[mask], expected[mask], rtol=1e-4, atol=1e-5)
    x, mask = numpy.zeros((1, 101, 32), "float32"), numpy.ones((1, 101), bool)
    with pytest.raises(module.LibraryError, match="length from 1 to 100"):
        model.run(x=x, mask=mask)


def test_the_command_line_says_how_long_texts_are(tmp_path: Path) -> None:
    reader(STREAM).save(tmp_path / "saved")
    command = ["export", f"{tmp_path}/saved", "--out", f"{tmp_path}/out", "--form"]
    assert main([*command, "onnx", "--longest", "40"]) == main([*command, "library", "--longest", "0"]) == 2
    assert not (tmp_path / "out").exists()
    assert main([*command, "library", "--longest", "40"]) == 0
    assert runner(tmp_path / "out").read_manifest(tmp_path / "out")["symbols"]["length"] == [1, 40]


def test_what_a_cache_is_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the table, the caller's or the one that the model's own limit gives; an attention that is always dense has none."""
    from sparsify_compiler import export_library
    from sparsify_compiler.codegen import whole_graph

    monkeypatch.setattr(whole_graph, "compile_graphs", lambda *_: None)
    for below, limit, most in (("", None, 30), ("", 24, 24), (", dense_below=1073741824", None, None), (", dense_below=1073741824", 24, 24)):
        _, compiled = decoder(f"select_blocks(always=(SlidingWindow(window=3),), block_q=4, block_k=4{below})")
        if limit:
            compiled.program.regions[""].spec.ranges["tokens"] = (1, limit)
        _, ranges = export_library._compile(compiled.program, host(), True, 30)
        assert ranges["tokens"] == ranges["capacity"] == (1, most)


def test_few_queries_over_a_cache_are_dense_by_their_own_limit() -> None:
    """A text of few tokens has few keys only where there is no cache."""
    _, compiled = decoder("select_blocks(always=(SlidingWindow(window=3),), block_q=4, block_k=4, dense_below=100)")
    region = compiled.program.regions[""]
    for node in region.graph.nodes:
        if node.target is attend.op:
            node.kwargs = {**node.kwargs, "indexer": node.kwargs["indexer"].replace("dense_below_decoding=100", "dense_below_decoding=10")}
    assert with_cache(region, 24).longest == 24
    assert all(len(node.args) == 13 for node in with_cache(region, 24).region.graph.nodes if node.target is attend_cached)


def decoder(passes: str) -> tuple[nn.Module, CompiledModel]:
    torch.manual_seed(0)
    model = Decoder().eval()
    program = capture(model, (torch.randint(0, 40, (2, 6)),), {"input_ids": {0: "batch", 1: "tokens"}})
    return model, CompiledModel(sc.Pipeline.parse(passes).run(program, Context()))


@pytest.mark.slow
def test_a_language_model(tmp_path: Path) -> None:
    """Prompts and single tokens read the same blocks; longer than the table is refused."""
    dense, compiled = decoder("select_blocks(always=(SlidingWindow(window=3), Sinks(tokens=1)), block_q=4, block_k=4)")
    made = with_cache(compiled.program.regions[""], 24)
    assert made.longest == 24
    compiled.export(tmp_path / "out", cache=True, longest=24)
    exported = runner(tmp_path / "out").Model(tmp_path / "out")
    assert exported.manifest["symbols"]["capacity"] == [1, 24]
    ids = torch.randint(0, 40, (2, 9))
    expected = whole = ids
    with torch.no_grad():
        for _ in range(12):
            expected = torch.cat([expected, compiled(expected)[:, -1:].argmax(-1)], 1)
            whole = torch.cat([whole, dense(whole)[:, -1:].argmax(-1)], 1)
    assert exported.generate(ids.numpy(), 12).tolist() == expected[:, 9:].tolist()
    assert expected.tolist() != whole.tolist()
    if shutil.which("make") and shutil.which("g++"):
        program = build_example(tmp_path / "cpp", host())
        said = example(program, tmp_path / "out", {"input_ids": ids[:1]}, tmp_path, more=["--generate", "12"], text=True)
        assert said.splitlines()[1] == " ".join(map(str, expected[0, 9:].tolist()))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="how long a text is"):
        reader("select_blocks(always=(RandomBlocks(blocks=1, block=4),), block_q=4, block_k=4)").export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_pattern_of_one_length(tmp_path: Path) -> None:
    """What depends on the length is right where that is fixed; and below it may be dense for good."""
    for number, passes in enumerate(("select_blocks(always=(RandomBlocks(blocks=1, block=4),), block_q=4, block_k=4)",
                   "select_blocks(always=(SlidingWindow(window=6),), scorer=pooled, selector='top_k(share=0.5)', dense_below=500)")):
        compiled = reader(passes, dynamic=False)
        compiled.export(tmp_path / str(number))
        x, mask = torch.randn(2, 12, 32, dtype=torch.float32), torch.ones(2, 12, dtype=torch.bool)
        with torch.no_grad():
            expected = compiled(x, mask)
        found = runner(tmp_path / str(number)).Model(tmp_path / str(number)).run(x=x.numpy(), mask=mask.numpy())["output"]
        torch.testing.assert_close(torch.from_numpy(numpy.array(found)), expected, rtol=1e-4, atol=1e-5)


def test_grids() -> None:
    """A table is made for a text whose queries and keys are as many."""
    table, _ = table_of(Indexer.parse(WINDOW), 2, 64, True)
    assert table.shape == (1, 1, *(Grid(64, 64, 8, 8, True).visible().shape))
