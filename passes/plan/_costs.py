"""What the offers of a layer cost: weights, bytes, and seconds of its fastest form on the rows of the example."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sparsify_compiler import catalog
from sparsify_compiler.passes.plan._curves import between
from sparsify_compiler.passes.prune._layers import Layer, Use
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.shapes import example_shape
from sparsify_compiler.survey import BYTES, FLOPS, JOULES, SECONDS, WEIGHTS, Offer
from sparsify_compiler.work import Work, is_dense, is_predicted, measure, predict


class Costs:
    """Costs of offers, computed when they are asked for.

    Seconds are predicted by the formulas of the kernels. Where a dtype has none they are measured, layers of one shape once, at the densities `tried`
    of each choice.
    """

    def __init__(self, layers: Sequence[Layer], offers: Mapping[str, Sequence[Offer]], choices: Sequence[Pass], tried: Mapping[int, Sequence[float]],
                 ctx: Context) -> None:
        self._layers, self._offers, self._choices, self._tried, self._ctx = layers, offers, choices, tried, ctx
        self._read = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        self._known: dict[Work, dict[str, float]] = {}

    def __call__(self, kind: str) -> dict[str, list[float]]:
        """Site -> what each of its offers costs."""
        of: Callable[[Layer, Offer], float] = {SECONDS: self._seconds, BYTES: self._bytes, WEIGHTS: self._weights,
                                                   FLOPS: self._flops, JOULES: self._joules}[kind]
        found = {}
        for done, layer in enumerate(self._layers):
            found[layer.path] = [of(layer, offer) for offer in self._offers[layer.path]]
            self._ctx.progress(f"plan: {kind}", done + 1, len(self._layers))
        return found

    def _weights(self, layer: Layer, offer: Offer) -> float:
        return offer.density * layer.weight.numel()

    def _bytes(self, layer: Layer, offer: Offer) -> float:
        """Of the weight alone, whose formulas count activations by the rows."""
        return self._work(layer, offer.choice, offer.density, 0).cost.bytes

    def _flops(self, layer: Layer, offer: Offer) -> float:
        return math.fsum(self._work(layer, offer.choice, offer.density, self._rows(use)).cost.flops for use in layer.uses)

    def _joules(self, layer: Layer, offer: Offer) -> float:
        works = [self._work(layer, offer.choice, offer.density, self._rows(use)) for use in layer.uses]
        energy = catalog.get("cost model", "energy")
        return math.fsum(energy.joules(work.cost.flops, work.cost.bytes, work.dtype) for work in works)

    def _rows(self, use: Use) -> int:
        return math.prod(example_shape(use.region, use.op, self._ctx.example_inputs)[:-1])

    def _seconds(self, layer: Layer, offer: Offer) -> float:
        """Of all calls of a layer, each in its fastest form: where none is faster sparse, it stays dense."""
        total = 0.0
        for use in layer.uses:
            rows = self._rows(use)
            dense = self._fastest(self._work(layer, None, 1.0, rows), dense=True)
            if offer.choice is not None:
                dense = min(dense, self._sparse(layer, offer.choice, offer.density, rows))
            total += dense
        return total

    def _sparse(self, layer: Layer, choice: int, density: float, rows: int) -> float:
        work = self._work(layer, choice, density, rows)
        if is_predicted(work, self._ctx.target):
            return self._fastest(work, dense=False)
        at = {tried: self._fastest(self._work(layer, choice, tried, rows), dense=False) for tried in self._tried[choice]}
        return between(at, density)

    def _fastest(self, work: Work, *, dense: bool) -> float:
        if work not in self._known:
            self._known[work] = (predict if is_predicted(work, self._ctx.target) else measure)(work, self._ctx.target)
        return min((value for form, value in self._known[work].items() if is_dense(form) == dense), default=math.inf)

    def _work(self, layer: Layer, choice: int | None, density: float, rows: int) -> Work:
        (outputs, inputs), dtype = layer.weight.shape, str(layer.weight.dtype)
        if choice is None:
            return Work.of((outputs, inputs), rows, dtype=dtype, between=self._read)
        structure = getattr(self._choices[choice], "structure", None)
        if structure is not None:
            return Work.of((outputs, inputs), rows, structure, density, dtype, self._read)
        return Work.make("select_linear", dtype, self._read, M=rows, N=outputs, K=inputs, density=density)
