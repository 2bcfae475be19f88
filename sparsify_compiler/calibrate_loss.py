"""The loss that calibration differentiates where the user gives none: what can be asked of a model without labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from .errors import CalibrationError

Loss = Callable[[Any, Any], Tensor]  # (the model's output, the batch) -> one number


def self_supervised(output: Any, batch: tuple[Any, ...] | Mapping[str, Any]) -> Tensor:
    """Next-token cross entropy where some output is logits [batch, tokens, words] of token numbers in the batch; else the outputs' mean square.

    Tokens that a mask of the same shape in the batch marks with 0 are not counted. Raises CalibrationError where no output has a gradient.
    """
    outputs = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
    if not outputs:
        raise CalibrationError("no output of the model depends on its weights in a way that has a gradient", where="calibration",
                               hint="give a loss of your own, or a score that needs no gradient")
    found = _of_tokens(outputs[0], batch)
    return torch.stack([x.float().square().mean() for x in outputs]).sum() if found is None else found[0]


def next_token_loss(output: Any, batch: tuple[Any, ...] | Mapping[str, Any]) -> tuple[Tensor, int]:
    """Next-token cross entropy of the first output that is logits of token numbers in the batch, a mean, and of how many tokens.

    Raises CalibrationError where there is none.
    """
    outputs = [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
    found = next((loss for x in outputs if (loss := _of_tokens(x, batch)) is not None), None)
    if found is None:
        raise CalibrationError("no output is logits [batch, tokens, words] of token numbers in the batch", where="calibration",
                               hint="give loss(output, batch) -> one number, whose exp is then taken for the perplexity")
    return found


def _of_tokens(logits: Tensor, batch: tuple[Any, ...] | Mapping[str, Any]) -> tuple[Tensor, int] | None:
    tokens = tokens_of(logits, batch)
    if tokens is None:
        return None
    target = tokens[:, 1:].clone()
    mask = mask_of(tokens, batch)
    if mask is not None:
        target[mask[:, 1:] == 0] = -100
    total, count = cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="sum"), int((target != -100).sum())
    return total / max(count, 1), count


def differentiate(loss: Loss, output: Any, batch: Any, weights: list[Tensor]) -> list[Tensor | None]:
    """The gradients of the loss by each weight; None where it does not depend on one. Raises CalibrationError for a loss that is no such number."""
    value = loss(output, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise CalibrationError(f"the loss must be one number, got {found}", where="calibration",
                               hint="return a tensor of one element from loss(output, batch)")
    if not value.requires_grad:
        raise CalibrationError("the loss does not depend on the weights", where="calibration",
                               hint="compute it from the output with torch operations")
    if not bool(value.isfinite()):
        raise CalibrationError("the loss is NaN or infinite on a calibration batch", where="calibration")
    return list(torch.autograd.grad(value.reshape(()), weights, allow_unused=True))


def tokens_of(logits: Tensor, batch: tuple[Any, ...] | Mapping[str, Any]) -> Tensor | None:
    """The token numbers that logits [batch, tokens, words] are of: the integers of shape [batch, tokens] that are all words."""
    for value in _tensors(batch):
        alike = logits.dim() == 3 and value.dtype == torch.long and value.shape == logits.shape[:2] and value.shape[1] > 1
        if alike and int(value.min()) >= 0 and 1 < int(value.max()) < logits.shape[2]:
            return value
    return None


def mask_of(tokens: Tensor, batch: tuple[Any, ...] | Mapping[str, Any]) -> Tensor | None:
    """The tensor of zeros and ones in the batch that has the shape of `tokens`: what is padding (0) and what is not. None where there is none."""
    for value in _tensors(batch):
        if value is not tokens and value.shape == tokens.shape and bool(((value == 0) | (value == 1)).all()) and bool(value.any()):
            return value
    return None


def _tensors(batch: tuple[Any, ...] | Mapping[str, Any]) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch) if isinstance(x, Tensor)]
