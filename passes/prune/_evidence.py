"""What budgets are told about the layers of a Program, computed when they ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune._layers import Layer
from sparsify_compiler.passes_api import Statistics
from sparsify_compiler.program import Program
from sparsify_compiler.site_block import find_blocks


@dataclass(frozen=True)
class LayerEvidence:
    """budgets._base.Evidence about these layers. `scored` gives the score of a layer, as the pass compares it."""

    layers: Mapping[str, Layer]
    scored: Callable[[Layer], Tensor]
    statistics: Statistics | None
    blocks: Mapping[tuple[str, str], str]  # (region, op) -> block

    def score(self, site: str) -> Tensor:
        return self.scored(self.layers[site])

    def weight(self, site: str) -> Tensor:
        return self.layers[site].weight.detach()

    def statistic(self, site: str, name: str) -> Tensor:
        if self.statistics is None:
            raise CalibrationError(f"the budget needs the statistic {name} and there is no calibration", where=site)
        return self.statistics.get(site, name)

    def block(self, site: str) -> str:
        use = self.layers[site].uses[0]
        return self.blocks.get((use.region.path, use.op.name), site)


def evidence_of(program: Program, layers: Iterable[Layer], scored: Callable[[Layer], Tensor], statistics: Statistics | None) -> LayerEvidence:
    """Evidence about the layers of this Program."""
    blocks = {(block.region, op): block.path for block in find_blocks(program) for op in block.ops}
    return LayerEvidence({layer.path: layer for layer in layers}, scored, statistics, blocks)
