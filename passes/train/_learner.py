"""What moves masks that are learnt from scores: after every step of the optimizer they are what the scores choose."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_compiler.anew import Anew
from sparsify_compiler.errors import InputError
from sparsify_compiler.named import Named
from sparsify_compiler.passes.train._chosen import Chosen
from sparsify_compiler.passes.train._places import mask_of, structure_of
from sparsify_compiler.passes.train.choosers._base import Choice
from sparsify_compiler.training import Marked, Part

if TYPE_CHECKING:
    from sparsify_compiler.passes.train.learn_masks import LearnMasks


@dataclass(frozen=True)
class Learnt:
    """A mask and what stands for it."""

    path: str
    tap: Chosen
    mask: Tensor
    parameter: Tensor | None  # the weight, where it is none that is computed
    sparsity: float           # behind the learning


class Learner(Part):
    """Moves the masks that a LearnMasks has marked."""

    def __init__(self, of: LearnMasks, marked: Sequence[Marked]) -> None:
        self._of, self._sparsity, self.ends = of, Named.parse("schedule", of.sparsity), of.until
        places: dict[int, Learnt] = {}
        for one in marked:
            known = places.get(id(mask_of(one)))
            if known is None:
                places[id(mask_of(one))] = self._place(one)
            elif known.tap is not one.tap:
                raise InputError("two weights share this mask", where=one.path, hint="give each a mask of its own")
        self._places = list(places.values())
        for place in self._places if self._sparsity(0) != 1 else ():
            begin = self._choice(place, 0, place.mask if place.parameter is None else place.parameter)
            place.mask.copy_(place.tap.chooser.mask(place.tap.scores.detach(), place.mask, begin))

    def _place(self, one: Marked) -> Learnt:
        mask, tap = mask_of(one), one.tap
        if not isinstance(tap, Chosen) or tap.choice is not None:
            raise InputError("another pass moves this mask", where=one.path, hint="learn it, or move it, once")
        structure = structure_of(one, self._of.structure)
        choice = Choice(structure, structure.share(mask), seed=zlib.crc32(f"{self._of.seed} {one.path}".encode()))
        structure.check(tuple(mask.shape), structure.density or math.nextafter(1, 0))
        tap.chooser.check(choice, tuple(mask.shape))
        tap.choice = choice
        tap.scores = torch.nn.Parameter(tap.chooser.start(mask, choice).to(mask.device))
        parameter = next((tensor for tensor in one.tensors.values() if tensor is not mask), None)
        return Learnt(one.path, tap, mask, parameter, 1 - choice.density)

    def _choice(self, place: Learnt, step: int, weight: Tensor | None) -> Choice:
        """What the chooser is told for the mask behind a step."""
        assert place.tap.choice is not None
        density = 1 - place.sparsity * self._sparsity(step)
        return replace(place.tap.choice, density=density, weight=None if weight is None else weight.detach())

    def move(self, step: int) -> None:
        for place in self._places:
            place.tap.begin(self._progress(step), f"{self._of.seed} {place.path} {step}")

    def loss(self, step: int) -> Tensor | None:
        """Minus the sum of the squares of what the last forward pass multiplied with, which falls silent towards the end."""
        weight = self._of.reward * (1 - self._progress(step))
        terms = [place.tap.seen.float().square().sum() for place in self._places if place.tap.seen is not None] if weight else []
        return -weight * torch.stack(terms).sum() if terms else None

    def update(self, step: int) -> Iterable[Anew]:
        if step <= self._of.until and (step % self._of.every == 0 or step == self._of.until):
            for place in self._places:
                self._choose(place, step)
        return ()

    def _choose(self, place: Learnt, step: int) -> None:
        """Scores that are frozen, or not finite, leave the mask as it is; so do weights that are looked at, and are not finite or not there yet."""
        tap = place.tap
        weight = tap.weight if place.parameter is None else place.parameter
        if not tap.scores.requires_grad or not bool(tap.scores.isfinite().all()):
            return
        if tap.chooser.of_weights and (weight is None or not bool(weight.isfinite().all())):
            return
        tap.begin(self._progress(step), tap.name)
        place.mask.copy_(tap.chooser.mask(tap.scores.detach(), place.mask, self._choice(place, step, weight)))

    def _progress(self, step: int) -> float:
        return min(step / self._of.until, 1.0)
