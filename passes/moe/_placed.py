"""Formulas written into a graph, as modules of their own in the model's paths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsify_compiler.fold import put
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.program import Region
from sparsify_compiler.splice import insert_formula


@dataclass(frozen=True)
class Placed:
    """Where formulas go: in front of a node, under a path; what they store are parameters like `leaves`, of a dtype."""

    region: Region
    before: fx.Node
    path: str
    leaves: tuple[fx.Node, ...]
    dtype: torch.dtype
    by: str

    def at(self, part: str) -> str:
        """The path of a part."""
        return ".".join(name for name in (self.path, part) if name)

    def stored(self, part: str, name: str, value: Tensor) -> fx.Node:
        """A parameter, in the model's dtype."""
        return put(self.region, self.before, value.to(self.dtype), name, self.leaves, {"path": self.at(part)}, self.by)

    def formula(self, part: str, formula: Formula, inputs: Mapping[str, fx.Node], experts: Mapping[str, fx.Node]) -> fx.Node:
        """The formula's nodes. `experts`: what else it may ask for by name."""
        known = dict(inputs) | {name: self.stored(part, name, value) for name, value in formula.tensors.items()}
        wanted = inspect.signature(formula.function).parameters
        known |= {name: put(self.region, self.before, value, name, (), {"path": self.at(part)}, self.by) for name, value in formula.buffers.items()}
        known |= {name: node for name, node in experts.items() if name in wanted and name not in known}
        last = self.before.prev
        result = insert_formula(self.region, self.before, formula.function, known, self.by)
        while last.next is not self.before:
            last = last.next
            last.meta["path"] = self.at(part)
        return result
