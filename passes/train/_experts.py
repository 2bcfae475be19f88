"""The experts of a mixture in training: what they were given last, and how much each of them would matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.passes.moe.routers.oracle import measured
from sparsify_compiler.program import Region
from sparsify_compiler.training import Watch

NAMES = ("gate", "down", "up", "gate_bias", "up_bias")


class WatchedExperts(Watch):
    """Stands in a graph behind an experts_ffn, and keeps its x [..., K] and the experts' weights."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self._activation = activation

    def forward(self, x: Tensor, *weights: Tensor | None) -> None:
        if type(x) is Tensor:
            self.seen: list[Any] = [x, *weights]

    def importance(self, criterion: str, every: int) -> Tensor:
        """float32 [R, E]: how much each expert matters in every n-th row, as the oracle router measures it. Without gradients."""
        x, *weights = self.seen
        with torch.no_grad():
            return measured(x.reshape(-1, x.shape[-1])[::every].to(weights[0].dtype), *weights, activation=self._activation, criterion=criterion)


def tap_experts(region: Region, name: str, op: fx.Node) -> WatchedExperts:
    """Put it behind an experts_ffn of a region's graph, under a name of the region's module."""
    made = WatchedExperts(str(op.kwargs["activation"]))
    region.module.add_module(name, made)
    with region.graph.inserting_after(op):
        region.graph.call_module(name, (op.kwargs["x"], *(op.kwargs.get(weight) for weight in NAMES)))
    return made
