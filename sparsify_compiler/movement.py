"""What training tells about weights: a hook for the user's own loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from .errors import InputError


class Movement:
    """Sums up, over the backward passes of a training loop, by how much each weight moves away from zero: -gradient * weight.

        with Movement(model) as movement:
            train(model)                      # the user's own loop: loss.backward(), optimizer.step(), ...
        sc.compile(model.eval(), inputs, recipe=sc.recipes.movement(density=0.15), calibration=batches, known=movement.known())

    Sums are float32 of the parameters' shapes and stay in memory. Each backward pass counts with the
    gradient that it adds. Raises InputError for a model without parameters to train.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad and weight.is_floating_point()}
        if not trained:
            raise InputError("no parameter of this model is trained", where="Movement", hint="call model.requires_grad_() first")
        self._sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in trained.items()}
        self._hooks = [weight.register_hook(self._adder(name, weight)) for name, weight in trained.items()]  # type: ignore[no-untyped-call]

    def known(self) -> Mapping[str, Mapping[str, Tensor]]:
        """What `compile(known=...)` takes: {"movement": {name of the parameter: its sum}}."""
        return {"movement": {name: total.clone() for name, total in self._sums.items()}}

    def close(self) -> None:
        """Stop counting; what was counted stays."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _adder(self, name: str, weight: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            self._sums[name] -= gradient.detach().float() * weight.detach().float()

        return add
