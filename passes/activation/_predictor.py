"""A small network that says of every unit (neuron, head) how probably it is among those that matter for a row, and how it is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

BATCH, RATE = 64, 3e-3
HELD_OUT = 8  # every how many-th row measures, instead of training


@dataclass(frozen=True)
class Predictor:
    """scores = sigmoid(second relu(first x + first_bias) + second_bias): x [..., K] -> [..., units]. first [rank, K], second [units, rank], float32.

    scores on the rows it was not trained on, and the share of what matters there that it finds at equal density
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    scores: Tensor
    recall: float


def hidden(x: Tensor, first: Tensor, first_bias: Tensor) -> Tensor:
    """relu(first x + first_bias). Written as a clamp: with a relu, a predictor would be taken for one of the model's own FFNs."""
    return functional.linear(x, first, first_bias).clamp_min(0)


def scored(inner: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
    """sigmoid(second inner + second_bias), in float32."""
    return torch.sigmoid(functional.linear(inner, second, second_bias).float())


def top(importance: Tensor, density: float) -> Tensor:
    """bool [rows, units]: the units of each row that matter most, as many as make the density, at least one."""
    count = min(max(1, round(density * importance.shape[1])), importance.shape[1])
    return torch.zeros_like(importance, dtype=torch.bool).scatter_(1, importance.topk(count, 1).indices, True)


def margins(importance: Tensor, density: float) -> Tensor:
    """How far above the least important unit that is kept, or below it, each one lies, in units of the row's mean distance: float16 [rows, units]."""
    limit = importance.masked_fill(~top(importance, density), float("inf")).amin(1, keepdim=True)
    distance = importance - limit
    return (distance / distance.abs().mean(1, keepdim=True).clamp_min(1e-30)).half()


def fit(x: Tensor, margin: Tensor, rank: int, epochs: int, seed: int) -> list[Predictor]:
    """One predictor for each set of margins(), all with the same first layer: x [rows, K], margin [sets, rows, units].

    Binary cross entropy on whether a unit is kept, weighted with how much it matters that it is: the margin's size. AdamW along a cosine, on rows
    brought to mean 0 and deviation 1; that scale goes into the first layer afterwards.
    """
    measured = torch.arange(x.shape[0]) % HELD_OUT == HELD_OUT - 1 if x.shape[0] >= 2 * HELD_OUT else torch.ones(x.shape[0], dtype=torch.bool)
    trained = (~measured if bool((~measured).any()) else measured).nonzero()[:, 0]
    mean, deviation = x[trained].mean(0), x[trained].std(0, correction=0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(seed)
    sets, _, units = margin.shape
    wanted = margin >= 0
    with torch.inference_mode(False), torch.enable_grad():
        first = (torch.randn(rank, x.shape[1], generator=generator, dtype=torch.float32) / math.sqrt(x.shape[1])).requires_grad_()
        second = (torch.randn(sets * units, rank, generator=generator, dtype=torch.float32) / math.sqrt(rank)).requires_grad_()
        odds = wanted[:, trained].float().mean(1).clamp(1e-3, 1 - 1e-3)
        biases = [torch.zeros(rank, dtype=torch.float32).requires_grad_(), (odds / (1 - odds)).log().flatten().requires_grad_()]
        optimizer = torch.optim.AdamW([first, second, *biases], RATE, weight_decay=0.01)
        steps = max(1, epochs * math.ceil(len(trained) / BATCH))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            for chosen in torch.split(trained[torch.randperm(len(trained), generator=generator)], BATCH):
                inner = hidden((x[chosen] - mean) / deviation, first, biases[0])
                logits = functional.linear(inner, second, biases[1]).view(len(chosen), sets, units)
                labels, weights = wanted[:, chosen].transpose(0, 1).float(), margin[:, chosen].transpose(0, 1).float().abs()
                loss = functional.binary_cross_entropy_with_logits(logits, labels, weights)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    parts = [part.detach() for part in (first / deviation, biases[0] - (first / deviation) @ mean, second, biases[1])]
    inner = hidden(x[measured], *parts[:2])
    found = []
    for number in range(sets):
        mine = (parts[2].view(sets, units, rank)[number].clone(), parts[3].view(sets, units)[number].clone())
        scores, truth = scored(inner, *mine), wanted[number, measured]
        hits = top(scores, float(truth.float().mean())) & truth
        found.append(Predictor(parts[0], parts[1], *mine, scores, float(hits.sum() / truth.sum().clamp_min(1))))
    return found
