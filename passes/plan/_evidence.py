"""What a choice would do to the layers of a Program: the error of their outputs, weighted with the curvature of what the model's outputs move by."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.calibrate import calibrate
from sparsify_compiler.divergence import Curvature
from sparsify_compiler.passes.plan._thinned import Thinned, can_be_thinned, thin
from sparsify_compiler.passes.prune._layers import Layer, Use
from sparsify_compiler.passes_api import Context, Pass, Statistics
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program, Region, get_tensor
from sparsify_compiler.survey import with_targets

OF_INPUT = frozenset({"gram", "input_rows", "samples"})


class Evidence:
    """Statistics of the dense model, gathered once for all choices and densities."""

    def __init__(self, program: Program, layers: Sequence[Layer], choices: Sequence[Pass], ctx: Context) -> None:
        assert ctx.calibrate is not None
        assert ctx.batches is not None
        self.program, self.layers, self.ctx = program, list(layers), ctx
        paths = [use.site.path for layer in layers for use in layer.uses]
        needs: dict[str, frozenset[str]] = dict.fromkeys(paths, OF_INPUT)
        for choice in choices:
            for path, names in _alone(choice).needs(program).items():
                needs[path] = needs.get(path, frozenset()) | names
        self.found: Statistics = ctx.calibrate(program, needs)
        curvature = Curvature(ctx.seed)
        self.slopes = calibrate(program, ctx.batches, dict.fromkeys(paths, frozenset({"output_gradient"})), cache=False, progress=ctx.progress,
                                loss=curvature)
        self.unit = curvature.unit
        self.batches = len(ctx.batches)

    def estimate(self, choice: Pass, density: float) -> dict[str, float]:
        """Layer -> what the model's outputs would move by, to second order, if this layer alone were cut; infinite where the choice does not fit it.

        Of layers of many outputs some are looked at, where the choice lets each layer be seen for itself.
        """
        if not can_be_thinned(_alone(choice), self.program):
            return self.losses(self.rewritten(choice, density))
        told, alone = with_targets(_alone(choice), self._targets(density)), self._context()
        alone.statistics = self.found
        found = told.run(self._thinned.program.clone(), alone)
        return {layer.path: self._whole(layer, found) for layer in self._thinned.layers}

    def estimates(self, choice: Pass, densities: Sequence[float]) -> dict[float, dict[str, float]]:
        """Density -> layer -> its loss, as `estimate` has them; of a choice that tries many together in a part of the time."""
        alone = _alone(choice)
        if len(densities) < 2 or not getattr(alone, "tries_many", False) or not can_be_thinned(alone, self.program):
            return {density: self.estimate(choice, density) for density in densities}
        found: dict[float, dict[str, float]] = {density: {} for density in densities}
        ctx = self._context()
        for layer in self._thinned.layers:
            weights = alone.weights_at(layer, densities, self._thinned.program, ctx)  # type: ignore[attr-defined]
            for place, density in enumerate(densities):
                found[density][layer.path] = math.inf if weights is None else self._of_weights(layer, weights[place])
        return found

    def rewritten(self, choice: Pass, density: float, sites: Collection[str] | None = None) -> Program:
        """The Program after a choice at one density in all layers or in some, each layer by itself: its input is the dense model's."""
        return self.sketch(Pipeline((with_targets(choice, self._targets(density, sites)),)))

    def sketch(self, plan: Pipeline) -> Program:
        """The Program after these choices, each layer by itself: what was inverted for the estimates is not inverted again, and nothing waits for
        what the layers before it come to."""
        return Pipeline(tuple(map(_alone, plan.passes))).run(self.program, self._context(), ())

    def losses(self, rewritten: Program) -> dict[str, float]:
        """Layer -> what the model's outputs would move by, to second order, if this layer alone were as it is in `rewritten`.

        Infinite where nothing became of it. ||dy||^2 over the rows is dW G dW^T where the weights alone changed, G the Gram matrix of the layer's
        input, else a sum over sampled rows; each output weighs as much as the mean square of the gradient there (see divergence).
        """
        return {layer.path: math.fsum(self._loss(use, rewritten, self._weighs(use)) for use in layer.uses) for layer in self.layers}

    def _targets(self, density: float, sites: Collection[str] | None = None) -> dict[str, float]:
        return {use.site.path: density for layer in self.layers if sites is None or layer.path in sites for use in layer.uses}

    @cached_property
    def _thinned(self) -> Thinned:
        """Outputs are drawn by what they could lose, all weights cut and inputs taken as if nothing connected them."""
        sizes = {layer.path: torch.stack([self._weighs(use) * self._all_cut(layer, use) for use in layer.uses]).sum(0) for layer in self.layers}
        return thin(self.program, self.layers, sizes)

    def _context(self) -> Context:
        """To run choices in: what they miss is nobody's affair, and nothing is calibrated again."""
        return replace(self.ctx, statistics=self.found, calibrate=lambda program, needs: self.found, misses=[], rewrites=0, fuel=None,
                       progress=lambda what, done, total: None)

    def _whole(self, thinned: Layer, rewritten: Program) -> float:
        """The loss of a layer by some of its outputs."""
        return math.fsum(self._loss(use, rewritten, self._counted(use, thinned)) for use in thinned.uses)

    def _of_weights(self, thinned: Layer, new: Tensor) -> float:
        """The same, of new weights for those outputs."""
        change = (new - thinned.weight.detach()).float()
        if not bool(change.any()):
            return math.inf
        each = [float((self._counted(use, thinned) * self._errors(use, change)).sum()) for use in thinned.uses]
        return math.fsum(each) / (2 * self.batches)

    def _errors(self, use: Use, change: Tensor) -> Tensor:
        """What a change of the weight [out, K] does to each output, squared and summed over all rows: float64 [out]."""
        return ((change @ self.found.get(use.site.path, "gram").float()) * change).sum(1).double()

    def _counted(self, use: Use, thinned: Layer) -> Tensor:
        """What the outputs that a layer still has weigh, those included that they stand for."""
        return self._weighs(use)[self._thinned.rows[thinned.path]] * self._thinned.counts[thinned.path]

    def _all_cut(self, layer: Layer, use: Use) -> Tensor:
        return layer.weight.detach().double().square() @ self.found.get(use.site.path, "gram").diagonal().double()

    def _weighs(self, use: Use) -> Tensor:
        return self.slopes.get(use.site.path, "output_gradient").double()

    def _loss(self, use: Use, rewritten: Program, weighs: Tensor) -> float:
        """weighs: what each output of this use, and of `rewritten`, does."""
        op = rewritten.regions[use.region.path].node(use.op.name)
        old, new = (weight_of(region, node) for region, node in ((use.region, use.op), (rewritten.regions[use.region.path], op)))
        source = use.op.kwargs["input"]
        assert isinstance(source, fx.Node)
        alike = isinstance(op.kwargs["input"], fx.Node) and op.kwargs["input"].name == source.name
        if alike and torch.equal(old, new):
            return math.inf
        if alike and op.target is use.op.target:
            errors = self._errors(use, (new - old).float())
        else:
            seen = self.found.get(use.site.path, "input_rows").to(old.dtype)
            moved = value_at(rewritten.regions[use.region.path], op, source.name, seen) - value_at(use.region, use.op, source.name, seen)
            errors = moved.double().square().mean(0) * float(self.found.get(use.site.path, "samples"))
        return float((weighs * errors).sum()) / (2 * self.batches)


def weight_of(region: Region, op: fx.Node) -> Tensor:
    """The weight that a linear computes with in effect, its mask included."""
    return value_at(region, op.kwargs["weight"], "", None)


def value_at(region: Region, node: Any, source: str, rows: Tensor | None) -> Tensor:
    """The value of a node that depends on stored tensors and, where it is called `source`, on these rows."""
    known: dict[fx.Node, Any] = {}

    def value(node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in known:
            known[node] = _of(node)
        return known[node]

    def _of(node: fx.Node) -> Any:
        if node.name == source:
            return rows
        if node.op == "get_attr":
            return get_tensor(region.module, str(node.target)).detach()
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        return target(*fx.node.map_aggregate(node.args, value), **fx.node.map_aggregate(node.kwargs, value))

    found: Tensor = value(node)
    return found


def _alone(choice: Pass) -> Pass:
    """The choice where layers do not wait for each other, and leaves what does not fit."""
    options: Mapping[str, Any] = {"inputs": "dense", "on_misfit": "skip"}
    return replace(choice, **{name: value for name, value in options.items() if hasattr(choice, name)})
