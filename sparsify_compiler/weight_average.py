"""An average of the weights over the steps of a training, which lies beside what the optimizer remembers of each parameter.

So it is saved with that, and starts anew with it where a mask grows (anew.py): nothing that was cut comes back through the average.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

KEY = "average"


def take_in(optimizer: torch.optim.Optimizer, share: float, step: int) -> None:
    """After a step, the first being 1: average = share * average + (1 - share) * weight (Polyak and Juditsky, 1992, with weights that fall).

    share  of what was before, below 1. In the first steps it is (1 + step) / (10 + step) at most: the start is soon forgotten
    """
    with torch.no_grad():
        for weight in _trained(optimizer):
            state = optimizer.state[weight]
            if KEY in state:
                state[KEY].lerp_(weight, 1 - min(share, (1 + step) / (10 + step)))
            elif state:
                state[KEY] = weight.detach().clone()


def put_averages(optimizer: torch.optim.Optimizer) -> None:
    """Let the parameters be their averages, where they have one."""
    with torch.no_grad():
        for weight, average in _averages(optimizer):
            weight.copy_(average)


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, the parameters are their averages."""
    kept = [(weight, weight.detach().clone()) for weight, _ in _averages(optimizer)]
    try:
        put_averages(optimizer)
        yield
    finally:
        with torch.no_grad():
            for weight, before in kept:
                weight.copy_(before)


def _averages(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    for weight in _trained(optimizer):
        if KEY in (state := optimizer.state.get(weight, {})):
            yield weight, state[KEY]


def _trained(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (weight for group in optimizer.param_groups for weight in group["params"])
