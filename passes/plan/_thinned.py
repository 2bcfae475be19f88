"""Layers with some of their outputs, which say what the whole layers would lose in a part of the time."""

from __future__ import annotations

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


@dataclass(frozen=True)
class Thinned:
    """A Program whose layers have only some of their outputs. It cannot run any more: what comes behind a layer expects all of them.

    layers  those of the Program given, with the weights that they have here, in the same order
    rows    layer -> int64: numbers of the outputs that it still has
    """

    program: Program
    layers: tuple[Layer, ...]
    rows: Mapping[str, Tensor]


def thin(program: Program, layers: Sequence[Layer]) -> Thinned:
    """Runs of outputs at even distances; the remainder of the outputs by RUN is kept, so that what divides them still does."""
    found, rows = program.clone(), {layer.path: _rows(layer.weight.shape[0]) for layer in layers}
    for layer in layers:
        kept = rows[layer.path]
        weight = nn.Parameter(layer.weight.detach()[kept].clone(), requires_grad=False)
        for use in layer.uses:
            _replace(found, use, "weight", weight)
            bias = use.op.kwargs.get("bias")
            if isinstance(bias, fx.Node) and bias.op == "get_attr":
                _replace(found, use, "bias", nn.Parameter(get_tensor(use.region.module, str(bias.target)).detach()[kept], requires_grad=False))
    by_path = {layer.path: layer for layer in find_layers(found, (), ())[0]}
    return Thinned(found, tuple(by_path[layer.path] for layer in layers), rows)


def can_be_thinned(choice: Pass, program: Program) -> bool:
    """Does the choice, as it is here, cut each layer by itself, by what is known of its inputs alone?"""
    names = {name for names in choice.needs(program).values() for name in names}
    return choice.layer_by_layer and all(STATISTICS[name].of == "input" for name in names)


def _rows(outputs: int) -> Tensor:
    if outputs <= MOST:
        return torch.arange(outputs)
    runs, rest = outputs // RUN, outputs % RUN
    starts = torch.linspace(0, runs - 1, MOST // RUN, dtype=torch.float64).round().long() * RUN
    return torch.cat([(starts[:, None] + torch.arange(RUN)).flatten(), torch.arange(outputs - rest, outputs)])


def _replace(program: Program, use: Use, name: str, tensor: Tensor) -> None:
    """Another tensor for what the op reads."""
    region, source = program.regions[use.region.path], use.op.kwargs[name]
    assert isinstance(source, fx.Node)
    set_tensor(region.module, str(source.target), tensor)
    region.node(source.name).meta["val"] = fake_like(tensor, mode_of(region))
