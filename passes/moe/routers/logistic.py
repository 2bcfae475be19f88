"""Logistic: the odds that an expert is among those that matter most in the row, linear in x, trained on calibration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from sparsify_compiler.passes.activation._predictor import margins
from sparsify_compiler.passes.moe._evidence import Formula
from sparsify_compiler.passes.moe.routers._base import Task, scored

STATISTICS = ("rows",)


def logistic(task: Task, *, damp: float = 1e-3, steps: int = 40) -> Formula:
    """Cross entropy weighted with how much it matters that the expert is chosen, by L-BFGS, with damp times the squared weights added."""
    x, margin = task.evidence.x, margins(task.wanted, task.share).float()
    mean, deviation = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    rows, labels, weights = (x - mean) / deviation, (margin >= 0).float(), margin.abs()
    with torch.inference_mode(False), torch.enable_grad():
        weight = torch.zeros(task.experts, x.shape[1], dtype=torch.float32, requires_grad=True)
        offset = torch.zeros(task.experts, dtype=torch.float32, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, offset], max_iter=steps, history_size=8, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            found = binary_cross_entropy_with_logits(linear(rows, weight, offset), labels, weights) + damp * weight.square().mean(0).sum()
            found.backward()  # type: ignore[no-untyped-call]
            return found

        optimizer.step(loss)  # type: ignore[no-untyped-call]
    scaled = (weight / deviation).detach()
    return Formula({"weight": scaled, "offset": offset.detach() - scaled @ mean}, scored)
