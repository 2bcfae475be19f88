"""What starts anew in a parameter while it is trained, and what an optimizer remembers of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import ref

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
        raise _foreign()
    state = optimizer.state.get(anew.parameter, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == anew.shape:
            state[name] = anew.carry(value)


class Foreign:
    """The parameters of the user's own model, of which a trained copy was made."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._known = [ref(one) for one in parameters]

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises InputError for an optimizer that was made of them: it would train them, and nothing of the copy would change."""
        known = {id(one) for known in self._known if (one := known()) is not None}
        if any(id(one) in known for group in optimizer.param_groups for one in group["params"]):
            raise _foreign()


def _foreign() -> InputError:
    return InputError("the optimizer does not train the attached module's weights", where="Hook.step",
                      hint="make it of module.parameters(), after attach(): the original model's parameters are others")
