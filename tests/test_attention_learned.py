"""What indexers and branches of attention learn: by distillation from calibration batches, or in the user's own training; and that it is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models.language import llama
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.artefact import load
from sparsify_compiler.artefact_skeleton import attention_tensors
from sparsify_compiler.artefact_tensors import TensorSource
from sparsify_compiler.block_grid import Grid
from sparsify_compiler.capture import capture
from sparsify_compiler.compiled import CompiledModel
from sparsify_compiler.errors import ArtefactError
from sparsify_compiler.named import Named
from sparsify_compiler.ops import attend
from sparsify_compiler.passes.attention.scorers import gate
from sparsify_compiler.passes.attention.scorers._distil import Sample, distilled
from sparsify_compiler.passes.attention.select_blocks import Attention
from sparsify_compiler.passes.train import move_centroids
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program

GATE = "select_blocks(always=(Windows(size=4),), scorer='gate(epochs=4)', selector='top_k(share=0.4)', block_q=4, block_k=4)"
DYNAMIC = {"input_ids": {0: "batch", 1: "tokens"}}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


@pytest.mark.parametrize("masked", [False, True])
def test_the_gate_scores_what_a_loop_over_blocks_says(masked: bool) -> None:
    """By hand, beside the authors' AttnGate (microsoft/SeerAttention, means of queries; largest, least and mean keys; no positions): within 9e-7."""
    query, key, of_query, of_key = random(2, 4, 10, 3), random(2, 2, 14, 3, seed=1), random(4, 3, 3, seed=2), random(2, 9, 3, seed=3)
    mask = torch.arange(14).expand(2, 14) >= torch.tensor([[0], [5]]) if masked else None
    found = Named.parse("block scorer", "gate")(query, key, mask, Grid(10, 14, 4, 4, True), 0.7, of_query, of_key)
    for b in range(2):
        for h in range(4):
            for i in range(3):
                rows = [r for r in range(4 * i, min(4 * i + 4, 10)) if mask is None or mask[b, r + 4]]
                for j in range(4):
                    keys = [k for k in range(4 * j, min(4 * j + 4, 14)) if mask is None or mask[b, k]]
                    if keys and rows:
                        block = key[b, h // 2, keys]
                        pooled = torch.cat((block.amax(0), block.amin(0), block.mean(0))) @ of_key[h // 2]
                        expected = 0.7 * query[b, h, rows].mean(0) @ of_query[h] @ pooled
                        torch.testing.assert_close(found[b, h, i, j], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_what_the_gate_learns_from_is_the_largest_share_of_each_block(causal: bool) -> None:
    query, key = random(1, 4, 10, 3), random(1, 2, 10, 3, seed=1)
    sample, = gate.observe(query, key, None, Grid(10, 10, 4, 4, causal), 0.7)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    shares = torch.softmax(scores.masked_fill(torch.ones(10, 10, dtype=torch.bool).triu(1), -math.inf) if causal else scores, -1)
    largest = torch.stack([torch.stack([shares[..., i:i + 4, j:j + 4].amax((-2, -1)) for j in (0, 4, 8)], -1) for i in (0, 4, 8)], -2)
    torch.testing.assert_close(sample.wanted, largest / largest.sum(-1, keepdim=True))


def drawn(rows: int) -> tuple[Sample, ...]:
    """Samples whose shares are those of a gate that nobody knows."""
    visible = torch.ones(rows, 6, dtype=torch.bool)
    made = []
    for seed in range(3):
        query, key = random(1, 2, rows, 4, seed=seed), random(1, 1, 6, 12, seed=seed + 10)
        wanted = torch.softmax(gate.scored(query, key, 0.5 * random(2, 4, 4, seed=20), random(1, 12, 4, seed=21)), -1)
        made.append(Sample(query, key, wanted, visible))
    return tuple(made)


def divergence(samples: tuple[Sample, ...], tensors: Any) -> float:
    said = [torch.log_softmax(gate.scored(s.query, s.key, *tensors), -1) for s in samples]
    return sum(float((s.wanted * (s.wanted.log() - log)).sum(-1).mean()) for s, log in zip(samples, said, strict=True))


def test_distilling_comes_nearer_and_never_further() -> None:
    samples, start = drawn(40), gate.learn(drawn(40), epochs=0)[1]
    learned = gate.learn(samples, epochs=100)[1]
    assert divergence(samples, learned.values()) < 0.7 * divergence(samples, start.values())
    again = gate.learn(samples, epochs=100)[1]
    assert all(torch.equal(learned[name], again[name]) for name in gate.LEARNED)
    truth = (0.5 * random(2, 4, 4, seed=20), random(1, 12, 4, seed=21))
    kept = distilled(gate.scored, samples, truth, 3)
    assert all(torch.equal(a, b) for a, b in zip(kept, truth, strict=True))  # nothing is better than the truth


def rewritten(text: str, model: nn.Module, batch: Any, dynamic: Any = None) -> Program:
    return Pipeline.parse(text).run(capture(model, batch, dynamic), Context(batches=[batch] if isinstance(batch, dict) else [batch, batch]))


def test_a_gate_is_saved_with_a_graph(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 40, 16)
    program = rewritten(GATE, model, (x,))
    node = next(node for _, node in program.nodes() if node.target is attend.op)
    assert len(node.kwargs["learned"]) == 2
    compiled = CompiledModel(program)
    compiled.save(tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(x), compiled(x))
    assert not torch.allclose(compiled(x), model(x), atol=1e-4)
    every = rewritten(GATE.replace("0.4", "1.0"), model, (x,))
    torch.testing.assert_close(CompiledModel(every)(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_gate_is_saved_with_attention_that_stays_python(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model, batch = llama(), {"input_ids": torch.randint(1, 96, (2, 24))}
    program = rewritten(GATE, model, batch, DYNAMIC)
    assert {path: sorted(tensors) for path, tensors in program.learned.items()} == {
        f"model.layers.{i}.self_attn": ["gate_key", "gate_query"] for i in (0, 1)}
    compiled = CompiledModel(program)
    tokens = compiled.generate(batch["input_ids"], max_new_tokens=3, do_sample=False)
    compiled.save(tmp_path / "out")
    again = sc.load(tmp_path / "out", model=llama())
    assert torch.equal(again.generate(batch["input_ids"], max_new_tokens=3, do_sample=False), tokens)
    assert not any("sparsify" in name for name in model.state_dict())
    with pytest.raises(ArtefactError, match="learned is not there"):
        attention_tensors({"attentions": program.attentions, "learned": {}}, TensorSource({}))


def test_centroids_follow_what_is_nearest_while_a_model_trains() -> None:
    model, x = move_centroids.example()
    module, hook = sc.attach(model, x, "move_centroids(decay=0.75)")
    centroids = dict(module.named_buffers())["centroids"]
    before = centroids.clone()
    assert torch.equal(before, model.centroids)
    hook.step()
    assert torch.equal(centroids, before)  # nothing went by yet
    module(*x)
    assert torch.equal(centroids, before)
    hook.step()
    q, k, _ = model.qkv(x[0]).view(1, 24, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    for head in range(2):
        rows = nn.functional.normalize(torch.cat((q[0, head], k[0, head])), dim=-1)
        which = (rows @ before[head].T).argmax(-1)
        for c in range(3):
            own = rows[which == c]
            mean = nn.functional.normalize(own.sum(0), dim=0)
            expected = nn.functional.normalize(0.75 * before[head, c] + 0.25 * mean, dim=0) if len(own) else before[head, c]
            torch.testing.assert_close(centroids[head, c], expected, rtol=1e-4, atol=1e-5)
