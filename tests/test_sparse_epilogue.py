"""What follows a sparse linear layer is computed by its kernel: bias, + residual, activation, in one call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_help import longest_first, needs_tiles
from torch import Tensor, nn
from torch.nn.utils import prune

import sparsify_compiler as sc
from sparsify_compiler.passes.lower import lower
from sparsify_compiler.passes.prune.structures._base import Structure


class Block(nn.Module):
    """An FFN with a residual, and one whose sum is activated."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(256, 1024), nn.Linear(1024, 256), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return torch.relu(self.last(x) + x)


@needs_tiles
def test_a_sparse_layer_takes_what_follows_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower, "round_robin", longest_first)
    torch.manual_seed(0)
    model = Block().eval()
    for layer in (model.up, model.down, model.last):
        prune.custom_from_mask(layer, "weight", Structure.parse("32x1").mask(torch.rand_like(layer.weight), 0.1))
    model, x = model.bfloat16(), torch.randn(2, 64, 256).bfloat16()
    compiled = sc.compile(model, (x,), recipe=sc.Pipeline.parse("pack() | lower()"))
    kernels = {row.site: row.kernel for row in compiled.report().sites}
    assert kernels == {name: f"bsr_amx_r32{after}" for name, after in (("up", " + gelu"), ("down", " + add"), ("last", " + add + relu"))}
    got, want = compiled(x), model(x)
    torch.testing.assert_close(got, want, rtol=3e-2, atol=5e-2)
    compiled.save(tmp_path / "block")
    assert torch.equal(sc.load(tmp_path / "block")(x), got)
