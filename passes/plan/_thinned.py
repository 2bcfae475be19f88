"""Layers with some of their outputs, which say what the whole layers would lose in a part of the time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsify_compiler.fakes import fake_like, mode_of
from sparsify_compiler.passes.prune._layers import Layer, Use, find_layers
from sparsify_compiler.passes_api import Pass
from sparsify_compiler.program import Program, get_tensor, set_tensor
from sparsify_compiler.statistic import STATISTICS

MOST = 256  # outputs of a layer that are kept
RUN = 32    # of them are neighbours, so that blocks of outputs and groups of them stay whole
Sample = tuple[Tensor, Tensor]  # numbers of outputs, int64; for how many outputs each of them counts, float64


@dataclass(frozen=True)
class Thinned:
    """A Program whose layers have only some of their outputs. It cannot run any more: what comes behind a layer expects all of them.

    layers  those of the Program given, with the weights that they have here, in the same order
    rows    layer -> int64: numbers of the outputs that it still has
    counts  layer -> float64: what is known of each of these is multiplied with this, in a sum over all outputs
    """

    program: Program
    layers: tuple[Layer, ...]
    rows: Mapping[str, Tensor]
    counts: Mapping[str, Tensor]


def thin(program: Program, layers: Sequence[Layer], sizes: Mapping[str, Tensor]) -> Thinned:
    """Some outputs of each layer (see sample). sizes: layer -> float64 [out], what each output is thought to add to the sum."""
    found, samples = program.clone(), {layer.path: sample(sizes[layer.path]) for layer in layers}
    rows = {path: kept for path, (kept, _) in samples.items()}
    for layer in layers:
        kept = rows[layer.path]
        weight = nn.Parameter(layer.weight.detach()[kept].clone(), requires_grad=False)
        for use in layer.uses:
            _replace(found, use, "weight", weight)
            bias = use.op.kwargs.get("bias")
            if isinstance(bias, fx.Node) and bias.op == "get_attr":
                _replace(found, use, "bias", nn.Parameter(get_tensor(use.region.module, str(bias.target)).detach()[kept], requires_grad=False))
    by_path = {layer.path: layer for layer in find_layers(found, (), ())[0]}
    return Thinned(found, tuple(by_path[layer.path] for layer in layers), rows, {path: counts for path, (_, counts) in samples.items()})


def can_be_thinned(choice: Pass, program: Program) -> bool:
    """Does the choice, as it is here, cut each layer by itself, by what is known of its inputs alone?"""
    names = {name for names in choice.needs(program).values() for name in names}
    return choice.layer_by_layer and all(STATISTICS[name].of == "input" for name in names)


def sample(sizes: Tensor) -> Sample:
    """Runs of outputs that say what all come to: the heavy ones, which count for themselves, and of the others some at even distances, which count
    for all others by their sizes.

    Heavy is a run that adds as much as one of those drawn has to stand for. It is no matter of chance, then, whether an output that outweighs
    the rest is seen, nor does it speak for others. The others are not drawn by their sizes: weights compete for places in a mask, and among
    large ones they would win others. The remainder of the outputs by RUN is kept, so that what divides them still does, and counts for itself.
    """
    outputs = len(sizes)
    if outputs <= MOST:
        return torch.arange(outputs), torch.ones(outputs, dtype=torch.float64)
    runs, rest = outputs // RUN, outputs % RUN
    each = sizes[: runs * RUN].double().reshape(runs, RUN).sum(1)
    sure = _heavy(each.tolist(), MOST // RUN)
    light = torch.tensor([run for run in range(runs) if run not in sure])
    drawn = light[torch.linspace(0, len(light) - 1, MOST // RUN - len(sure), dtype=torch.float64).round().long()]
    known, whole = float(each[drawn].sum()), float(each[light].sum())
    counts = torch.ones(runs, dtype=torch.float64)
    counts[drawn] = whole / known if known > 0 else len(light) / len(drawn)
    kept = torch.cat([torch.tensor(sorted(sure), dtype=torch.int64), drawn]).sort().values
    rows = torch.cat([(kept[:, None] * RUN + torch.arange(RUN)).flatten(), torch.arange(outputs - rest, outputs)])
    return rows, torch.cat([counts[kept].repeat_interleave(RUN), torch.ones(rest, dtype=torch.float64)])


def _heavy(sizes: Sequence[float], most: int) -> set[int]:
    """Numbers of the sizes that are at least a fair share of what is left when heavier ones are gone, among the places that are left of `most`;
    half of the places at the most, so that those drawn still say something of the rest."""
    order, left, found = sorted(range(len(sizes)), key=lambda number: -sizes[number]), math.fsum(sizes), set[int]()
    for number in order[: most // 2]:
        if sizes[number] * (most - len(found)) < left or not left > 0:
            break
        found.add(number)
        left -= sizes[number]
    return found


def _replace(program: Program, use: Use, name: str, tensor: Tensor) -> None:
    """Another tensor for what the op reads."""
    region, source = program.regions[use.region.path], use.op.kwargs[name]
    assert isinstance(source, fx.Node)
    set_tensor(region.module, str(source.target), tensor)
    region.node(source.name).meta["val"] = fake_like(tensor, mode_of(region))
