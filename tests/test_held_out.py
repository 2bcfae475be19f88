"""A budget of quality holds on batches that no pass has seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.held_out import split, upper
from sparsify_compiler.passes.prune.mask_weights import MaskWeights
from sparsify_compiler.quality import output_distance


@given(st.integers(0, 40))
def test_every_batch_is_on_one_side(count: int) -> None:
    fitted, held = split(range(count))
    if count < 2:
        assert fitted == held == list(range(count))
    else:
        assert sorted(fitted + held) == list(range(count))
        assert len(held) == (1 if count == 2 else max(count // 4, 2))
        assert fitted


def test_what_chance_adds_is_students() -> None:
    assert upper([0.3], [7]) == pytest.approx(0.3)
    assert upper([0.1, 0.1, 0.1], [1, 2, 3]) == pytest.approx(0.1)
    assert upper([0.1, 0.3], [1, 1]) == pytest.approx(0.2 + 3.0777 * 0.1, rel=1e-4)
    assert upper([0.1, 0.3], [3, 1]) < upper([0.1, 0.3], [1, 1])
    assert upper([0.1, float("nan")], [1, 1]) != upper([0.1, float("nan")], [1, 1])


class Net(nn.Module):
    """More inputs than calibration has rows, so that a repair fits them far better than others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(96, 96), nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(nn.functional.relu(self.first(x)))
        return y


def batches(seed: int, count: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(96, 96, generator=torch.Generator().manual_seed(9), dtype=torch.float32)
    return [(torch.randn(12, 96, generator=generator, dtype=torch.float32) @ mix,) for _ in range(count)]


def test_it_holds_on_other_batches_and_would_not_on_those_that_were_fitted() -> None:
    model, calibration, others = Net().eval(), batches(1, 8), batches(2, 40)
    recipe = MaskWeights("repair", repair="obs(damping=0.001)")
    options: dict[str, Any] = {"recipe": recipe, "calibration": calibration, "against": ("eager",)}
    compiled = sc.compile(model, calibration[0], budget=sc.Budget(quality_drop=0.05), **options)
    lost = 1 - output_distance(model, compiled, others)[0].cosine
    fitted, held = split(calibration)
    assert lost <= 0.05
    assert lost > 1.2 * (1 - output_distance(model, compiled, fitted)[0].cosine), "what was fitted says too little"
    report = compiled.report()
    assert min(site.density for site in report.sites) < 0.95
    assert report.quality[0].compiled == pytest.approx(output_distance(model, compiled, held)[0].cosine, abs=1e-5)
    assert not any("two or more" in text for text in report.warnings)
    (one,) = sc.compile(model, calibration[0], budget=sc.Budget(quality_drop=0.05), recipe=recipe, calibration=calibration[:1],
                        against=("eager",)).report().warnings
    assert "two or more" in one
