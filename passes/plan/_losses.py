"""Losses of layers under choices, kept on disk as they are found where SPARSIFY_CHECKPOINT names a folder: a killed run goes on behind them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch

from sparsify_compiler.passes.plan._curves import LEAST
from sparsify_compiler.passes.plan._evidence import Evidence
from sparsify_compiler.passes.plan._probes import Probes
from sparsify_compiler.passes.prune._layers import Layer
from sparsify_compiler.passes_api import Context, Pass
from sparsify_compiler.pipeline import Pipeline
from sparsify_compiler.program import Program
from sparsify_compiler.sweep_checkpoint import Checkpoint, chosen_folder

EVERY = 3  # of the layers at the same place of each block, how many-th one is probed
BOUNDS = (0.05, 20.0)  # by how much a probe may correct an estimate: beyond, it is noise of a loss next to nothing


class Losses:
    """What each layer loses, alone, under each of the choices, by its number, at its densities.

    `work` names all that the numbers depend on beside the Program, the batches and the densities.
    """

    def __init__(self, choices: Sequence[Pass], program: Program, layers: Sequence[Layer], ctx: Context, probes: int, work: str,
                 densities: Mapping[int, Sequence[float]]) -> None:
        self._choices, self._program, self._layers, self._ctx, self._probes = choices, program, layers, ctx, probes
        self._densities = densities
        self._tried: dict[tuple[int, float], Mapping[str, float]] = {}  # and not asked for yet
        folder = chosen_folder()
        self._kept = Checkpoint(folder, program, ctx.batches or (), f"losses of {work}, seed {ctx.seed}") if folder is not None else None

    @cached_property
    def _evidence(self) -> Evidence:
        return Evidence(self._program, self._layers, self._choices, self._ctx)

    @property
    def unit(self) -> str:
        """What a loss is counted in."""
        return bytes(int(c) for c in self._once("unit", lambda: list(self._evidence.unit.encode()))).decode()

    def at(self, number: int, density: float) -> dict[str, float]:
        """Layer -> its loss under a choice at a density, by the estimate; infinite where the choice does not act on it."""
        def found() -> list[float]:
            losses = self._tried.pop((number, density), None)
            if losses is None:
                at_once = [one for one in self._densities[number] if self._stored(f"{number} {one}") is None]
                self._tried |= {(number, one): each for one, each in self._evidence.estimates(self._choices[number], at_once).items()}
                losses = self._tried.pop((number, density))
            return [losses[layer.path] for layer in self._layers]

        return dict(zip((layer.path for layer in self._layers), self._once(f"{number} {density}", found), strict=True))

    def scale(self, where: tuple[int, float]) -> dict[str, float]:
        """Layer -> what the whole model said there, over the estimate; 1 where no weight changed, so that there is nothing to probe.

        Of layers that stand at the same place of each block some are probed, the others lie between.
        """
        def found() -> list[float]:
            estimates = self.at(*where)
            paths = [layer.path for layer in self._layers if math.isfinite(estimates[layer.path])]
            chosen = probed(paths)
            rewritten = self._evidence.rewritten(self._choices[where[0]], where[1], chosen)
            assert self._ctx.batches is not None
            moved = Probes(self._program, self._layers, self._ctx.batches[: self._probes], self._ctx).apart(rewritten, chosen)
            ratios = filled(paths, {path: ratio(moved[path], estimates[path]) for path in chosen if moved[path]})
            return [ratios.get(layer.path, 1.0) for layer in self._layers]

        if not self._probes or in_parts(self._program):
            return {}
        return dict(zip((layer.path for layer in self._layers), self._once(f"scale {where}", found), strict=True))

    def sketch(self, plan: Pipeline) -> Program:
        """What the choices of a plan make of the Program, each layer by itself."""
        return self._evidence.sketch(plan)

    def _once(self, name: str, compute: Callable[[], Sequence[float]]) -> list[float]:
        """Numbers that are kept."""
        stored = self._stored(name)
        if stored is not None:
            return stored
        numbers = list(compute())
        if self._kept is not None:
            self._kept.write(name, {"numbers": torch.tensor(numbers, dtype=torch.float64)})
        return numbers

    def _stored(self, name: str) -> list[float] | None:
        stored = self._kept.read(name) if self._kept is not None else None
        return None if stored is None else [float(value) for value in stored["numbers"]]


def in_parts(program: Program) -> bool:
    """Was the model captured in parts? There is no whole to run from the middle on, then, and estimates must be believed."""
    return program.skeleton is not None


def probed(paths: Sequence[str]) -> list[str]:
    """Of each family the first two, the last two, and every EVERY-th between: at the ends of a model layers differ most."""
    found = []
    for family in _families(paths):
        ends = {0, 1, len(family) - 2, len(family) - 1}
        found += [path for number, path in enumerate(family) if number in ends or number % EVERY == 1]
    return found


def filled(paths: Sequence[str], known: Mapping[str, float]) -> dict[str, float]:
    """What is known of some layers for all of their families, between two of them by the logarithm; nothing of a family of which nothing is known."""
    found: dict[str, float] = {}
    for family in _families(paths):
        places = [number for number, path in enumerate(family) if path in known]
        if places:
            logs = np.interp(range(len(family)), places, [math.log(known[family[place]]) for place in places])
            found |= {path: math.exp(log) for path, log in zip(family, logs.tolist(), strict=True)}
    return found


def _families(paths: Sequence[str]) -> list[list[str]]:
    """Layers whose paths differ only in numbers, in the order of execution."""
    families: dict[str, list[str]] = {}
    for path in paths:
        families.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", path), []).append(path)
    return list(families.values())


def ratio(measured: float, estimated: float) -> float:
    """What to multiply an estimate with."""
    low, high = BOUNDS
    return min(max(measured / max(estimated, LEAST), low), high)
