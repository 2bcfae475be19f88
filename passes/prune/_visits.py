"""In which order layers are cut, and where the statistics of their inputs come from: the dense model, or the model as it is cut by then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.passes.prune._layers import Layer, Use
from sparsify_compiler.passes_api import Context, Statistics
from sparsify_compiler.program import Program
from sparsify_compiler.site_block import find_blocks
from sparsify_compiler.statistic import STATISTICS
from sparsify_compiler.sweep import Sweep
from sparsify_compiler.sweep_gather import OWN, patches_of

# What calibration calls the statistics of the rows of a linear layer (sweep_gather.OWN).
OF_LINEAR = {"patch_gram": "gram", "cross": "gram", "residual": "samples", "patch_mean": "input_mean", "patch_norm": "input_norm",
             "patch_rows": "samples"}
BESIDE_DENSE = ("cross", "residual")
Inputs = tuple[Any, ...] | Mapping[str, Any]


class Visits(Protocol):
    """The layers in the order in which they are cut."""

    def groups(self, program: Program, layers: Sequence[Layer]) -> list[list[Layer]]:
        """Those of one group are cut with statistics that were gathered before any of them was."""
        ...

    def enter(self, group: Sequence[Layer]) -> None:
        """Gather what the group needs."""
        ...

    def statistic(self, use: Use, name: str) -> Tensor:
        """Of the input of one use of a layer of the group that was entered last. Raises CalibrationError."""
        ...

    def leave(self, sources: Sequence[fx.Node], weight: Tensor) -> None:
        """Tell that a layer's weight, the get_attr nodes `sources`, was cut."""
        ...


class DenseStatistics:
    """What calibration finds of the dense model: what the pass said that it needs, and `more`, site -> names, when somebody asks for it.

    Dense is what other passes of the same kind, just before this one, have not cut yet.
    """

    def __init__(self, ctx: Context, program: Program, more: Mapping[str, frozenset[str]]) -> None:
        self._ctx, self._program, self._more = ctx, program, more
        self._found: Statistics | None = None

    def get(self, site: str, statistic: str) -> Tensor:
        """Raises CalibrationError where nothing was gathered."""
        found = self._ctx.statistics
        if statistic in self._more.get(site, ()) and self._ctx.calibrate is not None:
            found = self._found = self._found or self._ctx.calibrate(self._ctx.uncut or self._program, self._more)
        if found is None:
            raise CalibrationError(f"the statistic {statistic} is needed and there is no calibration", where=site)
        return found.get(site, statistic)


class DenseVisits:
    """Layer by layer; all statistics are of the dense model."""

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def groups(self, program: Program, layers: Sequence[Layer]) -> list[list[Layer]]:
        return [[layer] for layer in layers]

    def enter(self, group: Sequence[Layer]) -> None:
        return

    def statistic(self, use: Use, name: str) -> Tensor:
        if name in OF_LINEAR and use.site.kind != "linear":
            raise CalibrationError("what this repair needs of a convolution is gathered layer by layer only", where=use.site.path,
                                   hint="say inputs='pruned' or inputs='block'")
        if name == "residual":  # nothing was cut before: the stream is what it is in the dense model
            return torch.zeros(0, use.op.kwargs["weight"].meta["val"].shape[1], dtype=torch.float32)  # type: ignore[union-attr]
        return self._statistics.get(use.site.path, OF_LINEAR.get(name, name))

    def leave(self, sources: Sequence[fx.Node], weight: Tensor) -> None:
        return


class SweptVisits:
    """In the order of execution; statistics of what reaches a layer through the layers that were cut before it.

    by_block  the layers of one residual block are one group, as in the code of Wanda's and SparseGPT's authors; else those that read one value
    names     the statistics to gather at each layer. Those that compare with the dense model make it run beside
    """

    def __init__(self, program: Program, batches: Iterable[Inputs] | None, by_block: bool, names: Sequence[str], dense: Statistics) -> None:
        if batches is None:
            raise CalibrationError("cutting layer by layer needs the calibration batches, and there are none",
                                   hint="give calibration=batches, or say inputs='dense'")
        self._by_block, self._names, self._dense = by_block, tuple(names), dense
        self._sweep = Sweep(program, batches, dense=any(name in BESIDE_DENSE for name in names))
        self._found: dict[fx.Node, dict[str, Tensor]] = {}

    def groups(self, program: Program, layers: Sequence[Layer]) -> list[list[Layer]]:
        blocks = {(block.region, op): block.path for block in find_blocks(program) for op in block.ops} if self._by_block else {}
        grouped: dict[object, list[Layer]] = {}
        for layer in sorted(layers, key=self._place):
            first = layer.uses[0]
            key = blocks.get((first.region.path, first.op.name), layer.path) if self._by_block else first.op.kwargs["input"]
            grouped.setdefault(key, []).append(layer)
        return sorted(grouped.values(), key=lambda group: self._place(group[0]))

    def enter(self, group: Sequence[Layer]) -> None:
        self._found = {}  # room for the next ones
        if self._names:
            self._found = self._sweep.gather({use.op: self._known(use.op) for layer in group for use in layer.uses})

    def statistic(self, use: Use, name: str) -> Tensor:
        if name in self._names:
            found = self._found[use.op].get(name)
            if found is None:
                raise CalibrationError("no input reached this site", where=use.site.path, hint="give batches that use this part of the model")
            return found
        return self._dense.get(use.site.path, name)

    def leave(self, sources: Sequence[fx.Node], weight: Tensor) -> None:
        for source in sources:
            self._sweep.replace(source, weight)

    def _known(self, op: fx.Node) -> tuple[str, ...]:
        """What can be gathered at this op: of a convolution in groups, nothing about its rows."""
        return self._names if patches_of(op) is not None else tuple(name for name in self._names if name not in OWN)

    def _place(self, layer: Layer) -> int:
        return min(self._sweep.order(use.op) for use in layer.uses)


def gathered_on_the_way(name: str) -> bool:
    """Is this a statistic of a layer's input alone? Others (gradients, what comes behind the layer) are of the dense model."""
    return name in STATISTICS and STATISTICS[name].of == "input"


def summed(visits: Visits, layer: Layer, names: Sequence[str]) -> Mapping[str, Tensor]:
    """The repair's statistics of a layer, over all its uses. A residual that only some uses have is left out."""
    found: dict[str, Tensor] = {}
    for name in names:
        each = [visits.statistic(use, name) for use in layer.uses]
        if name == "patch_norm":
            found[name] = torch.stack(each).square().sum(0).sqrt()
        elif name == "residual" and len({part.shape for part in each}) > 1:
            found[name] = each[0].new_zeros(0, each[0].shape[1])
        else:
            found[name] = torch.stack(each).sum(0) if len(each) > 1 else each[0]
            if name == "patch_mean":
                found[name] = found[name] / len(each)
    return found
