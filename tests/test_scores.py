"""Scores and the statistics that they ask for: their formulas written plainly, where they are gathered, and losses that are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from sparsify_compiler import catalog
from sparsify_compiler.calibrate import Calibration, calibrate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError, ParseError, SelectorError, StructureError, UnknownNameError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.scores.channel_share import channel_share
from sparsify_compiler.passes.prune.scores.gradient_times_weight import gradient_times_weight
from sparsify_compiler.passes.prune.scores.l2_rows import l2_rows
from sparsify_compiler.passes.prune.scores.magnitude import magnitude
from sparsify_compiler.passes.prune.scores.random import random
from sparsify_compiler.passes.prune.scores.relative_importance import relative_importance
from sparsify_compiler.passes.prune.scores.taylor import taylor
from sparsify_compiler.passes.prune.scores.weight_times_hidden_norm import weight_times_hidden_norm
from sparsify_compiler.passes.prune.scores.weight_times_input_norm import weight_times_input_norm
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.prune.structures.unstructured import Unstructured
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program, get_tensor
from sparsify_compiler.site_block import find_blocks

SCORES = [name for name in catalog.names("score") if name != "repair"]




def test_magnitude_and_random() -> None:
    weight = torch.randn(3, 4).bfloat16()
    assert torch.equal(magnitude(weight, {}, 0), weight.float().abs())
    assert torch.equal(random(weight, {}, 5), random(weight, {}, 5))
    assert not torch.equal(random(weight, {}, 5), random(weight, {}, 6))


def wanda_transcribed(weight: Tensor, batches: list[Tensor], sparsity: float, n: int = 0, m: int = 0) -> Tensor:
    """What is pruned: Wanda's published procedure (sample by sample running mean of squared norms; stable ascending sort), written plainly."""
    scaler_row, samples = torch.zeros(weight.shape[1]), 0
    for batch in batches:
        scaler_row *= samples / (samples + batch.shape[0])
        samples += batch.shape[0]
        scaler_row += torch.norm(batch.reshape(-1, batch.shape[-1]).t(), p=2, dim=1) ** 2 / samples
    metric = weight.abs() * torch.sqrt(scaler_row.reshape(1, -1))
    pruned = torch.zeros_like(metric, dtype=torch.bool)
    if n:
        for start in range(0, metric.shape[1], m):
            lowest = torch.topk(metric[:, start : start + m], n, dim=1, largest=False)[1]
            pruned.scatter_(1, start + lowest, True)
        return pruned
    order = torch.sort(metric, dim=-1, stable=True)[1]
    return pruned.scatter_(1, order[:, : int(metric.shape[1] * sparsity)], True)


@pytest.mark.parametrize("sparsity", [0.25, 0.3, 0.5, 0.75])
def test_wanda_masks_are_those_of_its_procedure(sparsity: float) -> None:
    torch.manual_seed(1)
    weight, batches = torch.randn(48, 96), [torch.randn(2, 7, 96) * torch.rand(96) for _ in range(3)]
    weight[3] = 0.0
    norm = torch.cat([b.reshape(-1, 96) for b in batches]).double().square().sum(0).sqrt().float()
    score = weight_times_input_norm(weight, {"input_norm": norm}, 0)
    assert torch.equal(~Unstructured("row").mask(score, 1 - sparsity), wanda_transcribed(weight, batches, sparsity))
    weight[3] = torch.randn(96)  # its topk leaves the order of equal scores open
    score = weight_times_input_norm(weight, {"input_norm": norm}, 0)
    assert torch.equal(~NM(2, 4).mask(score, 0.5), wanda_transcribed(weight, batches, 0.5, 2, 4))


def test_input_norms_of_a_grouped_convolution_belong_to_their_group() -> None:
    weight, norm = torch.ones(4, 2, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0])
    score = weight_times_input_norm(weight, {"input_norm": norm}, 0)
    assert score[:, :, 0, 0].tolist() == [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]

# --- the other formulas -----------------------------------------------------------------------------------------------------------------------


def given(weight: Tensor) -> dict[str, Tensor]:
    """Statistics of every name, for a weight of a layer that is no part of an FFN."""
    inputs = weight.shape[1]
    return {"input_norm": torch.rand(inputs) + 0.1, "hidden_norm": torch.zeros(0), "gradient": torch.randn(weight.shape),
            "gradient_square": torch.rand(weight.shape), "movement": torch.randn(weight.shape), "start": torch.randn(weight.shape),
            "correlation": torch.rand(weight.shape) * 2 - 1}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3), (1, 4), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_score_has_the_weights_shape_and_is_finite(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    weight[0] = 0  # dead rows and columns divide nothing by nothing
    weight[:, -1] = 0
    before = weight.clone()
    score = Named.parse("score", name)(weight, given(weight), 3)
    assert score.shape == weight.shape
    assert score.dtype in (torch.float32, torch.float64)
    assert name == "movement" or bool((score >= 0).all())  # what training moves towards zero scores below it
    assert bool(score.isfinite().all())
    assert torch.equal(weight, before)


def test_relative_importance_is_the_authors_formula() -> None:
    weight, norm = torch.randn(5, 7), torch.rand(7)
    size = weight.abs()
    expected = (size / size.sum(0) + size / size.sum(1).reshape(-1, 1)) * torch.sqrt(norm.reshape(1, -1).square()) ** 0.5
    torch.testing.assert_close(relative_importance(weight, {"input_norm": norm}, 0), expected)
    torch.testing.assert_close(relative_importance(weight, {"input_norm": norm}, 0, power=1.0), expected * norm**0.5)


def test_l2_of_rows_and_heads() -> None:
    weight = torch.randn(6, 5)
    torch.testing.assert_close(l2_rows(weight, {}, 0), weight.square().mean(1, keepdim=True).sqrt().expand(6, 5))
    heads = l2_rows(weight, {}, 0, size=3)
    torch.testing.assert_close(heads[:3], weight[:3].square().mean().sqrt().expand(3, 5))
    with pytest.raises(StructureError, match="do not divide"):
        l2_rows(weight, {}, 0, size=4)


def test_scores_with_options() -> None:
    assert Named.parse("score", "relative_importance(power=1)").options == {"power": 1}
    assert MaskWeights("relative_importance(power=0.25)").needs is not None
    pipeline = Pipeline.parse("mask_weights(score=relative_importance(power=0.25), budget=owl(outliers=7, spread=0.1))")
    assert pipeline == Pipeline((MaskWeights("relative_importance(power=0.25)", budget="owl(outliers=7, spread=0.1)"),))
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml()) == pipeline


@pytest.mark.parametrize(("text", "error", "words"), [
    ("relative_importance(powr=1)", ParseError, "did you mean power"), ("magnitude(power=1)", ParseError, "no option"),
    ("relative_importance(power=high)", ParseError, "must be a float"), ("l2_rows(size=1.5)", ParseError, "must be a int"),
    ("l2_rows(size=True)", ParseError, "must be a int"), ("relative_importanse", UnknownNameError, "relative_importance"),
    ("a b", ParseError, "cannot read"),
])
def test_wrong_options_of_scores(text: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MaskWeights(score=text)


# --- statistics beside the input's ------------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Two gated FFNs with a residual stream around them, and a head; `fused` makes gate and up one linear."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused, width = fused, 24 if fused else 12
        self.gate1, self.up1, self.down1 = nn.Linear(8, width), nn.Linear(8, 12), nn.Linear(12, 8)
        self.gate2, self.up2, self.down2 = nn.Linear(8, width), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def hidden(self, x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
        if self.fused:
            one, other = gate(x).chunk(2, -1)
            return silu(one) * other
        return silu(gate(x)) * up(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down1(self.hidden(x, self.gate1, self.up1))
        x = x + self.down2(self.hidden(x, self.gate2, self.up2))
        y: Tensor = self.head(x)
        return y


def made(fused: bool = False) -> tuple[Program, Gated, list[tuple[Tensor]]]:
    torch.manual_seed(3)
    model = Gated(fused).eval()
    batches = [(torch.randn(2, 6, 8),) for _ in range(3)]
    return capture(model, batches[0]), model, batches


def gather(program: Program, batches: Any, needs: Mapping[str, set[str]], **options: Any) -> Calibration:
    return calibrate(program, batches, {site: frozenset(names) for site, names in needs.items()}, **{"cache": False, **options})


@pytest.mark.parametrize("fused", [False, True])
def test_hidden_norms_are_those_of_what_up_and_gate_make(fused: bool) -> None:
    program, model, batches = made(fused)
    sites = ["gate1", "down1", "head"] if fused else ["gate1", "up1", "down1", "head"]
    found = gather(program, batches, {site: {"hidden_norm", "input_norm"} for site in sites})
    x = torch.cat([batch[0] for batch in batches])
    with torch.no_grad():
        expected = model.hidden(x, model.gate1, model.up1).reshape(-1, 12).norm(dim=0)
    for site in sites[:-2]:
        torch.testing.assert_close(found.get(site, "hidden_norm"), expected)
    torch.testing.assert_close(found.get("down1", "input_norm"), expected)
    assert found.get("down1", "hidden_norm").shape == found.get("head", "hidden_norm").shape == (0,)
    assert found.runs == 1
    weight = model.gate1.weight
    score = weight_times_hidden_norm(weight, {name: found.get("gate1", name) for name in ("hidden_norm", "input_norm")}, 0)
    torch.testing.assert_close(score, weight.detach().abs() * expected.sqrt().repeat(len(weight) // 12)[:, None])
    down = {name: found.get("down1", name) for name in ("hidden_norm", "input_norm")}
    assert torch.equal(weight_times_hidden_norm(model.down1.weight, down, 0), weight_times_input_norm(model.down1.weight, down, 0))


def test_dass_masks_are_those_of_its_procedure() -> None:
    """The authors' loops, written plainly: up and gate lose the lowest of every m outputs, down the lowest of every m inputs."""
    program, model, batches = made()
    ctx = Context(calibrate=lambda now, needs: calibrate(now, batches, needs, cache=False))
    after = Pipeline((MaskWeights("weight_times_hidden_norm", NM(2, 4, "outputs"), targets=("ffn:up", "ffn:gate")),)).run(program, ctx)
    with torch.no_grad():
        norm = model.hidden(torch.cat([b[0] for b in batches]), model.gate1, model.up1).reshape(-1, 12).square().sum(0)
    for name, weight in (("up1", model.up1.weight), ("gate1", model.gate1.weight)):
        metric = weight.detach().abs() * norm.reshape(-1, 1) ** 0.25
        pruned = torch.zeros_like(metric, dtype=torch.bool)
        for row in range(0, 12, 4):
            pruned.scatter_(0, row + metric[row : row + 4].topk(2, dim=0, largest=False)[1], True)
        assert torch.equal(get_tensor(after.regions[""].module, f"{name}.weight_mask"), ~pruned)
    assert after.decisions["down1"].density is None or after.decisions["down1"].density == 1
    whole = catalog.get("recipe", "dass")().run(program, ctx)
    masks = {str(n.target): get_tensor(r.module, str(n.target)) for r, n in whole.nodes() if str(n.target).endswith("_mask")}
    assert set(masks) == {f"{name}{i}.weight_mask" for name in ("gate", "up", "down") for i in (1, 2)}
    assert (masks["down1.weight_mask"].view(8, 3, 4).sum(2) == 2).all()


def test_roles_select_and_are_checked() -> None:
    program, _, _ = made()
    masked = Pipeline((MaskWeights(targets=("ffn:down",), density=0.5),)).run(program, Context())
    assert {site for site, row in masked.decisions.items() if row.density and row.density < 1} == {"down1", "down2"}
    with pytest.raises(SelectorError, match="no role 'downn'"):
        Pipeline((MaskWeights(targets=("ffn:downn",), density=0.5),)).run(program, Context())


def test_channel_shares_add_up_to_the_activation_norm() -> None:
    weight, norm = torch.randn(6, 4), torch.rand(4)
    torch.testing.assert_close(channel_share(weight, {"input_norm": norm, "hidden_norm": torch.zeros(0)}, 0).sum(0), norm)
    hidden = torch.rand(6)
    torch.testing.assert_close(channel_share(weight, {"input_norm": norm, "hidden_norm": hidden}, 0).sum(1), hidden)


def test_block_angles() -> None:
    program, model, batches = made()
    needs = {site: {"block_angle"} for site in ("gate1", "down1", "up2", "head")}
    found = gather(program, batches, needs)
    x = torch.cat([batch[0] for batch in batches])
    with torch.no_grad():
        one = x + model.down1(model.hidden(x, model.gate1, model.up1))
        two = one + model.down2(model.hidden(one, model.gate2, model.up2))
    for site, before, after in (("gate1", x, one), ("down1", x, one), ("up2", one, two)):
        a, b = before.reshape(-1, 8), after.reshape(-1, 8)
        expected = torch.arccos((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean() / torch.pi
        torch.testing.assert_close(found.get(site, "block_angle"), expected, rtol=1e-4, atol=1e-6)
    assert float(found.get("head", "block_angle")) == 0


def test_the_angle_of_images_is_between_their_channels() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.conv(x)
            return y

    model, x = Residual().eval(), torch.randn(2, 3, 5, 7)
    found = gather(capture(model, (x,)), [(x,)], {"conv": {"block_angle"}}).get("conv", "block_angle")
    with torch.no_grad():
        cosine = torch.nn.functional.cosine_similarity(x, model(x), dim=1)
    torch.testing.assert_close(found, cosine.arccos().mean() / torch.pi, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "count"), [("llama", 2), ("bert", 2), ("vit", 2), ("gpt2", 2), ("whisper", 4), ("efficientnet_lite", 2)])
def test_blocks_are_the_layers_of_the_model(name: str, count: int) -> None:
    model, inputs, _ = getattr(zoo, name)()
    program = capture(model, inputs)
    blocks = find_blocks(program)
    assert len({block.path for block in blocks}) == len(blocks)
    assert len(blocks) == count, [block.path for block in blocks]
    for one, other in pairwise(blocks):
        assert not one.ops & other.ops


# --- gradients --------------------------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_autograd() -> None:
    program, model, batches = made()
    needs = {site: {"gradient", "gradient_square", "input_norm"} for site in ("up1", "head")}
    found = gather(program, batches, needs)
    sums = {site: [torch.zeros_like(module.weight), torch.zeros_like(module.weight)] for site, module in (("up1", model.up1), ("head", model.head))}
    for (x,) in batches:
        model.zero_grad()
        model(x).square().mean().backward()
        for site, total in sums.items():
            gradient = model.get_submodule(site).weight.grad
            assert isinstance(gradient, Tensor)
            total[0] += gradient
            total[1] += gradient.square()
    for site, (one, squares) in sums.items():
        torch.testing.assert_close(found.get(site, "gradient"), one)
        torch.testing.assert_close(found.get(site, "gradient_square"), squares)
        weight = model.get_submodule(site).weight.detach()
        torch.testing.assert_close(gradient_times_weight(weight, {"gradient": one}, 0), (one * weight).abs())
        torch.testing.assert_close(taylor(weight, {"gradient_square": squares}, 0), squares * weight.square())
    assert found.runs == 1
    x = torch.cat([b[0] for b in batches]).reshape(-1, 8)
    torch.testing.assert_close(found.get("up1", "input_norm"), x.norm(dim=0))
    assert not torch.is_grad_enabled() or all(not t.requires_grad for t in found._results[0].values())


def test_a_loss_of_ones_own() -> None:
    program, model, batches = made()
    labelled = [(x, torch.zeros(2, dtype=torch.long)) for (x,) in batches]

    def loss(output: Tensor, batch: Any) -> Tensor:
        return cross_entropy(output[:, 0], torch.ones(len(batch[0]), dtype=torch.long))

    found = gather(program, batches, {"head": {"gradient"}}, loss=loss)
    model.zero_grad()
    sum(loss(model(x), (x, y)) for x, y in labelled).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(found.get("head", "gradient"), model.head.weight.grad)


def test_language_models_predict_the_next_token() -> None:
    model, inputs, _ = zoo.llama()
    program = capture(model, inputs)
    site = "model.layers.0.mlp.up_proj"
    found = gather(program, [inputs], {site: {"gradient"}})
    model.zero_grad()
    with torch.enable_grad():
        logits = model(**inputs).logits
    target = inputs["input_ids"][:, 1:].clone()
    target[inputs["attention_mask"][:, 1:] == 0] = -100
    cross_entropy(logits[:, :-1].flatten(0, 1), target.flatten()).backward()
    torch.testing.assert_close(found.get(site, "gradient"), model.get_submodule(site).weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("loss", "words"), [
    (lambda output, batch: output, "must be one number"), (lambda output, batch: 3.0, "must be one number, got float"),
    (lambda output, batch: torch.tensor(1.0), "does not depend on the weights"), (lambda output, batch: output.sum() * float("nan"), "NaN"),
])
def test_wrong_losses(loss: Callable[..., Any], words: str) -> None:
    program, _, batches = made()
    with pytest.raises(CalibrationError, match=words):
        gather(program, batches, {"head": {"gradient"}}, loss=loss)


def test_gradients_are_gathered_within_the_memory_that_is_allowed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(600, 600) for _ in range(3))).eval()
    batch = (torch.randn(4, 600),)
    program, needs = capture(model, batch), {str(i): {"gradient"} for i in range(3)}
    found = gather(program, [batch], needs, max_bytes=600 * 600 * 4)
    whole = gather(program, [batch], needs, cache=tmp_path)
    for i in range(3):
        assert torch.equal(found.get(str(i), "gradient"), whole.get(str(i), "gradient"))
    assert (found.runs, whole.runs) == (3, 1)
    assert gather(program, [batch], needs, cache=tmp_path).runs == 0
    own = gather(program, [batch], needs, cache=tmp_path, loss=lambda output, batch: output.sum())
    assert own.runs == 1, "a loss of one's own is no part of the fingerprint"
    assert all(not p.requires_grad or p.grad is None for p in model.parameters())


def test_gradients_under_inference_mode_and_in_half_precision() -> None:
    program, _, batches = made()
    expected = gather(program, batches, {"up1": {"gradient"}}).get("up1", "gradient")
    with torch.inference_mode():
        found = gather(program, [(x.clone(),) for (x,) in batches], {"up1": {"gradient"}}).get("up1", "gradient")
    assert torch.equal(found, expected)
    half = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).bfloat16().eval()
    x = torch.ones(2, 4).bfloat16()
    assert gather(capture(half, (x,)), [(x,)], {"0": {"gradient"}}).get("0", "gradient").dtype == torch.float32


@pytest.mark.parametrize("recipe", ["ria", "plug_and_play", "dass", "owl(density=0.5)", "cfsp(density=0.5)", "snip(density=0.5)",
                                    "taylor_rows(density=0.5, size=4)", "venom(v=4, m=12, targets=('ffn',))", "sten(targets=('ffn',))",
                                    "essential_sparsity(density=0.5)", "channel_permutations"])
def test_recipes_on_a_decoder(recipe: str) -> None:
    model, inputs, _ = zoo.llama()
    ctx = Context(density=0.5, calibrate=lambda now, needs: calibrate(now, [inputs], needs, cache=False))
    program = capture(model, inputs)
    after = Pipeline.parse(recipe).run(program, ctx)
    rows = [row for row in after.decisions.values() if row.density is not None and 0 < row.density < 1]
    assert len(rows) >= 2
    wanted = 1 / 6 if recipe.startswith("venom") else 0.5
    sizes = [math.prod(row.shape) for row in rows]
    found = sum(s * float(row.density or 0) for s, row in zip(sizes, rows, strict=True)) / sum(sizes)
    assert found == pytest.approx(wanted, abs=0.06)  # 5 of 9 runs of rows are more than half
