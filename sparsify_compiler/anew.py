"""What starts anew in a parameter while it is trained, and what an optimizer remembers of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class Anew:
    """What starts anew in a parameter.

    shape   that the parameter had
    carry   what an optimizer remembers of it, of that shape -> what it is to remember from now on
    needed  has the parameter other places now, so that an optimizer that is not told would go wrong?
    """

    parameter: Tensor
    shape: torch.Size
    carry: Callable[[Tensor], Tensor]
    needed: bool = False

    @staticmethod
    def at(parameter: Tensor, fresh: Tensor) -> Anew:
        """Some places (bool, of its shape) of a parameter that stays as it is otherwise."""
        return Anew(parameter, parameter.shape, lambda state: state.masked_fill(fresh, 0))


def forget(optimizer: torch.optim.Optimizer, anew: Anew) -> None:
    """Bring what an optimizer remembers of a parameter to what has become of that. Raises InputError for a parameter that it does not train."""
    if not any(anew.parameter is known for group in optimizer.param_groups for known in group["params"]):
        raise InputError("the optimizer does not train the attached module's weights", where="Hook.step",
                         hint="make it of module.parameters(), after attach(): the original model's parameters are others")
    state = optimizer.state.get(anew.parameter, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == anew.shape:
            state[name] = anew.carry(value)
