"""Tree: a soft decision tree over the experts, whose splits are a whole yes or no beyond a margin (COMET, arXiv:2306.02824)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task, normal


def tree(task: Task, *, margin: float = 1.0) -> Formula:
    """The logarithm of the probability that a row ends at the expert's leaf: weights of softmax are these probabilities. Splits begin at random.

    margin: of a split's linear, half of it to either side, between no and yes. Raises ParseError for one that is not above 0.
    """
    if margin <= 0:
        raise ParseError(f"margin lies above 0, got {margin}", where="router tree")
    splits = torch.zeros(task.experts, max(task.experts - 1, 1), dtype=torch.int64)
    _grow(splits, list(range(task.experts)), 0)
    weight = normal((splits.shape[1], task.evidence.ffn.gate.shape[1]), task.evidence)
    return Formula({"weight": weight}, partial(_leaves, margin=margin), {"splits": splits})


def _grow(splits: Tensor, leaves: list[int], node: int) -> int:
    """Number the splits of a balanced tree over these leaves from `node` on; 1 and -1 say to which side a leaf lies. Returns the next number."""
    if len(leaves) < 2:
        return node
    half = len(leaves) // 2
    splits[leaves[:half], node], splits[leaves[half:], node] = 1, -1
    return _grow(splits, leaves[half:], _grow(splits, leaves[:half], node + 1))


def _leaves(x: Tensor, weight: Tensor, splits: Tensor, *, margin: float) -> Tensor:
    yes = smooth_step(linear(x, weight).float() / margin)[..., None, :]
    sides = torch.where(splits > 0, yes, torch.where(splits < 0, 1 - yes, 1.0))
    return sides.prod(-1).clamp_min(1e-30).log()


def smooth_step(t: Tensor) -> Tensor:
    """0 below -1/2, 1 above 1/2, and the cubic between them whose slope is 0 at both ends."""
    t = t.clamp(-0.5, 0.5)
    return t * (1.5 - 2 * t * t) + 0.5
