"""The student and the teacher of a recovery, each run on a batch and compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .capture_batch import captured_for_any_batch
from .distillation import Inputs, Seen, check_alike, distance, parse_losses, see, see_block
from .named import Named
from .training import Hook
from .training_attach import hooked

DEFAULT = ("squarehead", "outputs")


class Teacher:
    """The dense model, whose residual stream is watched. It shares its tensors."""

    def __init__(self, model: nn.Module, example: Inputs, dynamic: Any) -> None:
        with torch.no_grad():
            self._module, self._hook = hooked(captured_for_any_batch(model, example, dynamic), own=False)

    @property
    def blocks(self) -> list[str]:
        """The paths of its residual blocks, in order."""
        return list(self._hook.blocks)

    def __call__(self, batch: Inputs, attention: bool) -> Seen:
        with torch.no_grad():
            return see(self._module, self._hook, batch, attention)

    def block(self, batch: Inputs, number: int) -> Seen:
        """As far as its residual block of this number."""
        with torch.no_grad():
            return see_block(self._module, self._hook, batch, self.blocks[number])


class Student:
    """The model in training, beside its teacher."""

    def __init__(self, model: nn.Module, hook: Hook, teacher: Teacher, dtype: torch.dtype | None) -> None:
        self._model, self._hook, self._teacher = model, hook, teacher
        device = next(iter(model.parameters()), torch.empty(0, dtype=torch.float32)).device
        self._cast = torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def losses(self, batch: Inputs, named: list[Named]) -> list[Named]:
        """Those that the user named, or the default of such a model where there are none; checked on one batch."""
        attention = _reads_attention(named)
        with torch.no_grad(), self._cast:
            ours, theirs = see(self._model, self._hook, batch, attention), self._teacher(batch, attention)
        chosen = named or parse_losses(DEFAULT if ours.states and theirs.states else "outputs")
        check_alike(chosen, ours, theirs)
        return chosen

    def loss(self, batch: Inputs, losses: Sequence[Named]) -> Tensor:
        """float32 []: the mean over the passes that the hook asks for."""
        attention = _reads_attention(losses)
        with self._cast:
            theirs = self._teacher(batch, attention)
            every = [distance(losses, see(self._model, self._hook, batch, attention), theirs) for _ in range(self._hook.passes)]
        return torch.stack(every).mean()

    def block_loss(self, batch: Inputs, losses: Sequence[Named], number: int) -> Tensor:
        """The same of the state behind the residual block of this number alone, where both models stop."""
        with self._cast:
            theirs = self._teacher.block(batch, number)
            ours = see_block(self._model, self._hook, batch, list(self._hook.blocks)[number])
        return distance(losses, ours, theirs)


def _reads_attention(losses: Sequence[Named]) -> bool:
    return any("attention" in loss.statistics for loss in losses)
