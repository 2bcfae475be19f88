"""What a chooser is: scores that are trained, the weights that they stand for while gradients are taken, and the mask that they choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsify_compiler.passes.prune.structures._base import Structure


@dataclass(frozen=True)
class Choice:
    """One weight whose mask is learnt.

    structure  of its masks; density: share that they keep
    progress   how much of the learning is done, between 0 and 1
    seed       of what is random in one pass over the model
    weight     [out, in, ...], for choosers that look at it: with its gradient in soft(), without in mask()
    """

    structure: Structure
    density: float
    progress: float = 0.0
    seed: int = 0
    weight: Tensor | None = None

    def noise(self, device: torch.device) -> torch.Generator:
        """The same for the same step, so that a resumed training draws what the first would have drawn."""
        return torch.Generator(device).manual_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """Options are keyword fields. Masks are bool, of the weight's shape [out, in, ...], and scores float32.

    of_weights  does it look at the weight?
    """

    of_weights: ClassVar[bool] = False

    @property
    def thins(self) -> bool:
        """Can it choose masks of a density that falls from step to step?"""
        return False

    def check(self, choice: Choice, shape: tuple[int, ...]) -> None:
        """Raise InputError for a structure whose masks it cannot learn."""

    def start(self, mask: Tensor, choice: Choice) -> Tensor:
        """The scores at first, which prefer what is kept in `mask`."""
        raise NotImplementedError

    def soft(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        """float32 of the mask's shape: what weights are multiplied with in a forward pass of training; differentiable in the scores."""
        raise NotImplementedError

    def mask(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        """The mask after a step, of the choice's density; `mask` is that before it, scores are finite."""
        raise NotImplementedError
