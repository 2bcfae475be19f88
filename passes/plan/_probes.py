"""Probes of the whole model: what its outputs move by when one layer is replaced, against what was estimated of that."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import Tensor, fx

from sparsify_compiler.divergence import divergence
from sparsify_compiler.passes.plan._evidence import value_at, weight_of
from sparsify_compiler.passes.prune._apply import sources_of
from sparsify_compiler.passes.prune._layers import Layer
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.sweep import Sweep


class Probes:
    """The model on a few batches, with the layers in the order of execution.

    Raises CalibrationError for a model that was captured in parts.
    """

    def __init__(self, program: Program, layers: Sequence[Layer], batches: Sequence[object], ctx: Context) -> None:
        self._program, self._batches, self._ctx = program, list(batches), ctx
        self._dense = self._sweep().outcome({})
        sweep = self._sweep()
        self._layers = sorted(layers, key=lambda layer: min(sweep.order(use.op) for use in layer.uses))

    def apart(self, rewritten: Program, chosen: Iterable[str]) -> dict[str, float]:
        """Layer -> what the outputs move by when it alone is as it is in `rewritten`."""
        sweep = self._sweep()
        return {layer.path: self._moved(sweep.outcome(_weights(layer, rewritten), _reads(layer, rewritten)))
                for layer in self._visited(sweep, set(chosen))}

    def together(self, rewritten: Program, chosen: Iterable[str]) -> tuple[float, dict[str, float]]:
        """(what the outputs move by when all of these layers are as in `rewritten`, layer -> how much less when it alone stays dense)."""
        sweep = self._rewritten(rewritten)
        whole = self._moved(sweep.outcome({}))
        saved = {}
        for layer in self._visited(sweep, set(chosen)):
            dense = dict.fromkeys(sources_of(layer), layer.weight.detach()), dict.fromkeys((use.op for use in layer.uses), _as_it_is)
            saved[layer.path] = whole - self._moved(sweep.outcome(*dense))
        return whole, saved

    def whole(self, rewritten: Program) -> float:
        """What the outputs move by when all layers are as in `rewritten`."""
        return self._moved(self._rewritten(rewritten).outcome({}))

    def _rewritten(self, rewritten: Program) -> Sweep:
        sweep = self._sweep()
        for layer in self._layers:
            for source, weight in _weights(layer, rewritten).items():
                sweep.replace(source, weight)
            for op, function in _reads(layer, rewritten).items():
                sweep.read(op, function)
        return sweep

    def _visited(self, sweep: Sweep, chosen: set[str]) -> Iterable[Layer]:
        """The chosen layers, the sweep just before each."""
        wanted = [layer for layer in self._layers if layer.path in chosen]
        for done, layer in enumerate(wanted):
            sweep.advance(min((use.op for use in layer.uses), key=sweep.order))
            yield layer
            self._ctx.progress("probe layers", done + 1, len(wanted))

    def _sweep(self) -> Sweep:
        return Sweep(self._program, self._batches)  # type: ignore[arg-type]

    def _moved(self, outputs: Sequence[Sequence[Tensor]]) -> float:
        each = [divergence(old, new, batch) for old, new, batch in zip(self._dense, outputs, self._batches, strict=True)]  # type: ignore[arg-type]
        return math.fsum(each) / len(each)


def _weights(layer: Layer, rewritten: Program) -> Mapping[fx.Node, Tensor]:
    """What its get_attr nodes would give. Of a layer that computes in another dtype, the weight's rounding is seen."""
    use = layer.uses[0]
    region = rewritten.regions[use.region.path]
    return dict.fromkeys(sources_of(layer), weight_of(region, region.node(use.op.name)).to(layer.weight.dtype))


def _reads(layer: Layer, rewritten: Program) -> dict[fx.Node, Callable[[Tensor], Tensor]]:
    """Linears of the layer that read something else -> what is made of their input. Of another dtype, the rounding is seen."""
    found: dict[fx.Node, Callable[[Tensor], Tensor]] = {}
    for use in layer.uses:
        region = rewritten.regions[use.region.path]
        source, now = use.op.kwargs["input"], region.node(use.op.name).kwargs["input"]
        assert isinstance(source, fx.Node)
        if isinstance(now, fx.Node) and now.name != source.name:
            found[use.op] = partial(_read, region, now, source.name)
    return found


def _read(region: Region, now: fx.Node, source: str, x: Tensor) -> Tensor:
    return value_at(region, now, source, x).to(x.dtype)


def _as_it_is(x: Tensor) -> Tensor:
    return x
