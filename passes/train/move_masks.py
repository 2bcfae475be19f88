"""Move the masks of weights while the model is trained: thin them out, drop weights and let others grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.errors import ParseError
from sparsify_compiler.masked import Masked, MaskedWeight, masked_weight, tap_product
from sparsify_compiler.masked_backward import tap_backward
from sparsify_compiler.masked_pairs import tap_pairs
from sparsify_compiler.named import Named
from sparsify_compiler.passes.prune.structures._base import Structure
from sparsify_compiler.passes.train._mover import CORRELATION, OF_TRAINING, Mover
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site
from sparsify_compiler.sites import chosen_sites
from sparsify_compiler.training import KNOWN, Marked, Part, TrainingPass

KINDS = ("linear", "conv")


@dataclass(frozen=True)
class MoveMasks(TrainingPass):
    """In training, every few steps choose anew which weights are kept, within the structure and at the density that a schedule says.

    Matches    linear(x, weight * mask, bias) and conv(x, weight * mask, bias, ...), mask a bool buffer, as mask_weights() leaves it
    Rewrites   nothing: it marks the masks that hook.step() of sc.attach() moves
    Preserves  values
    Paper      none: the frame that GMP (arXiv:1710.01878), SET (arXiv:1707.04780), RigL (arXiv:1911.11134) and their like fill in

    sparsity   a file of passes/train/schedules, of the number of steps, which multiplies the layer's sparsity (the structure's own, or
               that of its mask when attached). "cubic(end=750)" starts dense and ends there
    drop       a file of passes/prune/scores, of the weights as they are by then: the lowest go. Gradients, correlations of inputs and outputs and
               the weights at the start that it looks at are those of training; other statistics are those of the calibration, of the model before it
               is trained
    grow       such a file for what comes in for a `fraction` that goes: "random", "gradient", "correlation"; None: nothing comes back
    fraction   share of the kept weights that may be exchanged in one update
    decay      a schedule that multiplies the fraction
    every      steps between two updates
    until      the step of the last one
    smooth     share that earlier steps have in the gradient that scores see: 0 for that of the step at hand alone, which is the only one that is
               read then; else an average over all steps, kept in a buffer beside the mask
    structure  which weights may be kept together; None for that with which mask_weights() made the mask (unstructured, where the mask was there)
    straight_through  the weights that are not kept get gradients too, and compete for a place (STE)
    rest       a schedule: the share with which weights that are not kept count while gradients are taken, "exponential(rate=0.01)"; without gradients
               the product is always that of the mask (mask decay, arXiv:2402.04744)
    backward   a structure: the gradient of the layer's input is computed with the weights that it keeps of all, "NM(n=2, m=8, along='outputs')"
               (BDWP, arXiv:2309.13015)
    penalty    weight of half the sum of the squares of the weights that are not kept, a term of the loss (SR-STE, arXiv:2102.04010, equation 9)
    anneal     a schedule that multiplies the penalty, "ramp(end=250)" (AST, arXiv:2407.20584)
    redistribute  what all layers drop comes back in those whose kept weights have the largest gradients on average (arXiv:1907.04840, section 3.3); a
               layer's density then is its own, and the schedule's no more
    least      rows with less than this share of the usual number of inputs go as a whole, but in the last layer (SRigL, arXiv:2305.02299)
    seed       of random growth
    targets    selectors of linear and convolution sites; all that have a mask by default
    ignore     selectors of sites whose masks stay

    Growing weights start at 0. Weights that are frozen (requires_grad is False) keep their mask, and so does all in an update whose gradients are
    not finite. Where several processes train together, gradients are averaged over them, so that all choose alike.
    """

    sparsity: str = "constant"
    drop: str = "magnitude"
    grow: str | None = None
    fraction: float = 0.3
    decay: str = "constant"
    every: int = 100
    until: int = 1000
    smooth: float = 0.0
    structure: Structure | str | None = None
    straight_through: bool = False
    rest: str | None = None
    backward: Structure | str | None = None
    penalty: float = 0.0
    anneal: str = "constant"
    least: float = 0.0
    redistribute: bool = False
    seed: int = 0
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Named.parse("schedule", self.sparsity)(0)
        Named.parse("schedule", self.decay)(0)
        Named.parse("schedule", self.anneal)(0)
        for name in self.scores():
            if "movement" in name.statistics:
                raise ParseError(f"the score {name.name} sums up over all steps, and masks move between them", where="move_masks")
        if self.rest is not None:
            Named.parse("schedule", self.rest)(0)
        for option in ("structure", "backward"):
            if isinstance(given := getattr(self, option), str):
                object.__setattr__(self, option, Structure.parse(given))
        for option, high in (("fraction", 1.0), ("smooth", 1.0), ("penalty", float("inf")), ("least", 1.0)):
            value = getattr(self, option)
            if not 0 <= value <= high:
                raise ParseError(f"{option} lies between 0 and {high}, got {value}", where="move_masks")
        if self.every < 1:
            raise ParseError(f"every is 1 or more, got {self.every}", where="move_masks")
        if self.least and self.grow is None:
            raise ParseError("rows go where others grow: least needs grow", where="move_masks", hint="grow='gradient'")
        if self.redistribute and (self.grow != "gradient" or self.sparsity != "constant" or self.least or self.straight_through):
            raise ParseError("redistribute moves weights between layers by their gradients, at a constant number of them", where="move_masks",
                             hint="grow='gradient', and neither sparsity, least nor straight_through")
        self.take_selectors("targets", "ignore")

    def scores(self) -> list[Named]:
        """What is dropped by, and what grows by, if anything grows."""
        return [Named.parse("score", name) for name in (self.drop, self.grow) if name is not None]

    def needs(self, program: Program) -> Mapping[str, frozenset[str]]:
        """What the scores look at of the model before it is trained."""
        names = self._calibrated()
        return {site.path: names for site in chosen_sites(program, KINDS, self.targets, self.ignore)} if names else {}

    def _calibrated(self) -> frozenset[str]:
        return frozenset(name for score in self.scores() for name in score.statistics) - OF_TRAINING

    def run(self, program: Program, ctx: Context) -> Program:
        for _, site, found in masked_sites(program, ctx, self.targets, self.ignore):
            found.product.meta[KNOWN] = {name: ctx.statistics.get(site.path, name) for name in self._calibrated() if ctx.statistics is not None}
            self.mark(found.product, site, ctx)
        return program

    def tap(self, region: Region, name: str, node: fx.Node) -> Masked:
        def make(weight: Tensor) -> Masked:
            return Masked(self.straight_through, torch.zeros_like(weight, requires_grad=False) if self.smooth > 0 else None)

        backs = tap_backward(region, name, node) if self.backward is not None else ()
        pairs = tap_pairs(region, name, node) if any(CORRELATION in score.statistics for score in self.scores()) else ()
        made = tap_product(region, name, node, make)
        made.backs, made.pairs = backs, pairs
        return made

    def part(self, marked: Sequence[Marked]) -> Part:
        return Mover(self, marked)


def masked_sites(program: Program, ctx: Context, targets: tuple[str, ...], ignore: tuple[str, ...]) -> Iterator[tuple[Region, Site, MaskedWeight]]:
    """The chosen sites whose weight has a mask; the others are misses."""
    for site in chosen_sites(program, KINDS, targets, ignore):
        region = program.regions[site.region]
        found = masked_weight(region, region.node(site.roles["op"]))
        if found is None:
            ctx.miss("its weight has no mask", site.path)
        else:
            yield region, site, found


class _Example(nn.Module):
    """Two linear layers with masks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)
        self.register_buffer("up_mask", torch.rand(32, 16) < 0.5)
        self.register_buffer("down_mask", torch.rand(8, 32) < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_mask, self.down_mask
        assert isinstance(up, Tensor)
        assert isinstance(down, Tensor)
        hidden = nn.functional.relu(nn.functional.linear(x, self.up.weight * up, self.up.bias))
        return nn.functional.linear(hidden, self.down.weight * down, self.down.bias)


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers with masks."""
    torch.manual_seed(0)
    return _Example().eval(), (torch.randn(2, 16),)
