"""A low-rank copy of an FFN's gate and up projections, which says how much each neuron is expected to give for a row; it is not trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsify_compiler.passes.activation._predictor import HELD_OUT, top

RIDGE = 1e-4  # of the inputs' mean variance, added to each direction's: rows may be fewer than inputs
Activate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Copy:
    """first [rank, K]; second [sets * H, rank], second_bias [sets * H], rest [sets * H], one set for each projection; length [H]. float32.

    rest    root mean square of what the copy of a projection misses
    scores  on rows that it was not made from, and the share of what matters there that it finds at equal density
    """

    first: Tensor
    second: Tensor
    second_bias: Tensor
    rest: Tensor
    length: Tensor
    scores: Tensor
    recall: float


def expected(x: Tensor, first: Tensor, second: Tensor, second_bias: Tensor, rest: Tensor, length: Tensor, activations: Sequence[Activate]) -> Tensor:
    """Root of the expected square of what each neuron gives: x [..., K] -> float32 [..., H].

    What is missed of a projection is taken as +rest or -rest, so that the expectation is right to the second order for any activation.
    """
    known = functional.linear(functional.linear(x, first), second, second_bias).float()
    found = torch.ones_like(length, dtype=torch.float32)
    for activation, value, missed in zip(activations, known.chunk(len(activations), -1), rest.chunk(len(activations)), strict=True):
        found = found * (activation(value + missed).square() + activation(value - missed).square()) / 2
    return found.sqrt() * length


def copied(x: Tensor, importance: Tensor, projections: Sequence[tuple[Tensor, Tensor | None]], activations: Sequence[Activate], length: Tensor,
           rank: int, density: float) -> Copy:
    """The copy of these projections (weight [H, K], bias) that misses least on rows x [rows, K], together, at a rank.

    importance [rows, H] of each neuron there, and the density to choose, are for `recall` only. length [H]: of the weights that read a neuron.
    """
    measured = torch.arange(x.shape[0]) % HELD_OUT == HELD_OUT - 1 if x.shape[0] >= 2 * HELD_OUT else torch.ones(x.shape[0], dtype=torch.bool)
    rows = x[~measured] if bool((~measured).any()) else x
    weight = torch.cat([matrix.detach() for matrix, _ in projections]).double()
    bias = torch.cat([matrix.new_zeros(matrix.shape[0]) if vector is None else vector.detach() for matrix, vector in projections]).double()
    mean = rows.double().mean(0)
    moved = rows.double() - mean
    covariance = moved.t() @ moved / len(rows)
    covariance += (RIDGE * covariance.diagonal().mean()).clamp_min(1e-30) * torch.eye(len(covariance), dtype=torch.float64)
    root = torch.linalg.cholesky(covariance)
    seen = weight @ root
    directions = torch.linalg.eigh(seen.t() @ seen).eigenvectors[:, -min(rank, len(root)):]
    first = torch.linalg.solve_triangular(root.t(), directions, upper=True).t()
    second = seen @ directions
    second_bias = bias + weight @ mean - second @ (first @ mean)
    missed = moved @ (weight - second @ first).t()
    thin, bias, rest = (first.float(), second.float()), second_bias.float(), missed.square().mean(0).sqrt().float()
    scores = expected(x[measured], *thin, bias, rest, length, activations)
    truth = top(importance[measured], density)
    hits = top(scores, density) & truth
    return Copy(*thin, bias, rest, length, scores, float(hits.sum() / truth.sum().clamp_min(1)))
