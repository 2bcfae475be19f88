"""What a student and its teacher make of one batch, and the losses between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .call import call_arguments
from .errors import InputError
from .named import Named
from .training import Hook

Inputs = tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Seen:
    """What one model made of one batch.

    outputs    its floating outputs, in order
    states     the residual stream behind each block, [batch, tokens, width], in order
    tokens     bool [batch, tokens], the real ones: the batch's "attention_mask"; None where it has none
    attention  the logarithms of the weights of each attention, [batch, heads, queries, keys]; empty where no loss asks for them
    """

    outputs: tuple[Tensor, ...]
    states: tuple[Tensor, ...]
    tokens: Tensor | None
    attention: tuple[Tensor, ...] = ()


def see(model: nn.Module, hook: Hook, batch: Inputs, attention: bool) -> Seen:
    """Run an attached model on a batch."""
    args, kwargs = call_arguments(batch)
    leaves = pytree.tree_leaves(model(*args, **kwargs))
    outputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return Seen(outputs, tuple(hook.states.values()), _tokens(kwargs), tuple(hook.attentions().values()) if attention else ())


def see_block(model: nn.Module, hook: Hook, batch: Inputs, path: str) -> Seen:
    """Run an attached model on a batch as far as a residual block goes: its state alone."""
    args, kwargs = call_arguments(batch)
    with hook.ending_at(path):
        model(*args, **kwargs)
    return Seen((), (hook.states[path],), _tokens(kwargs))


def _tokens(named: Mapping[str, Any]) -> Tensor | None:
    mask = named.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def parse_losses(losses: str | Sequence[str]) -> list[Named]:
    """The losses by their names. Raises UnknownNameError, ParseError, and InputError for none."""
    found = [Named.parse("distillation", text) for text in ((losses,) if isinstance(losses, str) else losses)]
    if not found:
        raise InputError("there is no loss to train with", where="losses", hint='losses=("squarehead", "outputs")')
    return found


def check_alike(losses: Sequence[Named], student: Seen, teacher: Seen) -> None:
    """Raises InputError where a loss cannot compare the two: a teacher of another shape, or a model without residual blocks."""
    for loss in losses:
        for what in loss.statistics:
            ours, theirs = getattr(student, what), getattr(teacher, what)
            if not ours or not theirs:
                raise InputError(f"the {'student' if not ours else 'teacher'} has no {what} to compare", where=f"loss {loss.name}",
                                 hint='losses="outputs" needs nothing but the outputs')
            shapes = [[tuple(x.shape) for x in many] for many in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise InputError(f"the teacher's {what} have shapes {shapes[1]}, the student's {shapes[0]}", where=f"loss {loss.name}",
                                 hint="take the dense model itself for a teacher, or a loss of what both have")


def distance(losses: Sequence[Named], student: Seen, teacher: Seen) -> Tensor:
    """The sum of the losses: float32 []."""
    terms: list[Tensor] = [loss(student, teacher) for loss in losses]
    return torch.stack(terms).sum()
