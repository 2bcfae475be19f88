"""What the offers of a layer cost: weights, bytes, and seconds of its fastest form on the rows of the example."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from sparsify_compiler import catalog
from sparsify_compiler.passes.plan._curves import between
from sparsify_compiler.passes.prune._layers import Layer, Use
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.shapes import example_shape
from sparsify_compiler.survey import BYTES, FLOPS, JOULES, SECONDS, WEIGHTS, Offer
from sparsify_compiler.work import Work, is_predicted, measure, predict


class Costs:
    """Costs of offers, computed when they are asked for.

    Seconds are predicted by the formulas of the kernels. Where a dtype has none they are measured, layers of one shape once, at the densities `tried`
    of each choice.
    """

    def __init__(self, layers: Sequence[Layer], offers: Mapping[str, Sequence[Offer]], choices: Sequence[Pass], tried: Mapping[int, Sequence[float]],
                 ctx: Context) -> None:
        self._layers, self._offers, self._choices, self._tried, self._ctx = layers, offers, choices, tried, ctx
        self._read = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
        self._alike = Counter(layer.weight.shape for layer in layers for _ in layer.uses)
        self._known: dict[tuple[Work, float], dict[str, float]] = {}

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
        return self._works(layer, offer.choice, offer.density, 0)[0].cost.bytes

    def _flops(self, layer: Layer, offer: Offer) -> float:
        return math.fsum(work.cost.flops for use in layer.uses for work in self._works(layer, offer.choice, offer.density, self._rows(use)))

    def _joules(self, layer: Layer, offer: Offer) -> float:
        works = [work for use in layer.uses for work in self._works(layer, offer.choice, offer.density, self._rows(use))]
        energy = catalog.get("cost model", "energy")
        return math.fsum(energy.joules(work.cost.flops, work.cost.bytes, work.dtype) for work in works)

    def _seconds(self, layer: Layer, offer: Offer) -> float:
        """Of all calls of a layer, each in its fastest form: where none is faster, it stays dense."""
        total = 0.0
        for use in layer.uses:
            rows = self._rows(use)
            dense = self._fastest(self._works(layer, None, 1.0, rows), layer)
            total += dense if offer.choice is None else min(dense, self._changed(layer, offer.choice, offer.density, rows))
        return total

    def _changed(self, layer: Layer, choice: int, density: float, rows: int) -> float:
        works = self._works(layer, choice, density, rows)
        if all(is_predicted(work, self._ctx.target) for work in works):
            return self._fastest(works, layer)
        return between({tried: self._fastest(self._works(layer, choice, tried, rows), layer) for tried in self._tried[choice]}, density)

    def _fastest(self, works: Sequence[Work], layer: Layer) -> float:
        """Of each its fastest form. Layers of one shape share their kernels, so that what a kernel needs comes back after a part of the model."""
        again = self._read / self._alike[layer.weight.shape]
        for work in works:
            if (work, again) not in self._known:
                predicted = is_predicted(work, self._ctx.target)
                self._known[work, again] = predict(work, self._ctx.target, again) if predicted else measure(work, self._ctx.target)
        return math.fsum(min(self._known[work, again].values()) for work in works)

    def _works(self, layer: Layer, choice: int | None, density: float, rows: int) -> tuple[Work, ...]:
        (outputs, inputs), dtype = layer.weight.shape, str(layer.weight.dtype)
        if choice is None:
            return (Work.of((outputs, inputs), rows, dtype=dtype, between=self._read),)
        return self._choices[choice].work((outputs, inputs), rows, density, dtype, self._read)

    def _rows(self, use: Use) -> int:
        return math.prod(example_shape(use.region, use.op, self._ctx.example_inputs)[:-1])
