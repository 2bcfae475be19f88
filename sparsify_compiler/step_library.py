"""The graph of one token as a library that runs beside torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from .export_library_cached import PAST
from .export_library_products import Products
from .library_here import LibraryHere, Placed, build_here, load_here
from .program import Program, get_tensor
from .step_graph import IDS, PLACES, STARTS, StepGraph
from .target import Target

if TYPE_CHECKING:
    from .codegen.whole_graph import Function, Product

NAME = "step"


@dataclass
class StepLibrary(LibraryHere):
    """What decodes one token: run(input_ids, position_ids, past, starts, caches...) -> (logits [B, 1, vocabulary],).

    caches  (groups, width) of each cache, keys before values, layer by layer
    dtype   of the caches and the logits
    """

    caches: tuple[tuple[int, int], ...]
    dtype: torch.dtype


def build_step(program: Program, step: StepGraph, target: Target) -> StepLibrary:
    """Compile it, or take it from the cache. Raises KernelError."""
    binary, parameters = build_here(program, step.region, target, (1,), lambda *made: _function(step, *made))
    return bound(binary, parameters, tuple(step.caches.values()), step.dtype, target)


def bound(binary: bytes, parameters: list[Placed], caches: tuple[tuple[int, int], ...], dtype: torch.dtype, target: Target) -> StepLibrary:
    """A library with its parameters. Raises KernelError."""
    made = load_here(binary, NAME, parameters, target)
    return StepLibrary(made.run, made.binary, made.parameters, caches, dtype)


def _function(step: StepGraph, graph: fx.Graph, found: Mapping[fx.Node, Product], computed: frozenset[fx.Node], products: Products) -> Function:
    from .codegen.whole_graph import Function, Input

    dtype = str(step.dtype).removeprefix("torch.")
    inputs = [Input(IDS, ("batch", 1), "int64"), Input(PLACES, ("batch", 1), "int64"), Input(PAST, (1,), "int64"), Input(STARTS, ("batch",), "int64"),
              *(Input(name, ("batch", groups, "capacity", width), dtype, updated=True) for name, (groups, width) in step.caches.items())]
    return Function(NAME, graph, lambda name: get_tensor(step.region.module, name), inputs, ["logits"], found, computed, tuple(products.reference),
                    one_token=True)
