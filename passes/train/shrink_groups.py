"""Shrink whole groups of weights after each step of training, the weakest to 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.anew import Anew
from sparsify_compiler.errors import InputError, ParseError
from sparsify_compiler.masked import Masked
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.structures._base import kept
from sparsify_compiler.passes.train import move_masks
from sparsify_compiler.passes.train._envelope import shrink_factors
from sparsify_compiler.passes.train._masked_weights import Aimed, aimed, mark_masked
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region
from sparsify_compiler.training import Marked, Part, TrainingPass


@dataclass(frozen=True)
class ShrinkGroups(TrainingPass):
    """After each step, take the proximal step of the group sparse envelope, whose groups are what the mask's structure keeps or cuts together.

    Matches    linear(x, weight * mask, bias) and conv(x, weight * mask, bias, ...), mask a bool buffer, as mask_weights() leaves it
    Rewrites   nothing: it marks the weights that hook.step() of sc.attach() shrinks
    Preserves  values
    Paper      Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization, Refael et al., arXiv:2212.12921

    strength  of the regularizer in one step: the groups that are strongest are divided by 1 + strength, the weakest become 0
    schedule  a file of passes/train/schedules, of the number of steps, which multiplies the strength
    targets   selectors of linear and convolution sites; all that have a mask by default
    ignore    selectors of sites

    Groups are rows, columns, blocks or single weights, and as many of a layer are wanted as the mask kept when attached; of each output or input,
    where the structure compares no others. They are not cut by this, and may come back: put move_masks(sparsity="after(start=...)") before it.
    The paper steps along plain gradients; behind another optimizer the step is the same, and its fixed points are not. Frozen weights, and those
    that are not finite, stay.
    """

    strength: float = 1e-3
    schedule: str = "constant"
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Named.parse("schedule", self.schedule)(0)
        if not 0 <= self.strength < float("inf"):
            raise ParseError(f"a strength is a number of 0 or more, got {self.strength}", where="shrink_groups")
        self.take_selectors("targets", "ignore")

    def run(self, program: Program, ctx: Context) -> Program:
        return mark_masked(self, program, ctx, self.targets, self.ignore)

    def tap(self, region: Region, name: str, node: fx.Node) -> Masked:
        return Masked()  # which stands nowhere: the weights are all that it looks at, and who moves the mask has the product

    def part(self, marked: Sequence[Marked]) -> Part:
        return _Shrinking(self, aimed(marked))


class _Shrinking(Part):
    def __init__(self, of: ShrinkGroups, places: Sequence[Aimed]) -> None:
        self._strength, self._schedule = of.strength, Named.parse("schedule", of.schedule)
        self._places = [(place, _groups(place)) for place in places]

    def update(self, step: int) -> Iterable[Anew]:
        strength = self._strength * self._schedule(step - 1)
        for place, (groups, contests) in self._places if strength else ():
            if place.parameter.requires_grad and bool(place.parameter.isfinite().all()):
                shrink(place.parameter, groups, kept((int(groups.max()) + 1) // contests, place.share), strength, contests)
        return ()


def shrink(weight: Tensor, groups: Tensor, count: int, strength: float, contests: int = 1) -> None:
    """Multiply each group of a weight with its factor, in place.

    groups    int64 of the weight's shape, numbers from 0 on
    contests  as many equal runs of these numbers, in each of which `count` are wanted
    """
    squares = torch.zeros(int(groups.max()) + 1, dtype=torch.float64, device=weight.device)
    squares.index_add_(0, groups.flatten(), weight.detach().double().square().flatten())
    weight.mul_(shrink_factors(squares.sqrt().view(contests, -1), count, strength).flatten()[groups].to(weight.dtype))


def _groups(place: Aimed) -> tuple[Tensor, int]:
    """int64 of the weight's shape, the groups by number, and how many runs of them are compared among themselves."""
    shape = place.mask.shape
    if place.structure.density is not None or not place.mask.numel():
        raise InputError(f"{place.structure} keeps its share of every few weights: there is nothing to choose in a layer", where=place.path,
                         hint="rows, columns, blocks, or unstructured")
    rows, columns = shape[0], place.mask[0].numel()
    groups = place.structure.groups(rows, columns)
    return groups.reshape(shape).to(place.mask.device), place.structure.contests(rows, columns)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers with masks."""
    return move_masks.example()
