"""What budgets and selectors are told about the layers of a Program: scores and errors on sampled rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.activation._selection import Selection
from sparsify_compiler.passes.activation._trials import BlockTrials
from sparsify_compiler.passes.prune._layers import Layer
from sparsify_compiler.passes_api import Statistics

STEPS = 20  # of the curves of errors
ROWS = 64   # that they are measured on


@dataclass
class InputEvidence:
    """budgets._base.Evidence about these layers. `scales` and `centers` by layer, None for 1 and 0; `selector` as in select_inputs."""

    layers: Mapping[str, Layer]
    statistics: Statistics | None
    scales: Mapping[str, Tensor | None]
    centers: Mapping[str, Tensor | None]
    selector: str
    trials: BlockTrials
    _selections: dict[tuple[str, float], Selection] = field(default_factory=dict)

    def statistic(self, site: str, name: str) -> Tensor:
        """A statistic, summed over the sites that share the layer's weight. Raises CalibrationError."""
        if self.statistics is None:
            raise CalibrationError(f"needs the statistic {name} and there is no calibration", where=site, hint="give calibration=batches")
        found = [self.statistics.get(use.site.path, name) for use in self.layers[site].uses]
        if name == "input_rows":
            return torch.cat(found)
        return found[0] if len(found) == 1 else torch.stack(found).square().sum(0).sqrt()

    def scores(self, site: str) -> Tensor:
        center, scale, rows = self.centers[site], self.scales[site], self.statistic(site, "input_rows")
        score = (rows if center is None else rows - center).abs()
        return score if scale is None else score * scale

    def errors(self, site: str) -> Tensor:
        scores, rows = self.scores(site)[:ROWS], self.statistic(site, "input_rows")[:ROWS]
        weight = self.layers[site].weight.detach().float()
        center = self.centers[site]
        moved = rows if center is None else rows - center
        order, whole = scores.flatten().sort().values, (rows @ weight.t()).norm(dim=1).clamp_min(1e-30)
        found = [torch.zeros((), dtype=torch.float32)]
        for step in range(1, STEPS + 1):
            limit = order[min(step * order.numel() // STEPS, order.numel() - 1)] if step < STEPS else torch.tensor(float("inf"), dtype=torch.float32)
            skipped = (moved.masked_fill(scores >= limit, 0) @ weight.t()).norm(dim=1)
            found.append((skipped / whole).square().mean().sqrt())  # row by row: a few massive ones, which lose nothing, would outweigh all
        return torch.stack(found)

    def selection(self, site: str) -> Callable[[float], Selection]:
        """density -> the selection of that share of a layer's inputs."""
        return partial(Selection.of, self.selector, self.scores(site), scale=self.scales[site], center=self.centers[site])

    def block_error(self, densities: Mapping[str, float]) -> float:
        reads = {use.op: self._read(site, density) for site, density in densities.items() for use in self.layers[site].uses}
        return self.trials.error(self.layers[next(iter(densities))].uses[0], reads)

    def _read(self, site: str, density: float) -> Selection:
        if (site, density) not in self._selections:
            self._selections[site, density] = self.selection(site)(density)
        return self._selections[site, density]

    def sensitivity(self, site: str) -> float:
        return float(self.statistic(site, "input_gradient").square().mean().sqrt())

    def block(self, site: str) -> str:
        return self.trials.name(self.layers[site].uses[0]) or _numbered(site)


def _numbered(path: str) -> str:
    """The member of a stack of modules that a path leads through, "model.layers.3": its block, where regions cut the residual stream to pieces."""
    found = re.match(r".*?\.\d+(?=\.)", path)
    return found[0] if found else path
