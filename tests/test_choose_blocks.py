"""Choices that calibration makes: of every head, and of a scorer's channels; in graphs and in attentions that stay eager Python."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models.language import llama
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.attention_taps import with_taps
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import CalibrationError, SparsifyError
from sparsify_compiler.indexer import Indexer
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention._sites import attention_sites
from sparsify_compiler.passes.attention.choose_blocks import by_quota, within
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

transformers = pytest.importorskip("transformers")

NEAR = "Indexer(always=(SlidingWindow(window=4),), block_q=4, block_k=4)"
FAR = "Indexer(always=(Windows(size=4),), scorer=sampled_rows, selector='top_k(share=0.3, blocks=2)', block_q=4, block_k=4)"


class TwoHeads(nn.Module):
    """Head 0 attends to the token before, head 1 to the first ones."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    place = torch.arange(32, dtype=torch.float32)
    near = torch.stack((torch.cos(place * 0.1), torch.sin(place * 0.1)), -1) * 20
    q = torch.stack((near, torch.ones(32, 2, dtype=torch.float32)))
    k = torch.stack((near, torch.where(place < 4, 20.0, 0.0)[:, None].expand(32, 2)))
    return q[None], k[None], torch.randn(1, 2, 32, 3, dtype=torch.float32)


def run(text: str, model: nn.Module, batch: tuple[Tensor, ...] | dict[str, Tensor], dynamic: Any = None) -> Program:
    return Pipeline.parse(text).run(capture(model, batch, dynamic), Context(batches=[batch]))


def indexer_of(program: Program) -> Indexer:
    return Indexer.parse(next(str(node.kwargs["indexer"]) for _, node in program.nodes() if node.target is attend.op))


@pytest.mark.parametrize("options", ["", ", share=0.7", ", quotas=(0.5, 0.5)"])
def test_every_head_gets_what_fits_it(options: str) -> None:
    batch = inputs()
    program = run(f"choose_blocks(choices=({NEAR}, {FAR}){options})", TwoHeads().eval(), batch)
    indexer = indexer_of(program)
    assert indexer.heads == ((1,),)
    assert indexer.always == Indexer.parse(NEAR).always
    assert indexer.choices == (Indexer.parse(FAR),)
    found = CompiledModel(program)(*batch)
    torch.testing.assert_close(found, TwoHeads()(*batch), rtol=0.05, atol=0.05)


def test_one_choice_for_all_needs_no_heads() -> None:
    indexer = indexer_of(run(f"choose_blocks(choices=({NEAR}, {FAR}), quotas=(1.0, 0.0), dense_below=8)", TwoHeads().eval(), inputs()))
    assert indexer == Indexer.parse(NEAR[:-1] + ", dense_below=8, dense_below_decoding=8)")


def test_within_is_the_best_but_for_a_head() -> None:
    torch.manual_seed(1)
    loss, density = torch.rand(6, 3, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64)
    for share in (0.2, 0.4, 0.6, None):
        chosen = within(loss, density, share)
        every = [torch.tensor(way) for way in product(range(3), repeat=6)]
        allowed = [way for way in every if share is None or density.gather(1, way[:, None]).mean() <= share]
        best = min((float(loss.gather(1, way[:, None]).sum()) for way in allowed), default=None)
        if best is None:
            assert torch.equal(chosen, density.argmin(1))
        else:
            assert any(torch.equal(way, chosen) for way in allowed)
            assert float(loss.gather(1, chosen[:, None]).sum()) <= best + float((loss.amax(1) - loss.amin(1)).max())


def test_quotas_are_kept() -> None:
    torch.manual_seed(1)
    loss = torch.rand(10, 3, dtype=torch.float64)
    assert torch.bincount(by_quota(loss, (0.5, 0.2, 0.3)), minlength=3).tolist() == [5, 2, 3]
    two = by_quota(loss[:, :2], (0.5, 0.5))
    gain = loss[:, 0] - loss[:, 1]
    assert sorted(gain.topk(5).indices.tolist()) == two.nonzero()[:, 0].tolist()


def test_a_scorer_learns_its_channels() -> None:
    model, batch = llama(), {"input_ids": torch.randint(1, 96, (2, 24))}
    text = "select_blocks(always=(Windows(size=4),), scorer='channels(number=3)', selector='top_k(share=0.5)', block_q=4, block_k=4)"
    program = run(text, model, batch, {"input_ids": {0: "batch", 1: "tokens"}})
    texts = list(program.attentions.values())
    assert len(texts) == 2
    assert texts[0] != texts[1]
    kept = Indexer.parse(texts[0]).scorer
    assert kept.startswith("channels(number=3, kept=((")
    assert len(Indexer.parse(texts[0]).scorer.split("kept=")[1].split("), (")) == 4
    CompiledModel(program).generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
    seen: dict[str, Tensor] = {}

    def watch(path: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
        sums = torch.stack([(query[:, h, :, None].abs() * key[:, h // 2, None].abs()).sum((0, 1, 2)) for h in range(4)])
        seen[path] = sums.topk(3).indices.sort().values
        return attend.dense(query, key, value, mask, is_causal=causal, scale=scale)

    captured = capture(model, batch)
    ctx = Context()
    tapped = with_taps(captured, attention_sites(captured, ctx, ("attention",), ()), watch)
    with torch.no_grad():
        torch.testing.assert_close(tapped(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
    for path, text in program.attentions.items():
        assert str(tuple(map(tuple, seen[path].tolist()))) in text
    assert not captured.attentions


def test_what_calibration_needs_and_choices_that_cannot_be() -> None:
    captured = capture(TwoHeads().eval(), inputs())
    for text in (f"choose_blocks(choices=({NEAR},))", "select_blocks(scorer=channels, selector=top_k)"):
        with pytest.raises(CalibrationError, match="calibration batches"):
            Pipeline.parse(text).run(captured, Context())
    for options, message in (("choices=()", "choices are indexers"), (f"choices=({NEAR},), quotas=(0.5, 0.5)", "quotas"),
                             (f"choices=({NEAR},), share=0.0", "share"), (f"choices=({NEAR}, {NEAR.replace('4)', '8)')})", "no choice")):
        with pytest.raises(SparsifyError, match=message):
            Pipeline.parse(f"choose_blocks({options})")


def test_a_choice_is_described_and_generates_as_saved(tmp_path: Path) -> None:
    model, prompt = llama(), {"input_ids": torch.randint(1, 96, (1, 20))}
    program = run(f"choose_blocks(choices=({NEAR}, {FAR}), quotas=(0.5, 0.5))", model, prompt, {"input_ids": {0: "batch", 1: "tokens"}})
    described = {part.partition(" heads: ")[2] or part for row in program.decisions.values() for part in row.structure.split("; ")}
    assert described == {"SlidingWindow(window=4)", "Windows(size=4) | top_k(share=0.3, blocks=2) of sampled_rows"}
    compiled = CompiledModel(program)
    compiled.save(tmp_path / "out")
    again = sc.load(tmp_path / "out", model=llama())
    tokens = compiled.generate(prompt["input_ids"], max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(prompt["input_ids"], max_new_tokens=4, do_sample=False), tokens)
