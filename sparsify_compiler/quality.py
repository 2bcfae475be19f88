"""Quality: the user's own metric, or, when there is none, how far the outputs moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calibrate_loss import Loss, next_token_loss
from .errors import CalibrationError, InputError

MAX_LOSS = 700.0  # whose exp is still a float

Inputs = tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Distance:
    """How far one output of a module is from the reference's, over all batches.

    name            where the output is in the result, for example "last_hidden_state" or "[0]"; "output" when there is only one
    cosine          mean cosine over the vectors along the last dimension; pairs of zero vectors count as equal
    relative_error  ||other - reference|| / ||reference||
    max_error       largest |other - reference|
    """

    name: str
    cosine: float
    relative_error: float
    max_error: float


@dataclass
class _Sums:
    cosines: float = 0.0
    vectors: int = 0
    squared_error: float = 0.0
    squared_reference: float = 0.0
    max_error: float = 0.0

    def add(self, reference: Tensor, other: Tensor) -> None:
        if reference.numel() == 0:
            return
        a, b = (t.detach().double().reshape(-1, t.shape[-1] if t.dim() else 1) for t in (reference, other))
        norms = a.norm(dim=1) * b.norm(dim=1)
        same = (a == b).all(1)
        self.cosines += float(torch.where(same, 1.0, (a * b).sum(1) / norms.clamp(min=torch.finfo(torch.float64).tiny)).sum())
        self.vectors += a.shape[0]
        self.squared_error += float((b - a).square().sum())
        self.squared_reference += float(a.square().sum())
        largest = float((b - a).abs().max())
        self.max_error = math.nan if math.isnan(largest) else max(self.max_error, largest)

    def result(self, name: str) -> Distance:
        error = math.sqrt(self.squared_error) if self.squared_error >= 0 else math.nan
        relative = error / math.sqrt(self.squared_reference) if self.squared_reference > 0 else (0.0 if error == 0 else math.inf)
        return Distance(name, self.cosines / self.vectors if self.vectors else 1.0, relative, self.max_error)


def output_distance(reference: nn.Module, module: nn.Module, batches: Iterable[Inputs]) -> list[Distance]:
    """How far each floating-point output of `module` is from that of `reference` on the batches (tuples or dicts, walked once).

    Raises InputError for no batch, a batch that is neither, or outputs of different structure.
    """
    sums: dict[str, _Sums] = {}
    done = 0
    with torch.no_grad():
        for batch in batches:
            old, new = (_outputs(m, batch) for m in (reference, module))
            if [(k, v.shape) for k, v in old] != [(k, v.shape) for k, v in new]:
                raise InputError("the outputs differ in structure or shape", where="output_distance")
            for (name, a), (_, b) in zip(old, new, strict=True):
                sums.setdefault(name, _Sums()).add(a, b)
            done += 1
    if not done:
        raise InputError("there is no batch to compare the outputs on", where="output_distance")
    return [each.result(name) for name, each in sums.items()]


def measure(metric: Callable[[nn.Module], Any], model: nn.Module) -> float:
    """The user's metric of a model, higher is better, as a float. Raises InputError unless it is a finite number."""
    if not callable(metric):
        raise InputError(f"quality is a function from model to float, not {type(metric).__name__}", where="quality")
    with torch.no_grad():
        value = metric(model)
    if getattr(value, "shape", None) is not None and math.prod(value.shape) == 1:  # a tensor or array of one number
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"returned {type(value).__name__} {value!r:.60}, not a number", where="quality", hint="return one float, higher is better")
    if not math.isfinite(value):
        raise InputError(f"returned {value}", where="quality", hint="the metric must be finite, also for a poor model")
    return float(value)


def perplexity(model: nn.Module, batches: Iterable[Inputs], loss: Loss | None = None) -> float:
    """exp of the mean loss over batches; by default of next-token cross entropy, each token counted alike.

    Raises CalibrationError for no batch, and without a loss for outputs that are no logits of token numbers in the batch.
    """
    values, counts = batch_losses(model, batches, loss)
    return math.exp(min(math.fsum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts), MAX_LOSS))


def batch_losses(model: nn.Module, batches: Iterable[Inputs], loss: Loss | None = None) -> tuple[list[float], list[int]]:
    """(mean loss, tokens that it is the mean of) of each batch that has tokens; a loss of one's own counts as one. Raises as perplexity does."""
    values, counts = [], []
    with torch.no_grad():
        for batch in batches:
            output = model(*batch) if isinstance(batch, tuple) else model(**batch)
            value, tokens = (loss(output, batch), 1) if loss is not None else next_token_loss(output, batch)
            if tokens:
                values.append(float(value))
                counts.append(tokens)
    if not counts:
        raise CalibrationError("there is no token to measure a perplexity on", where="calibration", hint="give calibration=batches of token numbers")
    return values, counts


def _outputs(module: nn.Module, batch: Inputs) -> list[tuple[str, Tensor]]:
    """(name, tensor) of every floating-point output of one call."""
    if isinstance(batch, tuple):
        result = module(*batch)
    elif isinstance(batch, Mapping):
        result = module(**batch)
    else:
        raise InputError(f"a batch is a tuple or a dict, not {type(batch).__name__}", where="output_distance")
    flat, _ = pytree.tree_flatten_with_path(result)
    named = [(pytree.keystr(path) or "output", leaf) for path, leaf in flat if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [(name.removeprefix(".").removeprefix("['").removesuffix("']"), leaf) for name, leaf in named]
