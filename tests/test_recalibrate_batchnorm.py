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
from sparsify_compiler.passes.prune.recalibrate_batchnorm import RecalibrateBatchnorm
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline


def run(model: nn.Module, batches: list[Any] | None, example: Any) -> tuple[nn.Module, Context]:
    ctx = Context(batches=batches)
    return instantiate(Pipeline((RecalibrateBatchnorm(),)).run(capture(model, example), ctx)), ctx


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
    assert [miss.why for miss in ctx.misses] == ["1 rows reached it: they have no variance"]
    assert torch.equal(found.state_dict()["1.running_var"], torch.ones(4))


def test_without_batches_or_norms() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    with pytest.raises(CalibrationError, match="calibration batches"):
        run(model, None, (torch.randn(2, 3),))
    _, ctx = run(nn.Linear(3, 4).eval(), None, (torch.randn(2, 3),))
    assert ctx.misses
    assert ctx.rewrites == 0


def test_statistics_that_two_norms_share_stay() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), norm).eval()
    _, ctx = run(model, [(torch.randn(5, 4),)], (torch.randn(5, 4),))
    assert ctx.rewrites == 0
    assert "read 2 times" in ctx.misses[0].why
