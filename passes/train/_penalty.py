"""A term of the training loss that passes penalise with: the mean of what they find, times a weight that a schedule moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparsify_compiler.errors import ParseError
from sparsify_compiler.named import Named
from sparsify_compiler.training import Part


def check_weight(weight: float, schedule: str, where: str) -> None:
    """For __post_init__. Raises ParseError for a weight below 0 or without end, and for a schedule that there is not (UnknownNameError)."""
    Named.parse("schedule", schedule)(0)
    if not 0 <= weight < float("inf"):
        raise ParseError(f"a weight is a number of 0 or more, got {weight}", where=where)


class Penalty(Part):
    """terms() are scalars of the last forward pass; they are not computed where the weight is 0."""

    def __init__(self, weight: float, schedule: str, terms: Callable[[], Iterable[Tensor]]) -> None:
        self._weight, self._schedule, self._terms = weight, Named.parse("schedule", schedule), terms

    def loss(self, step: int) -> Tensor | None:
        weight = self._weight * self._schedule(step)
        terms = list(self._terms()) if weight else []
        return weight * torch.stack(terms).mean() if terms else None
