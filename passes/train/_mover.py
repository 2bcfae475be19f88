"""What moves masks in a training loop: when, by which scores, and what starts anew."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsify_compiler.anew import Anew
from sparsify_compiler.errors import InputError
from sparsify_compiler.masked import Masked
from sparsify_compiler.masked_backward import WayBack
from sparsify_compiler.masked_pairs import Pairs, correlation
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train._moving import cut, regrown, shared, thinned
from sparsify_compiler.passes.train._places import Place, places_of
from sparsify_compiler.processes import mean_over_processes, sum_over_processes
from sparsify_compiler.training import Marked, Part

if TYPE_CHECKING:
    from sparsify_compiler.passes.train.move_masks import MoveMasks


GRADIENT, CORRELATION, START = "gradient", "correlation", "start"
OF_TRAINING = frozenset((GRADIENT, CORRELATION, START))  # statistics that training itself gives; "start" is the weight when attached


class Mover(Part):
    """Moves the masks that a MoveMasks has marked."""

    def __init__(self, of: MoveMasks, marked: Sequence[Marked]) -> None:
        self._of = of
        self._sparsity, self._decay = Named.parse("schedule", of.sparsity), Named.parse("schedule", of.decay)
        self._scores = of.scores()
        self._reads = of.smooth > 0 or any(GRADIENT in name.statistics for name in self._scores)
        looked_at = {name for score in self._scores for name in score.statistics}
        self._anneal = Named.parse("schedule", of.anneal)
        self._rest = None if of.rest is None else Named.parse("schedule", of.rest)
        self._places = places_of(of, marked)
        self.ends = 0 if of.sparsity == "constant" else of.until
        self._pairs = CORRELATION in looked_at
        self._start = {place.path: place.weight().clone() for place in self._places} if START in looked_at else {}
        for place in self._places if self._sparsity(0) != 1 or of.backward is not None else ():
            weight = place.weight()
            blind = {GRADIENT, CORRELATION} & set(self._scores[0].statistics)  # nothing is known of these before the first step
            start = (Named.parse("score", "magnitude") if blind else self._scores[0])(weight, {**place.known, START: weight}, of.seed)
            if self._sparsity(0) != 1:
                place.put(cut(place.structure, start, self._density(place, 0)))
            self._turn(place, start)

    def move(self, step: int) -> None:
        """Ask for the dense gradients of the next step, where that updates."""
        wanted = self._reads and step < self._of.until and (self._of.smooth > 0 or self._due(step + 1))
        for place in self._places:
            for tap in place.taps:
                tap.wanted = wanted
                if isinstance(tap, Masked):
                    tap.rest = 0.0 if self._rest is None else self._rest(step)
                tap.take()
                for pairs in _pairs(tap):
                    pairs.wanted = step < self._of.until and self._due(step + 1)
                    pairs.take()

    def loss(self, step: int) -> Tensor | None:
        """Half the penalty times the sum of the squares of the weights that are not kept (SR-STE)."""
        if not self._of.penalty:
            return None
        weight = self._of.penalty / 2 * self._anneal(step)
        return torch.stack([place.beyond() for place in self._places]).sum() * weight if weight else None

    def update(self, step: int) -> Iterator[Anew]:
        """Move every mask, in the steps that do; the weights that went or came."""
        places = [place for place in self._places if place.trained]
        gradients = [self._gradient(place) for place in places] if self._reads and step <= self._of.until else [None] * len(places)
        if not self._due(step):
            return
        if self._reads and places and all(gradient is None for gradient in gradients):
            raise InputError("no gradient has reached a masked weight since the last step", where="Hook.step",
                             hint="call hook.step() once after each optimizer.step(), with loss.backward() before it")
        related = self._related(places)
        moved = [(place, gradient) for place, gradient in zip(places, gradients, strict=True)
                 if (not self._reads or (gradient is not None and bool(gradient.isfinite().all()))) and (not self._pairs or place.path in related)]
        targets = self._targets(moved, step)
        for place, gradient in moved:
            yield self._update(place, self._known(place, gradient, related), step, targets.get(place.path))

    def _known(self, place: Place, gradient: Tensor | None, related: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The statistics that the scores of a place see."""
        of_training = ((GRADIENT, gradient), (CORRELATION, related.get(place.path)), (START, self._start.get(place.path)))
        return {**place.known, **{name: value for name, value in of_training if value is not None}}

    def _related(self, places: Sequence[Place]) -> dict[str, Tensor]:
        """Path -> correlation, of the places that a forward pass went through, where it is finite. Raises InputError where none went through any."""
        found = {place.path: one for place in places if (one := self._correlation(place)) is not None} if self._pairs else {}
        if self._pairs and places and not found:
            raise InputError("no forward pass with gradients has gone through a masked layer since the last step", where="Hook.step",
                             hint="call hook.step() once after each optimizer.step()")
        return {path: one for path, one in found.items() if bool(one.isfinite().all())}

    def _correlation(self, place: Place) -> Tensor | None:
        """Of the forward passes of the step at hand, of all uses and all processes."""
        found = [sums for tap in place.taps for pairs in _pairs(tap) if (sums := pairs.take()) is not None]
        if not found:
            return None
        return correlation(tuple(sum_over_processes(torch.stack(parts).sum(0)) for parts in zip(*found, strict=True)))

    def _turn(self, place: Place, score: Tensor) -> None:
        """Choose what the way back is computed with."""
        structure = self._of.backward
        if isinstance(structure, Structure):
            mask = cut(structure, score, 1 - place.sparsity)
            for back in (back for tap in place.taps if isinstance(tap, Masked) for back in tap.backs if isinstance(back, WayBack)):
                back.mask.copy_(mask)

    def _due(self, step: int) -> bool:
        return 0 < step <= self._of.until and (step % self._of.every == 0 or step == self._of.until)

    def _density(self, place: Place, step: int) -> float:
        level: float = self._sparsity(step)
        return 1 - place.sparsity * level

    def _gradient(self, place: Place) -> Tensor | None:
        """The dense gradient of the step at hand, or the average: the sum over all uses, and the mean over all processes."""
        found = [gradient for tap in place.taps if (gradient := tap.take()) is not None]
        if not found:
            return None
        total = mean_over_processes(torch.stack(found).sum(0))
        smoothed = place.taps[0].smoothed
        if smoothed is None:
            return total
        if bool(total.isfinite().all()):
            smoothed.mul_(self._of.smooth).add_(total, alpha=1 - self._of.smooth)
        return smoothed

    def _targets(self, moved: Sequence[tuple[Place, Tensor | None]], step: int) -> dict[str, float]:
        """Densities behind an update in which what all layers drop comes back where gradients are large on average (sparse momentum); else none.

        Of the layers that move: those without a gradient, or with one that is not finite, keep their places.
        """
        if not self._of.redistribute:
            return {}
        found = [(place, gradient) for place, gradient in moved if gradient is not None]
        masks = [place.mask() for place, _ in found]
        kept, sizes = [int(mask.sum()) for mask in masks], [mask.numel() for mask in masks]
        dropped = [int(count * self._of.fraction * self._decay(step)) for count in kept]
        means = [float(gradient[mask].abs().double().mean()) if count else 0.0 for (_, gradient), mask, count in zip(found, masks, kept, strict=True)]
        stay = [count - gone for count, gone in zip(kept, dropped, strict=True)]
        grown = shared(sum(dropped), [size - count for size, count in zip(sizes, stay, strict=True)], means)
        return {place.path: (a + b) / size for (place, _), a, b, size in zip(found, stay, grown, sizes, strict=True)}

    def _update(self, place: Place, given: Mapping[str, Tensor], step: int, target: float | None) -> Anew:
        """Move one mask, to a density of its own where one is given."""
        seed = zlib.crc32(f"{self._of.seed} {place.path} {step}".encode())
        weight, mask = place.weight(), place.mask()
        score, *growth = (named(weight, given, seed) for named in self._scores)
        old = torch.ones_like(mask) if self._of.straight_through else mask
        density = self._density(place, step) if target is None else target
        if growth:
            least = 0.0 if place is self._places[-1] else self._of.least
            before = density if target is None else float(mask.double().mean())
            new = regrown(old, score, growth[0], place.structure, density, before * (1 - self._of.fraction * self._decay(step)), least)
        else:
            new = thinned(old, score, place.structure, density)
        self._turn(place, score)
        return place.move(new, keep=self._of.straight_through)


def _pairs(tap: object) -> tuple[Pairs, ...]:
    return tuple(one for one in getattr(tap, "pairs", ()) if isinstance(one, Pairs))
