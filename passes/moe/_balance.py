"""Experts of equal size: assignments that respect it, and clusters made with them."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS, SHARP = 60, 50.0  # of the prices below: rounds, and how sharply a neuron prefers the cheaper expert
PATIENCE = 1e-4


def balanced(cost: Tensor, experts: int) -> Tensor:
    """int64 [rows]: an expert for each row of cost [rows, experts], at most ceil(rows / experts) rows each, of a small total cost.

    Prices make all experts equally wanted (Sinkhorn's scaling); rows then go to the cheapest expert that prefers nobody else.
    """
    rows = cost.shape[0]
    scaled = cost / cost.std(correction=0).clamp_min(1e-30) if cost.numel() else cost
    price = torch.zeros(experts, dtype=cost.dtype)
    for _ in range(STEPS):
        wish = (-SHARP * (scaled + price)).softmax(1).sum(0) * experts / max(rows, 1)
        price += wish.clamp_min(1e-6).log() / SHARP
    return _matched(scaled + price, -(-rows // experts))


def _matched(cost: Tensor, capacity: int) -> Tensor:
    """Rows ask for experts in the order of their costs; an expert keeps the cheapest `capacity` of all who asked."""
    rows, experts = cost.shape
    order = cost.argsort(dim=1, stable=True)
    asked = torch.zeros(rows, dtype=torch.int64)
    while True:
        chosen = order.gather(1, asked[:, None])[:, 0]
        refused = torch.zeros(rows, dtype=torch.bool)
        for expert in torch.bincount(chosen, minlength=experts).gt(capacity).nonzero()[:, 0].tolist():
            mine = (chosen == expert).nonzero()[:, 0]
            refused[mine[cost[mine, expert].argsort(stable=True)[capacity:]]] = True
        if not bool(refused.any()):
            return chosen
        asked[refused] += 1


def table_of(neurons: Tensor, assigned: Tensor, experts: int) -> Tensor:
    """int64 [experts, size]: the neurons of each expert in ascending order, filled up with -1. neurons and assigned int64 [rows]."""
    size = -(-neurons.numel() // experts)
    table = torch.full((experts, size), -1, dtype=torch.int64)
    for expert in range(experts):
        mine = neurons[assigned == expert].sort().values
        table[expert, : mine.numel()] = mine
    return table


def clusters(points: Tensor, experts: int, rounds: int, generator: torch.Generator) -> Tensor:
    """int64 [rows]: balanced k-means of points [rows, features], from centres that lie far from each other (k-means++)."""
    squares = points.square().sum(1)
    centres = points[_spread(points, squares, experts, generator)]
    before = float("inf")
    while True:
        cost = squares[:, None] - 2 * points @ centres.T + centres.square().sum(1)
        assigned = balanced(cost, experts)
        total = float(cost.gather(1, assigned[:, None]).sum())
        rounds -= 1
        if rounds <= 0 or total >= before * (1 - PATIENCE):
            return assigned
        before = total
        members = torch.nn.functional.one_hot(assigned, experts).to(points.dtype)
        centres = (members.T @ points) / members.sum(0).clamp_min(1)[:, None]


def _spread(points: Tensor, squares: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of points, each drawn with the squared distance from those before."""
    chosen = [int(torch.randint(points.shape[0], (), generator=generator))]
    far = torch.full_like(squares, float("inf"))
    while len(chosen) < count:
        last = chosen[-1]
        far = torch.minimum(far, (squares - 2 * points @ points[last] + squares[last]).clamp_min(0))
        odds = (far if bool(far.sum() > 0) else torch.ones_like(far)).double().cumsum(0)
        drawn = odds[-1] * torch.rand((), generator=generator, dtype=torch.float64)
        chosen.append(min(int(torch.searchsorted(odds, drawn, right=True)), points.shape[0] - 1))
    return torch.tensor(chosen, dtype=torch.int64)
