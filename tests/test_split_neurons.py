"""split_neurons and ffsplit."""

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
from sparsify_compiler.errors import ParseError
from sparsify_compiler.instruments import SameNumbers, Verify
from sparsify_compiler.passes.prune.split_neurons import SplitNeurons
from sparsify_compiler.passes_api import Context
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program
from sparsify_compiler.sites import find_sites


def run(passes: Any, program: Program, inputs: Any) -> tuple[Program, Context]:
    ctx = Context(example_inputs=inputs)
    ctx.calibrate = lambda now, needs: calibrate(now, [inputs], needs, cache=False)
    return Pipeline(passes).run(program, ctx, (Verify(), SameNumbers())), ctx


@pytest.mark.parametrize("name", ["bert", "llama", "mpnet"])
def test_an_ffn_is_the_sum_of_its_parts(name: str) -> None:
    _, inputs, program = zoo.captured(name)
    split, ctx = run((SplitNeurons(0.25),), program, inputs)
    assert ctx.rewrites == 2
    sizes = [site.facts["hidden"] for site in find_sites(split, ("ffn",))]
    assert sorted(sizes) == [24, 24, 72, 72]


def test_the_heavy_part_holds_the_neurons_that_add_most() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), (torch.randn(16, 4),)
    with torch.no_grad():
        model[2].weight[:, [1, 6]] *= 100
    split, _ = run((SplitNeurons(0.25),), capture(model, inputs), inputs)
    found = dict(instantiate(split).named_parameters())
    assert torch.equal(found["0.heavy.weight_folded"], model[0].weight[[1, 6]])
    assert torch.equal(found["2.rest.weight_folded"], model[2].weight[:, [0, 2, 3, 4, 5, 7]])


def test_only_the_rest_is_cut() -> None:
    _, inputs, program = zoo.captured("llama")
    cut, _ = run(recipes.ffsplit(0.25, "2:4").passes, program, inputs)
    rows = {row.site: row.density for row in cut.decisions.values() if row.structure != "dense"}
    assert rows
    assert all(site.endswith(".rest") and density == 0.5 for site, density in rows.items())


def test_what_stays_says_why() -> None:
    class Coupled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.act = nn.Linear(4, 8), nn.Linear(8, 4), nn.PReLU(8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.down(self.act(self.up(x)))
            return y

    inputs = (torch.randn(3, 4),)
    _, ctx = run((SplitNeurons(),), capture(Coupled().eval(), inputs), inputs)
    assert ctx.rewrites == 0
    assert ctx.misses
    with pytest.raises(ParseError):
        SplitNeurons(1.0)
