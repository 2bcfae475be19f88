"""Tree: a soft decision tree over the experts, whose splits are a whole yes or no beyond a margin (COMET, arXiv:2306.02824)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task, normal

STEPS = 20  # of Sinkhorn's algorithm


def tree(task: Task, *, margin: float = 1.0, trees: int = 1, order: bool = False) -> Formula:
    """The logarithm of the probability that a row ends at the expert's leaf, in the softmax over the leaves of all trees. Splits begin at random.

    margin  of a split's linear, half of it to either side, between no and yes
    trees   how many: where splits are whole, a row reaches one leaf of each, so that no more experts have a probability
    order   learn which expert stands at which leaf, in each tree: shares that settle_order() makes one and zeros in training, the colder the more

    A leaf counts by the exponential of its own linear function of the row, which begins as 1, times the probability to reach it. Raises ParseError
    for a margin that is not above 0, and for no tree.
    """
    if margin <= 0 or trees < 1:
        raise ParseError(f"margin lies above 0 and trees is 1 or more, got {margin} and {trees}", where="router tree")
    width = task.evidence.ffn.gate.shape[1]
    splits = torch.zeros(task.experts, max(task.experts - 1, 1), dtype=torch.int64)
    _grow(splits, list(range(task.experts)), 0)
    weight = normal((trees * splits.shape[1], width), task.evidence)
    tensors = {"weight": weight, "leaf": torch.zeros(trees * task.experts, width, dtype=torch.float32),
               "leaf_offset": torch.zeros(trees * task.experts, dtype=torch.float32)}
    if not order:
        return Formula(tensors, partial(_leaves, margin=margin, trees=trees), {"splits": splits})
    tensors["order"] = torch.rand(trees, task.experts, task.experts, generator=task.evidence.generator(), dtype=torch.float32) / 10
    return Formula(tensors, partial(_ordered, margin=margin, trees=trees), {"splits": splits, "heat": torch.tensor(0.1, dtype=torch.float32)})


def _grow(splits: Tensor, leaves: list[int], node: int) -> int:
    """Number the splits of a balanced tree over these leaves from `node` on; 1 and -1 say to which side a leaf lies. Returns the next number."""
    if len(leaves) < 2:
        return node
    half = len(leaves) // 2
    splits[leaves[:half], node], splits[leaves[half:], node] = 1, -1
    return _grow(splits, leaves[half:], _grow(splits, leaves[:half], node + 1))


def _leaves(x: Tensor, weight: Tensor, leaf: Tensor, leaf_offset: Tensor, splits: Tensor, *, margin: float, trees: int) -> Tensor:
    scores: Tensor = _weighed(x, weight, leaf, leaf_offset, splits, margin, trees).logsumexp(-2)
    return scores


def _ordered(x: Tensor, weight: Tensor, leaf: Tensor, leaf_offset: Tensor, order: Tensor, splits: Tensor, heat: Tensor, *, margin: float,
             trees: int) -> Tensor:
    leaves = _weighed(x, weight, leaf, leaf_offset, splits, margin, trees)
    scores: Tensor = (leaves.unsqueeze(-1) + shares(order / heat)).logsumexp((-3, -2))
    return scores


def _weighed(x: Tensor, weight: Tensor, leaf: Tensor, leaf_offset: Tensor, splits: Tensor, margin: float, trees: int) -> Tensor:
    """[..., trees, leaves]: the logarithm of a leaf's probability times what it counts."""
    yes = smooth_step(linear(x, weight).float() / margin).unflatten(-1, (trees, 1, splits.shape[1]))  # type: ignore[no-untyped-call]
    sides = torch.where(splits > 0, yes, torch.where(splits < 0, 1 - yes, 1.0))
    reached = sides.prod(-1).clamp_min(1e-30).log()
    own = linear(x, leaf, leaf_offset).float().unflatten(-1, (trees, splits.shape[0]))  # type: ignore[no-untyped-call]
    found: Tensor = own + reached
    return found


def shares(logits: Tensor) -> Tensor:
    """The logarithms of numbers [..., n, n] whose rows and columns sum to about 1, by Sinkhorn's algorithm; of logits far apart, a permutation."""
    for _ in range(STEPS):
        logits = logits - logits.logsumexp(-1, keepdim=True)
        logits = logits - logits.logsumexp(-2, keepdim=True)
    return logits


def smooth_step(t: Tensor) -> Tensor:
    """0 below -1/2, 1 above 1/2, and the cubic between them whose slope is 0 at both ends."""
    t = t.clamp(-0.5, 0.5)
    return t * (1.5 - 2 * t * t) + 0.5
