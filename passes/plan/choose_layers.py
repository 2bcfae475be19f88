"""Choose what is done to each layer, and how far."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsify_compiler.errors import CalibrationError, ParseError
from sparsify_compiler.passes.plan._costs import Costs
from sparsify_compiler.passes.plan._curves import between
from sparsify_compiler.passes.plan._losses import Losses, filled, in_parts, probed, ratio
from sparsify_compiler.passes.plan._probes import Probes
from sparsify_compiler.passes.plan._verdict import verdicts
from sparsify_compiler.passes.prune._layers import DEFAULT, Layer, find_layers
from sparsify_compiler.passes_api import Context, Pass, Preserves
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program, Stage
from sparsify_compiler.survey import DENSE, Offer, Plan, Planner, Survey, with_targets

CHOICES = ("mask_weights(score=repair, structure='16x1', repair=obs, inputs=pruned)", "mask_weights(score=repair, repair=obs, inputs=pruned)",
           "mask_weights(score=repair, structure='2:4', repair=obs, inputs=pruned)")
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
BELIEFS = (0.0, 0.5)  # in the differences between layers: of the plans that one is compared with, in this order
EVERY = 3  # of the densities, how many-th one is really tried; the loss at the others lies between


@dataclass(frozen=True)
class ChooseLayers(Planner):
    """Choose for each layer which of several passes acts on it and to which density, such that the model loses least within the budget.

    Matches    what the choices match: linear(x, weight, bias), weight a parameter
    Rewrites   what the choices rewrite, each in the layers and to the densities that it was chosen for
    Preserves  signature; quality is measured
    Paper      none: SPDY (arXiv:2201.13096) chooses so by dynamic programming; curvature by Gauss-Newton as in Optimal Brain Damage and its heirs

    choices    passes with their options, without density and targets
    densities  that each choice may take; a structure with a density of its own (2:4) has that one
    density    weights kept / all weights of the layers; by default the user's budget, of whatever kind it is
    alike      groups of selectors, each "a b": the layers that they select in one block choose alike, "*.query *.key *.value" for one
    probes     calibration batches on which every layer's estimate is held against the whole model, which one captured in parts does without;
               0 believes the estimates, and compares no plan with evener ones
    targets    selectors of sites, as in mask_weights
    ignore     selectors of sites that stay as they are

    The loss of a layer is its own output's error, weighted with the curvature of what the model's outputs move by. Needs calibration.
    """

    choices: tuple[str, ...] = CHOICES
    densities: tuple[float, ...] = DENSITIES
    density: float | None = None
    alike: tuple[str, ...] = ()
    probes: int = 1
    targets: tuple[str, ...] = DEFAULT
    ignore: tuple[str, ...] = ()

    preserves: ClassVar[Preserves] = Preserves.SIGNATURE
    gives_stage: ClassVar[Stage | None] = Stage.SPARSE

    def __post_init__(self) -> None:
        self.take_selectors("choices", "alike", "targets", "ignore")
        self.check_density(self.density)
        object.__setattr__(self, "densities", tuple(sorted(set(self.densities))))
        for density in self.densities:
            self.check_density(density)
        if not self.densities or not self.choices or self.probes < 0:
            raise ParseError("needs choices, densities, and 0 probes or more", where="choose_layers")
        for choice in self._passes:
            missing = {"targets", "ignore", "density"} - set(vars(choice))
            if missing or choice.density is not None:  # type: ignore[attr-defined]
                raise ParseError(f"{choice} cannot be a choice: it must take targets and a density, and name no density", where="choose_layers")

    @cached_property
    def _passes(self) -> tuple[Pass, ...]:
        return tuple(item for text in self.choices for item in Pipeline.parse(text).passes)

    def survey(self, program: Program, ctx: Context) -> Survey:
        if ctx.calibrate is None or not ctx.batches:
            raise CalibrationError("planning needs calibration batches", where="choose_layers", hint="give calibration=batches")
        layers = self._layers(program, ctx)
        offers: dict[str, list[Offer]] = {layer.path: [Offer(DENSE)] for layer in layers}
        tried = {number: self._tried(choice) for number, choice in enumerate(self._passes)}
        uses = {layer.path: [use.site.path for use in layer.uses] for layer in layers}
        survey = Survey(offers, Costs(layers, offers, self._passes, tried, ctx), partial(self._pipeline, uses), alike=self._alike(program, layers))
        if not layers:
            return survey
        losses = Losses(self._passes, program, layers, ctx, self.probes, f"{self.choices} {self.probes} {self.targets} {self.ignore}", tried)
        survey.sketch = losses.sketch
        survey.loss_unit, survey.scale = losses.unit, losses.scale((0, tried[0][len(tried[0]) // 2]))
        found: dict[tuple[int, float], dict[str, float]] = {}
        for number, densities in tried.items():
            for density in densities:
                found[number, density] = losses.at(number, density)
                ctx.progress("plan: losses", len(found), sum(map(len, tried.values())))
        for layer in layers:
            offers[layer.path] += self._offers(layer, found)
        return survey

    def refine(self, survey: Survey, kind: str, plan: Plan, program: Program, ctx: Context) -> Plan:
        made: dict[str, Program] = {}
        return self.settle(survey, kind, self._probed_again(survey, kind, plan, program, ctx, made), program, ctx, made)

    def settle(self, survey: Survey, kind: str, plan: Plan, program: Program, ctx: Context, made: dict[str, Program] | None = None) -> Plan:
        """The plan, or one for the same cost to which all layers are alike, or one between the two: what the whole model says is best on all batches.

        Of each plan a sketch is made (see _after), which takes time, so that the one between is made only where the even one was better.
        The survey then believes its estimates as far as that plan does. `made` holds what plans have made of the Program already (see _after).
        """
        if not self.probes or all(offer.choice is None for offer in plan.taken.values()):
            return plan
        assert ctx.batches is not None
        best, belief, spent = plan, survey.belief, survey.spent(kind, plan.taken)
        made, known = {} if made is None else made, None
        for share in BELIEFS:
            survey.believe(share)
            other = survey.plan(kind, spent)
            if other.taken in (plan.taken, best.taken):
                continue
            compared = (other,) if known is not None else (other, best)
            after, *rest = verdicts(program, [_after(one, survey, program, ctx, made) for one in compared], ctx.batches, ctx.loss, known)
            if not after.better(known or rest[0]):
                break
            best, belief, known = other, share, after
        survey.believe(belief)
        return best

    def _probed_again(self, survey: Survey, kind: str, plan: Plan, program: Program, ctx: Context, made: dict[str, Program]) -> Plan:
        chosen = [site for site, offer in plan.taken.items() if offer.choice is not None]
        if not self.probes or not chosen or in_parts(program):
            return plan
        assert ctx.batches is not None
        probes = Probes(program, self._layers(program, _watching(ctx)), ctx.batches[: self.probes], ctx)
        whole, saved = probes.together(_after(plan, survey, program, ctx, made), probed(chosen))
        if not whole:  # what the choices change is no weight
            return plan
        before = dict(survey.scale)
        for site, found in filled(chosen, {site: ratio(loss, plan.taken[site].loss) for site, loss in saved.items()}).items():
            survey.scale[site] = math.sqrt(before.get(site, 1.0) * found)
        second = survey.plan(kind, survey.spent(kind, plan.taken))
        if second.taken != plan.taken and probes.whole(_after(second, survey, program, ctx, made)) < whole:
            return second
        survey.scale = before
        return plan

    def _layers(self, program: Program, ctx: Context) -> list[Layer]:
        layers, left = find_layers(program, self.targets, self.ignore)
        for one in left:
            if one.chosen:
                ctx.miss(one.reason, one.use.site.path)
        fit = [layer for layer in layers if all(use.site.kind == "linear" for use in layer.uses) and bool(layer.weight.any())]
        if not fit:
            ctx.miss("the model has no linear layer to plan for")
        return fit

    def _tried(self, choice: Pass) -> list[float]:
        """The densities that a choice is really tried at."""
        own = choice.own_density()
        if own is not None:
            return [own]
        return sorted({*self.densities[::EVERY], self.densities[-1]})

    def _offers(self, layer: Layer, found: Mapping[tuple[int, float], Mapping[str, float]]) -> list[Offer]:
        offers = []
        for number, choice in enumerate(self._passes):
            at = {density: found[number, density][layer.path] for density in self._tried(choice)}
            if not all(math.isfinite(loss) for loss in at.values()):
                continue  # it does not fit this layer
            wanted = list(at) if choice.own_density() is not None else list(self.densities)
            offers += [Offer(f"{_called(choice)} {density:.0%}", number, density, between(at, density)) for density in wanted]
        return offers

    def _pipeline(self, uses: Mapping[str, Sequence[str]], taken: Mapping[str, Offer]) -> Pipeline:
        """The passes that were chosen, each with the sites of its layers and their densities."""
        made = []
        for number, choice in enumerate(self._passes):
            targets = {use: offer.density for site, offer in taken.items() if offer.choice == number for use in uses[site]}
            if targets:
                made.append(with_targets(choice, targets))
        return Pipeline(tuple(made))

    def _alike(self, program: Program, layers: list[Layer]) -> list[list[str]]:
        """Sites of one block that a group selects."""
        from sparsify_compiler.site_block import find_blocks

        blocks = {(block.region, op): block.path for block in find_blocks(program) for op in block.ops}
        groups = []
        for selectors in self.alike:
            selected = {layer.path for layer in find_layers(program, selectors.split(), self.ignore)[0]}
            by_block: dict[str, list[str]] = {}
            for layer in layers:
                if layer.path in selected:
                    place = layer.uses[0]
                    by_block.setdefault(blocks.get((place.region.path, place.op.name), ""), []).append(layer.path)
            groups += [group for group in by_block.values() if len(group) > 1]
        return groups


def _watching(ctx: Context) -> Context:
    """To try plans in: what they miss is nobody's affair."""
    return replace(ctx, misses=[], rewrites=0, fuel=None)


def _after(plan: Plan, survey: Survey, program: Program, ctx: Context, made: dict[str, Program]) -> Program:
    """A sketch of the Program after a plan, from `made` where it is there: to cut and repair all layers takes far longer than to look at it.

    Layers are cut by what the dense model gives them even where the plan will not: plans are compared with each other, all alike.
    """
    text = str(plan.pipeline)
    if text not in made:
        made[text] = plan.pipeline.run(program, _watching(ctx), ()) if survey.sketch is None else survey.sketch(plan.pipeline)
    return made[text]


def _called(choice: Pass) -> str:
    """In a report: by its structure or its dtype, where it has one."""
    return str(getattr(choice, "structure", None) or getattr(choice, "dtype", None) or choice.name())


def example() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Two linear layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).eval(), (torch.randn(64, 32),)
