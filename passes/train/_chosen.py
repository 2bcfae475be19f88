"""weight * mask where the mask is learnt: scores stand for it while gradients are taken."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify_compiler.masked import Masked, plain
from sparsify_compiler.passes.train.choosers._base import Choice, Chooser


class Chosen(Masked):
    """Stands in a graph for weight * mask. Where gradients are taken, and until the learning is done, it multiplies with what the chooser makes of
    the scores, a parameter; elsewhere, and in an export, with the mask.

    seen    the product of the last forward pass of training
    weight  the weight of that pass, without its gradient, where the chooser looks at weights: a parameter is what it is by now, one that is computed
            is what it was
    """

    def __init__(self, chooser: Chooser, like: Tensor) -> None:
        super().__init__()
        self.chooser = chooser
        self.scores = nn.Parameter(torch.zeros(0, dtype=torch.float32, device=like.device))
        self.choice: Choice | None = None
        self.name, self._passes = "", 0
        self.seen: Tensor | None = None
        self.weight: Tensor | None = None

    def begin(self, progress: float, name: str) -> None:
        """Before the forward passes of a step: how far the learning is, and what the noise of the step is drawn by."""
        assert self.choice is not None
        self.choice = replace(self.choice, progress=progress)
        self.name, self.seen, self._passes = name, None, 0

    def forward(self, weight: Tensor, mask: Tensor) -> Tensor:
        choice = self.choice
        if not plain(weight) or choice is None or not torch.is_grad_enabled() or not self.scores.requires_grad:
            return weight * mask
        if choice.progress >= 1:
            done: Tensor = _Done.apply(weight * mask, self.scores)  # type: ignore[no-untyped-call]
            return done
        drawn = replace(choice, seed=zlib.crc32(f"{self.name} {self._passes}".encode()))
        if self.chooser.of_weights:
            self.weight, drawn = weight.detach(), replace(drawn, weight=weight)
        self._passes += 1
        self.seen = weight * self.chooser.soft(self.scores, mask, drawn).to(weight.dtype)
        return self.seen

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "seen": None, "weight": None}


class _Done(torch.autograd.Function):
    """A product that has nothing to tell the scores any more, and lets a loop that calls backward() go on."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, scores: Tensor) -> Tensor:
        return product.view_as(product)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
