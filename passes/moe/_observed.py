"""What a mixture of experts does on the rows of calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsify_compiler.calibrate_rows import collect_rows
from sparsify_compiler.ops.experts_ffn import by_expert
from sparsify_compiler.passes.activation._units import in_groups
from sparsify_compiler.passes.moe._evidence import Ffn
from sparsify_compiler.passes.moe._routing import Mixture
from sparsify_compiler.passes_api import Context
from sparsify_compiler.program import Program


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


def gather(program: Program, found: Sequence[Mixture], ctx: Context) -> Iterator[tuple[Mixture, Observed]]:
    """What calibration sees of each, as many at a time as fit into memory. Raises CalibrationError where a mixture is not reached."""
    for group in in_groups(found, ctx.batches or ()):
        rows = collect_rows(program, ctx.batches or (), [(one.region.path, node.name) for one in group for node in one.places])[0]
        for one in group:
            x, chosen, *weights = (rows[one.region.path, node.name] for node in one.places)
            tensors = {name: tensor.float() for name, tensor in one.tensors().items()}
            yield one, Observed(x, chosen.long(), weights[0] if weights else torch.ones_like(chosen), tensors, one.op.kwargs["activation"], ctx.seed)
