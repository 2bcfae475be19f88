"""Search for an order of a weight's rows under which the best blocks of neighbouring rows keep more score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify_compiler.passes.moe._balance import balanced, clusters
from sparsify_compiler.passes.prune.structures._base import keep_top, kept

GAIN = 1e-6  # of the score: less is rounding


def blocks_of(score: Tensor, rows: int) -> Tensor:
    """float [groups, columns]: the sums over blocks of `rows` neighbouring rows; rows divides those of the score."""
    return score.reshape(-1, rows, score.shape[1]).sum(1)


def best_blocks(sums: Tensor, density: float) -> Tensor:
    """bool [groups, columns]: the ceil(density * blocks) blocks of highest score."""
    return keep_top(sums.reshape(1, -1), kept(sums.numel(), density)).view(sums.shape)


def kept_in_blocks(scores: Sequence[Tensor], rows: int, density: float) -> float:
    """What the best blocks keep of all scores."""
    return sum(float(sums[best_blocks(sums, density)].sum(dtype=torch.float64)) for sums in (blocks_of(score, rows) for score in scores))


def search_rows(scores: Sequence[Tensor], rows: int, density: float, rounds: int, seed: int) -> Tensor:
    """An order int64 [channels] such that the scores, float [channels, columns] >= 0 each, keep no less in it than as they are.

    Channels whose scores have like directions become neighbours (balanced k-means). Then by turns the blocks that are kept are chosen for the
    groups, and the groups for the blocks: a channel goes where most of its score is kept, and every group has `rows` of them.
    """
    best = torch.arange(len(scores[0]), device=scores[0].device)
    most = kept_in_blocks(scores, rows, density) * (1 + GAIN)
    points = torch.cat(list(scores), 1)
    points = points / points.norm(dim=1, keepdim=True).clamp_min(torch.finfo(points.dtype).tiny)
    groups = len(best) // rows
    order = clusters(points.cpu(), groups, rounds, torch.Generator().manual_seed(seed)).to(best).argsort(stable=True)
    for number in range(rounds):
        found = kept_in_blocks([score[order] for score in scores], rows, density)
        if found > most:
            best, most = order, found * (1 + GAIN)
        elif number:
            break
        order = _reassigned(scores, order, rows, density).to(best).argsort(stable=True)
    return best


def _reassigned(scores: Sequence[Tensor], order: Tensor, rows: int, density: float) -> Tensor:
    """int64 [channels]: the group of each channel, for the blocks that are kept in an order."""
    gain = torch.zeros(len(order), len(order) // rows, dtype=scores[0].dtype, device=order.device)
    for score in scores:
        gain += score @ best_blocks(blocks_of(score[order], rows), density).to(score).T
    return balanced(-gain.cpu(), len(order) // rows)
