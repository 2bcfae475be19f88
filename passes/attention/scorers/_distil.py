"""Training a scorer to say what attention itself says: its shares of blocks, taken from calibration batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RATE, HELD_OUT = 3e-3, 8  # of AdamW; every how many-th row of blocks measures, instead of training


@dataclass(frozen=True)
class Sample:
    """One call of an attention: what its queries and keys are scored by, [B, H, NQ, ...] and [B, G, NK, ...]; the shares that the scores should have,
    [B, H, NQ, NK], whose rows sum to 1 or 0; and which pairs of blocks are visible, bool [NQ, NK]."""

    query: Tensor
    key: Tensor
    wanted: Tensor
    visible: Tensor


def distilled(scored: Callable[..., Tensor], samples: tuple[Sample, ...], start: tuple[Tensor, ...], epochs: int) -> tuple[Tensor, ...]:
    """Tensors by which scored(query, key, *tensors) has the wanted shares in its softmax: of least Kullback-Leibler divergence on the rows held out.

    AdamW along a cosine, a step a sample and epoch; where nothing gets better than `start`, that is what comes back.
    """
    best, least = start, math.inf
    with torch.inference_mode(False), torch.enable_grad():
        tensors = [tensor.clone().requires_grad_() for tensor in start]
        optimizer = torch.optim.AdamW(tensors, RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs * len(samples), 1))
        for _ in range(epochs + 1):
            held = sum(float(_divergence(scored, sample, tensors, held=True).detach()) for sample in samples)
            if held < least:
                best, least = tuple(tensor.detach().clone() for tensor in tensors), held
            for sample in samples:
                optimizer.zero_grad()
                _divergence(scored, sample, tensors, held=False).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return best


def _divergence(scored: Callable[..., Tensor], sample: Sample, tensors: list[Tensor], held: bool) -> Tensor:
    """The mean over the rows that are held out, or over the others; over all where there are too few to hold any out."""
    rows = torch.arange(sample.wanted.shape[2], device=sample.wanted.device)
    if len(rows) >= HELD_OUT:
        rows = rows[(rows % HELD_OUT == HELD_OUT - 1) == held]
    scores = scored(sample.query[:, :, rows].clone(), sample.key.clone(), *tensors)  # clones: inference tensors take no part in training
    said = torch.log_softmax(scores.masked_fill(~sample.visible.to(rows.device)[rows], -1e9), -1)
    wanted = sample.wanted[:, :, rows]
    return (wanted * (wanted.clamp(min=1e-9).log() - said)).sum(-1).mean()
