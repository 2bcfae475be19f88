"""recalibrate_batchnorm against what training mode computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import zoo
from torch import Tensor, nn

from sparsify_compiler.call import instantiate
from sparsify_compiler.capture import capture
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.passes.prune.recalibrate_batchnorm import RecalibrateBatchnorm
from sparsify_compiler.passes.prune.remove_channels import RemoveChannels
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pipeline import Pipeline


def run(model: nn.Module, batches: list[Any] | None, example: Any, *before: Pass, relative: bool = False) -> tuple[nn.Module, Context]:
    ctx = Context(batches=batches)
    return instantiate(Pipeline((*before, RecalibrateBatchnorm(relative))).run(capture(model, example), ctx)), ctx


def trained_statistics(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of one batch in training mode, which takes the whole of it."""
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(**batch)
    return {name: tensor for name, tensor in model.state_dict().items() if "running" in name}


def test_the_statistics_are_those_that_training_mode_finds() -> None:
    model = zoo.efficientnet_lite()[0]
    inputs = {"x": torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    found, ctx = run(model, [inputs], inputs)
    assert ctx.rewrites == 13
    expected = trained_statistics(zoo.efficientnet_lite()[0], inputs)
    for name, tensor in found.state_dict().items():
        if "running" in name:
            assert torch.allclose(tensor, expected[name], rtol=1e-2, atol=1e-4), name  # it divides by n, and keeps what is divided by n - 1


def test_batches_count_by_their_rows() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(7, 3)
    example = (x[:2],)
    ctx = Context(batches=[(x[:2],), (x[2:],)])
    program = capture(model, example, {"input": {0: "batch"}})
    found = instantiate(Pipeline((RecalibrateBatchnorm(),)).run(program, ctx))
    hidden = model[0](x)
    assert torch.allclose(found.state_dict()["1.running_mean"], hidden.mean(0), atol=1e-6)
    assert torch.allclose(found.state_dict()["1.running_var"], hidden.var(0), atol=1e-6)


def test_one_row_has_no_variance() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    found, ctx = run(model, [(torch.randn(1, 3),)], (torch.randn(1, 3),))
    assert [miss.why for miss in ctx.misses] == ["fewer than two rows reached it: they have no variance"]
    assert torch.equal(found.state_dict()["1.running_var"], torch.ones(4))


def test_without_batches_or_norms() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(CalibrationError, match="calibration batches"):
        run(model, None, (torch.randn(2, 3),))
    _, ctx = run(nn.Linear(3, 4).eval(), None, (torch.randn(2, 3),))
    assert ctx.misses
    assert ctx.rewrites == 0


def test_relative_leaves_a_model_alone_that_nothing_was_done_to() -> None:
    model = zoo.efficientnet_lite()[0]
    inputs = {"x": 3 + torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
    found, ctx = run(model, [inputs], inputs, relative=True)
    assert ctx.rewrites == 13
    for name, tensor in model.state_dict().items():
        if "running" in name:
            assert torch.allclose(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-5), name


def test_relative_gives_each_norm_the_mean_and_deviation_that_it_gave_before() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).eval()
    model[1].running_mean.copy_(torch.randn(8))
    model[1].running_var.copy_(torch.rand(8) + 0.5)
    x = torch.randn(50, 6) + 1
    found, _ = run(model, [(x,)], (x,), MaskWeights("magnitude", density=0.5), relative=True)
    now, before = found(x), model(x)
    assert not torch.allclose(now, before, atol=0.1)
    assert torch.allclose(now.mean(0), before.mean(0), atol=1e-4)
    assert torch.allclose(now.std(0), before.std(0), rtol=1e-3)


def test_relative_where_a_channel_was_cut_or_never_moved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).eval()
    with torch.no_grad():
        model[0].weight[3] = 0
    x = torch.randn(50, 6)
    found, _ = run(model, [(x,)], (x,), MaskWeights("magnitude", density=0.5), relative=True)
    assert bool(found(x).isfinite().all())
    _, ctx = run(model, [(x,)], (x,), RemoveChannels("magnitude", density=0.5, targets=("neurons",), sides="all"), relative=True)
    assert any("other channels" in miss.why for miss in ctx.misses)


def test_statistics_that_two_norms_share_stay() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm).eval()
    _, ctx = run(model, [(torch.randn(5, 4),)], (torch.randn(5, 4),))
    assert ctx.rewrites == 0
    assert "read 2 times" in ctx.misses[0].why
