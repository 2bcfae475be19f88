"""Gumbel: a softmax with Gumbel noise over all candidates of each n:m group (MaskLLM, arXiv:2409.17481)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from sparsify_compiler.errors import InputError
from sparsify_compiler.passes.prune.structures.nm import NM
from sparsify_compiler.passes.train.choosers._base import Choice, Chooser

MOST = 256  # candidates of a group, each of which has a score


@dataclass(frozen=True, kw_only=True)
class Gumbel(Chooser):
    """In training a weight counts by the probability, drawn anew in each pass, of the candidates that keep it; the likeliest candidate is the mask.

    scale        what scores are multiplied with at the beginning and at the end, in between along a line
    temperature  likewise: high ones mix the candidates, low ones draw nearly one
    spread       standard deviation of the scores at first
    prior        how many of those a candidate is ahead for each weight that it has in common with the mask that is there, above the average
    """

    scale: tuple[float, ...] = (100.0, 500.0)
    temperature: tuple[float, ...] = (4.0, 0.05)
    spread: float = 0.01
    prior: float = 3.0

    def __post_init__(self) -> None:
        for name in ("scale", "temperature"):
            if len(getattr(self, name)) != 2 or min(getattr(self, name)) <= 0:
                raise InputError(f"{name} is two numbers above 0, at first and at last, got {getattr(self, name)}", where="chooser gumbel")

    def check(self, choice: Choice, shape: tuple[int, ...]) -> None:
        form = choice.structure
        if not isinstance(form, NM):
            raise InputError(f"chooses among the candidates of n:m groups, not of {form}", where="chooser gumbel",
                             hint="mask_weights(structure='2:4'), or the chooser top_k")
        if _length(form, shape) % form.m:
            raise InputError(f"{list(shape)} does not divide into groups of {form.m}", where="chooser gumbel", hint="name the layer in ignore=")
        if math.comb(form.m, form.n) > MOST:
            raise InputError(f"{form} has {math.comb(form.m, form.n)} candidates a group, more than {MOST}", where="chooser gumbel", hint="top_k")

    def start(self, mask: Tensor, choice: Choice) -> Tensor:
        form = _form(choice)
        groups = _grouped(mask, form).float()
        noise = torch.randn(len(groups), math.comb(form.m, form.n), generator=choice.noise(torch.device("cpu")), dtype=torch.float32)
        common = groups @ _candidates(form, mask.device).T - form.n**2 / form.m
        return self.spread * (noise.to(mask.device) + self.prior * common)

    def soft(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        form, t = _form(choice), choice.progress
        scale, temperature = ((1 - t) * first + t * last for first, last in (self.scale, self.temperature))
        drawn = torch.empty_like(scores).exponential_(generator=choice.noise(scores.device))
        shares = ((scores * scale - drawn.clamp_min(torch.finfo(drawn.dtype).tiny).log()) / temperature).softmax(1)
        with torch.autocast(scores.device.type, enabled=False):  # a user's autocast would round the shares to 16 bits
            return _whole(shares.float() @ _candidates(form, scores.device), mask, form)

    def mask(self, scores: Tensor, mask: Tensor, choice: Choice) -> Tensor:
        form = _form(choice)
        return _whole(_candidates(form, scores.device).bool()[scores.argmax(1)], mask, form)


def _form(choice: Choice) -> NM:
    assert isinstance(choice.structure, NM)  # check() saw to it
    return choice.structure


def _length(form: NM, shape: tuple[int, ...]) -> int:
    return math.prod(shape[1:]) if form.along == "inputs" else shape[0]


def _candidates(form: NM, device: torch.device) -> Tensor:
    """float32 [candidates, m]: 1 where one keeps a weight."""
    kept = torch.tensor(list(combinations(range(form.m), form.n)), device=device)
    return torch.zeros(len(kept), form.m, dtype=torch.float32, device=device).scatter_(1, kept, 1.0)


def _grouped(mask: Tensor, form: NM) -> Tensor:
    """[groups, m] of a weight's shape [out, in, ...]."""
    flat = mask.reshape(mask.shape[0], -1)
    return (flat if form.along == "inputs" else flat.T).reshape(-1, form.m)


def _whole(groups: Tensor, like: Tensor, form: NM) -> Tensor:
    """The reverse."""
    rows = like.shape[0]
    return groups.reshape(rows, -1).view(like.shape) if form.along == "inputs" else groups.reshape(-1, rows).T.reshape(like.shape)
