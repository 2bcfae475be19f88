"""A mixture of experts of a graph, and what it does on the rows of calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from sparsify_compiler.calibrate_rows import collect_rows
from sparsify_compiler.fold import evaluate, is_constant, masks
from sparsify_compiler.normal_form_edit import value
from sparsify_compiler.ops.experts_ffn import by_expert
from sparsify_compiler.passes.activation._units import in_groups
from sparsify_compiler.passes.moe._evidence import Ffn
from sparsify_compiler.passes.train._routing import routed
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program, Region, Site

STACKED = ("gate", "up", "down", "gate_bias", "up_bias", "bias")  # arguments of the op with one entry for each expert


@dataclass(frozen=True)
class Mixture:
    """One experts_ffn in its graph; scores is what its router scores the experts by, where that is known."""

    region: Region
    site: Site
    op: Any
    scores: fx.Node | None

    @property
    def stacked(self) -> dict[str, fx.Node]:
        """The nodes of its weights, by the op's arguments."""
        return {name: node for name in STACKED if isinstance(node := self.op.kwargs.get(name), fx.Node)}

    @property
    def experts(self) -> int:
        """E."""
        gate = value(self.op.kwargs["gate"])
        assert gate is not None
        return int(gate.shape[0])

    @property
    def places(self) -> list[fx.Node]:
        """What calibration looks at: what the mixture reads, the choice, and its weights where there are some."""
        return [node for name in ("x", "chosen", "weights") if isinstance(node := self.op.kwargs.get(name), fx.Node)]

    @property
    def bytes_a_row(self) -> int:
        """Of what calibration keeps."""
        return sum(4 * int(node.meta["val"].shape[-1]) for node in self.places)

    def tensors(self) -> dict[str, Tensor]:
        """Its weights, in their own dtype."""
        return {name: evaluate(self.region, node) for name, node in self.stacked.items()}

    def unfit(self) -> str | None:
        """Why its experts cannot be changed; None where they can."""
        if not all(is_constant(node) for node in self.stacked.values()):
            return "its weights are not stored"
        if any(masks(self.region, node) for node in self.stacked.values()):
            return "its weights are masked: drop experts first, and prune those that stay"
        return None


@dataclass(frozen=True)
class Observed:
    """A mixture on R rows of calibration.

    x        float32 [R, K]
    chosen   int64 [R, k], -1 for none
    weights  float32 [R, k], ones where the mixture has none
    tensors  the experts' own, float32, by the arguments of experts_ffn
    """

    x: Tensor
    chosen: Tensor
    weights: Tensor
    tensors: dict[str, Tensor]
    activation: str
    seed: int

    @property
    def experts(self) -> int:
        """E."""
        return int(self.tensors["gate"].shape[0])

    @cached_property
    def times(self) -> Tensor:
        """float32 [E]: how often each expert was chosen."""
        return self.summed(torch.ones_like(self.weights))

    @cached_property
    def lengths(self) -> Tensor:
        """float32 [R, k]: ||expert(x)|| of each row's choices, 0 where there is none."""
        found = torch.zeros(self.chosen.numel(), dtype=torch.float32)
        for expert, places in by_expert(self.chosen, self.experts):
            found[places] = self.output(expert, self.x[places // self.chosen.shape[1]]).norm(dim=1)
        return found.view_as(self.weights)

    def summed(self, values: Tensor) -> Tensor:
        """float32 [E]: of values [R, k] those of each expert's places, together."""
        found = torch.zeros(self.experts + 1, dtype=torch.float64)
        return found.index_add_(0, self.chosen.flatten() + 1, values.double().flatten())[1:].float()

    def output(self, expert: int, x: Tensor) -> Tensor:
        """What an expert gives for these rows, [rows, N]."""
        own = {name: tensor[expert] for name, tensor in self.tensors.items()}
        return torch.nn.functional.linear(self.ffn(expert).hidden(x), own["down"], own.get("bias"))

    def ffn(self, expert: int) -> Ffn:
        """An expert as the FFN that it is."""
        return Ffn(activation=self.activation, **{name: tensor[expert] for name, tensor in self.tensors.items()})

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the seed alone."""
        return torch.Generator().manual_seed(self.seed)


def mixtures(program: Program, ctx: Context) -> list[Mixture]:
    """All of them, in the order of execution; a miss where the model has none."""
    return [Mixture(program.regions[one.site.region], one.site, program.regions[one.site.region].node(one.site.roles["op"]), one.scores)
            for one in routed(program, ctx)]


def gather(program: Program, found: Sequence[Mixture], ctx: Context) -> Iterator[tuple[Mixture, Observed]]:
    """What calibration sees of each, as many at a time as fit into memory. Raises CalibrationError where a mixture is not reached."""
    for group in in_groups(found, ctx.batches or ()):
        rows = collect_rows(program, ctx.batches or (), [(one.region.path, node.name) for one in group for node in one.places])[0]
        for one in group:
            x, chosen, *weights = (rows[one.region.path, node.name] for node in one.places)
            tensors = {name: tensor.float() for name, tensor in one.tensors().items()}
            yield one, Observed(x, chosen.long(), weights[0] if weights else torch.ones_like(chosen), tensors, one.op.kwargs["activation"], ctx.seed)
