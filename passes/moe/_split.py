"""One FFN divided into experts: which neurons are where, and the weights that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._evidence import Evidence, Ffn

VECTORS = (32, 16)  # neurons of which kernels read an expert whole: of every dtype, of float32 alone
NEAR = 0.15  # an expert may have as many more or fewer neurons for that


@dataclass(frozen=True)
class Split:
    """y = sum of weights * (down[e] hidden(gate[e] x + .., up[e] x + ..) + bias[e]) over the chosen experts + shared_down hidden(...) + base.

    table   int64 [E, S]: the neurons of each expert, -1 for none
    always  int64 [H']: the neurons of the shared expert; none where it is empty
    own     gate and up [E, S, K], gate_bias and up_bias [E, S], as far as the FFN has them
    down, bias         [E, N, S]; [E, N], None for zeros
    shared, base       the shared expert's own tensors, down [N, H']; [N], None for zeros
    """

    table: Tensor
    always: Tensor
    own: Mapping[str, Tensor]
    down: Tensor
    shared: Mapping[str, Tensor]
    base: Tensor | None
    bias: Tensor | None = None

    @staticmethod
    def of(ffn: Ffn, table: Tensor, always: Tensor) -> Split:
        """The FFN's own weights, in their places."""
        own = ffn.part(table)
        down = own.pop("down").transpose(0, 1).contiguous()
        return Split(table, always, own, down, ffn.part(always), ffn.bias)

    @property
    def experts(self) -> int:
        """E."""
        return self.table.shape[0]

    def activated(self, chosen: Tensor, neurons: int) -> float:
        """The share of this many neurons that a row computes, on average over the rows of chosen."""
        sizes = (self.table >= 0).sum(1).double()
        return float((times(chosen, self.experts).double() @ sizes).mean() + self.always.numel()) / neurons


def times(chosen: Tensor, experts: int) -> Tensor:
    """float32 [R, E]: how often a row chose an expert. chosen int64 [R, k], -1 for none."""
    found = torch.zeros(chosen.shape[0], experts + 1, dtype=torch.float32)
    return found.scatter_add_(1, chosen + 1, torch.ones(chosen.shape, dtype=torch.float32))[:, 1:]


def divided(evidence: Evidence, importance: Tensor, shared: float, experts: int) -> tuple[Tensor, Tensor]:
    """(neurons that are always computed, neurons that are routed), int64, ascending: the first are the most important ones, `shared` of all.

    Some more are shared where an expert of the others then is a whole number of vectors: kernels read no others.
    """
    neurons = evidence.ffn.neurons
    count = min(round(shared * neurons), neurons)
    size = (neurons - count) / experts
    if count and (fewer := whole(size)) < size:
        count = neurons - fewer * experts
    order = importance.argsort(descending=True, stable=True)
    return order[:count].sort().values, order[count:].sort().values


def whole(size: float) -> int:
    """The number of neurons near this one that makes whole vectors; rounded up itself where there is none."""
    for vector in VECTORS:
        found = round(size / vector) * vector
        if abs(found - size) <= NEAR * size:
            return found
    return -int(-size // 1)


def filled(table: Tensor) -> Tensor:
    """The table [E, S] of neurons with more -1 behind, where an expert of whole vectors is a little larger."""
    return torch.nn.functional.pad(table, (0, max(0, whole(table.shape[1]) - table.shape[1])), value=-1)
