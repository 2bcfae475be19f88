"""Low rank: what is skipped goes through a few directions of the weight (R-Sparse, arXiv:2504.19449, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsify_compiler.errors import ParseError
from sparsify_compiler.passes.activation.repairs._base import Repaired, Skipping

TRIALS = 4  # ranks: the largest, and halves of it
ROUNDS = 4  # of subspace iteration


def low_rank(skipping: Skipping, density: float, *, share: float = 0.2, always: bool = False) -> Repaired:
    """y = W select(x) + U (U' W) (x - select(x)): U are the principal components of what the skipped inputs would give, which needs no inverse.

    share   of the layer's density that the low-rank part may take: r = share * density * N * K / (N + K). A half, a quarter, an eighth and none of it
            are tried too; the one of the least error is taken, on every second row, U being found on the others (the paper searches for the
            share of each layer by evolution, and takes U from the singular vectors of W alone)
    always  take `share` without looking for a better one

    Raises ParseError for a share that is not between 0 and 1.
    """
    if not 0 <= share < 1:
        raise ParseError(f"the share of the low-rank part lies between 0 and 1, got {share}", where="repair low_rank")
    weight = skipping.weight.detach().float()
    each = sum(weight.shape) / weight.numel()  # of the layer's weights, that a direction needs
    largest = min(int(share * density / each), *weight.shape)
    if largest < 1:
        return Repaired(density)
    rank = largest
    if not always:
        writes = _directions(weight, skipping.skipped(density - largest * each)[::2], largest)
        ranks = [0, *(largest >> trial for trial in reversed(range(TRIALS)))]
        rank = min(ranks, key=lambda rank: _error(weight, skipping.skipped(density - rank * each)[1::2], writes[:, :rank]))
    if rank < 1:
        return Repaired(density)
    skipped = skipping.skipped(density - rank * each)
    writes = _directions(weight, skipped, rank)
    return Repaired(density - rank * each, (writes.t() @ weight, writes))


def _error(weight: Tensor, skipped: Tensor, writes: Tensor) -> float:
    missing = skipped @ weight.t()
    return float((missing - (missing @ writes) @ writes.t()).norm())


def _directions(weight: Tensor, skipped: Tensor, rank: int) -> Tensor:
    """[N, rank], orthonormal, the leading one first. The rows are fewer than their channels: only a half of their correlations is believed."""
    factor = torch.cat([skipped @ weight.t(), skipped.square().sum(0).sqrt()[:, None] * weight.t()])  # its square is W (X'X + diag(X'X)) W'
    found = torch.randn(weight.shape[0], rank, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for _ in range(ROUNDS):
        found = torch.linalg.qr(factor.t() @ (factor @ found)).Q
    seen = factor @ found
    vectors: Tensor = torch.linalg.eigh(seen.t() @ seen).eigenvectors
    return found @ vectors.flip(1)
