"""rotate_stream and what is cut behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, nn

from sparsify_compiler import recipes
from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, ModelError, ParseError
from sparsify_compiler.instruments import SameNumbers, Verify
from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.passes.reparam.fold_norm_affine import FoldNormAffine
from sparsify_compiler.passes.reparam.layernorm_to_rmsnorm import LayernormToRmsnorm
from sparsify_compiler.passes.reparam.rotate_stream import RotateStream
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.preserves import outputs
from sparsify_compiler.program import Program


def run(pipeline: Any, program: Program, inputs: Any, batches: bool = True) -> tuple[Program, Context]:
    ctx = Context(example_inputs=inputs, batches=[inputs])
    if batches:
        ctx.calibrate = lambda now, needs: calibrate(now, [inputs], needs, cache=False)
    return Pipeline(pipeline).run(program, ctx, (Verify(), SameNumbers())), ctx


@pytest.mark.parametrize("share", [0, 1, 2])
@pytest.mark.parametrize("untie", [False, True])
def test_a_language_model_says_the_same_in_its_new_bases(share: int, untie: bool) -> None:
    _, inputs, program = zoo.captured("llama")
    rotated, ctx = run((FoldNormAffine(untie), RotateStream(share, untie=untie)), program, inputs)
    assert ctx.rewrites > 0
    tied = {id(t) for name, t in instantiate(rotated).named_parameters() if t.shape == (100, 36)}
    assert len(tied) == (2 if untie else 1)


@pytest.mark.parametrize("share", [0, 1, 2])
def test_weights_become_orthogonal_and_the_model_says_the_same(share: int) -> None:
    """WINA's transformation: without calibration, and with share=1 each key projection has orthogonal columns, longest first."""
    _, inputs, program = zoo.captured("llama")
    step = RotateStream(share, basis="weights", readers=("attention:k", "ffn:gate"))
    rotated, ctx = run((FoldNormAffine(), step), program, inputs, batches=False)
    assert ctx.rewrites > 0
    assert Pipeline.parse(str(step)).passes == (step,)
    found = {name: t.detach().double() for name, t in instantiate(rotated).named_parameters() if "layers.1.self_attn.k_proj" in name}
    weight, = found.values()
    gram = weight.T @ weight
    apart = float((gram - gram.diag().diag()).norm() / gram.norm())
    if share == 1:
        assert apart < 1e-5
        assert bool((gram.diag().diff() <= 1e-6).all())
    else:
        assert apart > 1e-2  # one basis for several layers cannot suit each


@pytest.mark.parametrize("untie", [False, True])
def test_features_are_sorted_and_the_last_are_cut(untie: bool) -> None:
    _, inputs, program = zoo.captured("llama")
    sliced, _ = run(recipes.slicegpt(0.75, untie=untie, multiple=1).passes, program, inputs)
    sizes = {name: tuple(t.shape) for name, t in instantiate(sliced).named_parameters()}
    assert {s for name, s in sizes.items() if "layers.1.self_attn.q_proj" in name} == {(36, 27)}
    assert {s for name, s in sizes.items() if "layers.1.mlp.down_proj" in name} == {(27, 96)}
    assert [s for name, s in sizes.items() if "embed_tokens" in name] == [(100, 27 if untie else 36)]


def test_more_features_say_it_better() -> None:
    _, small, program = zoo.captured("llama")
    ids = torch.randint(5, 100, (8, 16), generator=torch.Generator().manual_seed(1))  # more tokens than features
    inputs = {**small, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dense = outputs(program, inputs)[0]
    errors = []
    for density in (0.5, 0.8, 0.95):
        sliced, _ = run(recipes.slicegpt(density, multiple=1).passes, program, inputs)
        errors.append(float((outputs(sliced, inputs)[0] - dense).norm() / dense.norm()))
    assert errors[0] > errors[1] > errors[2]


def test_what_lies_in_a_few_directions_is_kept_whole() -> None:
    """A stream of rank 4 in 8 features loses nothing when 4 are cut: the norm still divides by the root of all 8."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.inside = nn.Embedding(9, 8), nn.Linear(8, 8)
            self.up, self.out = nn.Linear(8, 12), nn.Linear(8, 5)
            with torch.no_grad():
                space = torch.linalg.qr(torch.randn(8, 4))[0]
                self.tokens.weight.copy_(torch.randn(9, 4) @ space.T)
                self.inside.weight.copy_(space @ torch.randn(4, 8))
                self.inside.bias.copy_(space @ torch.randn(4))

        def forward(self, ids: Tensor) -> Tensor:
            h = self.tokens(ids)
            h = h + self.inside(nn.functional.rms_norm(h, (8,), eps=1e-3))
            y: Tensor = self.out(nn.functional.rms_norm(h, (8,), eps=1e-3))
            return y

    torch.manual_seed(0)
    model, inputs = Narrow().eval(), (torch.arange(9)[None],)
    program = capture(model, inputs)
    sliced, _ = run(recipes.slicegpt(0.5, untie=True, multiple=1).passes, program, inputs)
    assert torch.allclose(outputs(sliced, inputs)[0], outputs(program, inputs)[0], atol=1e-4)
    assert {t.shape[-1] for name, t in instantiate(sliced).named_parameters() if "weight" in name} == {4}


def test_a_token_of_large_norm_stays() -> None:
    """Four directions hold two tokens each, a fifth one token of norm 100: that one is kept, as in the paper, whose PCA is of the stream itself."""

    class Few(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.up, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 5)
            with torch.no_grad():
                self.tokens.weight.copy_(torch.eye(8)[[0, 0, 1, 1, 2, 2, 3, 3, 4]])
                self.tokens.weight[8] *= 100

        def forward(self, ids: Tensor) -> Tensor:
            h = self.tokens(ids)
            h = h + 1e-3 * self.up(nn.functional.rms_norm(h, (8,)))
            y: Tensor = self.out(nn.functional.rms_norm(h, (8,)))
            return y

    torch.manual_seed(0)
    model, inputs = Few().eval(), (torch.arange(9)[None],)
    program = capture(model, inputs)
    sliced, _ = run(recipes.slicegpt(0.5, untie=True, multiple=1).passes, program, inputs)
    dense, found = outputs(program, inputs)[0], outputs(sliced, inputs)[0]
    assert torch.allclose(found[0, 8], dense[0, 8], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["gpt2", "whisper"])
def test_a_transformer_with_layer_norms(name: str) -> None:
    _, inputs, program = zoo.captured(name)
    made, ctx = run((LayernormToRmsnorm(), FoldNormAffine(), RotateStream()), program, inputs)
    assert "by rotate_stream" in made.text(), ctx.misses


def test_refusals() -> None:
    _, inputs, cached = zoo.captured("llama_cached")
    ctx = Context()
    Pipeline((RotateStream(),)).run(cached, ctx)
    assert ctx.misses
    with pytest.raises(ModelError, match="eager Python"):
        run((RemoveChannels("leading", density=0.5, targets=("stream",)),), cached, inputs)
    _, inputs, program = zoo.captured("llama")
    with pytest.raises(CalibrationError, match="principal components"):
        run((FoldNormAffine(), RotateStream()), program, inputs, batches=False)
    with pytest.raises(ParseError):
        RotateStream(share=-1)
    with pytest.raises(ParseError, match="basis"):
        RotateStream(basis="outputs")  # type: ignore[arg-type]
    _, inputs, bert = zoo.captured("bert")
    _, ctx = run((RotateStream(),), bert, inputs)
    assert "layernorm_to_rmsnorm" in ctx.misses[0].why
