"""recover(): bring a compressed model back towards the dense one, by distillation on batches without labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .capture_batch import captured_for_any_batch
from .distillation import Seen, check_alike, distance, parse_losses, see
from .errors import InputError
from .named import Named
from .pipeline import Pipeline
from .progress import Show, display
from .recover_loop import Course, Inputs, Loop, endless
from .recover_state import RunFile, fingerprint
from .recovery import Recovery
from .training import Hook
from .training_attach import attach, hooked

DEFAULT = ("squarehead", "outputs")


def recover(model: nn.Module, teacher: nn.Module, batches: Iterable[Inputs], *, hook: Hook | None = None, minutes: float = 10.0,
            steps: int | None = None, losses: str | Sequence[str] | None = None, quality: Callable[[nn.Module], float] | None = None,
            checks: int = 10, patience: int = 3, rate: float = 2e-4, warmup: float = 0.05, clip: float = 1.0, decay: float = 0.0,
            accumulate: int = 1, dtype: torch.dtype | None = None, checkpoint: str | Path | None = None, dynamic: Any = None,
            progress: bool | Show = False) -> tuple[nn.Module, Recovery]:
    """Train a sparse model to do what its teacher does: (the trained module, what happened). It goes through compile() afterwards.

        module, hook = sc.attach(model, batches[0], sc.recipes.wanda("2:4"), calibration=batches[:8])
        module, recovery = sc.recover(module, model, batches, hook=hook, minutes=10)
        compiled = sc.compile(module, batches[0], recipe="pack() | lower()")

    model       with its hook, what attach() gave: it is trained in place. Without a hook, any model in evaluation mode, whose masks
                (weight * mask in its graph) stay; a copy is trained and the model is not modified
    teacher     the dense model, in evaluation mode; not modified, and run without gradients
    batches     tuples or dicts like a call's arguments, no labels. A list or a data loader is walked over and over, an iterator once
    minutes     the budget of time, all included; with `steps`, an upper bound
    steps       the number of steps, where masks move by schedule and runs must be the same
    losses      files of passes/train/distillations, with options: ("squarehead", "logits(temperature=2.0)"). By default squarehead and outputs
                where both models have residual blocks, else outputs
    quality     model -> float, higher is better, measured `checks` times; after `patience` times without a new best it stops. The best is kept
    rate        of AdamW at its highest: it warms up over the first `warmup` share of the way and falls along a cosine
    clip        largest norm of the gradient
    decay       weight decay of AdamW
    accumulate  batches a step
    dtype       torch.bfloat16 or float16 to run both models under autocast
    checkpoint  a file that holds the whole state, replaced at once every half minute. Where it is there the run goes on from it
    dynamic     as in compile(), for a model without a hook and for the teacher
    progress    True, or a function (what, done, total)

    A loss that is not a number ends it, with the last good weights. Raises InputError for a teacher of another shape, no parameter to train, no batch
    and the like; StorageError where the checkpoint cannot be written.
    """
    started = time.monotonic()
    course = Course(minutes, steps, rate, warmup, clip, decay, accumulate, checks, patience)
    named = [] if losses is None else parse_losses(losses)  # first of all: wrong names are told at once
    first, batches = _first(batches)
    if hook is None:
        model, hook = attach(model, first, Pipeline(()), dynamic=dynamic)
    model.eval()
    teach = _Teacher(teacher, first, dynamic)
    student = _Student(model, hook, teach, dtype)
    chosen = student.losses(first, named)
    key = fingerprint(model, f"{[(one.name, one.options) for one in chosen]} {steps} {rate} {warmup} {clip} {decay} {accumulate} {dtype}")
    file = None if checkpoint is None else RunFile(Path(checkpoint), key)
    with display(progress) as show:
        loop = Loop(model, hook, lambda batch: student.loss(batch, chosen), course, record=Recovery([one.name for one in chosen]), metric=quality,
                    file=file, show=show, started=started)
        record = loop.run(batches)
    return model, record


def _first(batches: Iterable[Inputs]) -> tuple[Inputs, Iterable[Inputs]]:
    """The first batch, and all of them with it."""
    walk = endless(batches)
    first = next(walk, None)
    if first is None:
        raise InputError("there is no batch to train on", where="batches")
    return first, chain((first,), walk)


class _Teacher:
    """The dense model, whose residual stream is watched. It shares its tensors."""

    def __init__(self, model: nn.Module, example: Inputs, dynamic: Any) -> None:
        with torch.no_grad():
            self._module, self._hook = hooked(captured_for_any_batch(model, example, dynamic), own=False)

    def __call__(self, batch: Inputs, attention: bool) -> Seen:
        with torch.no_grad():
            return see(self._module, self._hook, batch, attention)


class _Student:
    """The model in training, beside its teacher."""

    def __init__(self, model: nn.Module, hook: Hook, teacher: _Teacher, dtype: torch.dtype | None) -> None:
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
        """float32 []."""
        attention = _reads_attention(losses)
        with self._cast:
            theirs = self._teacher(batch, attention)
            ours = see(self._model, self._hook, batch, attention)
        return distance(losses, ours, theirs)


def _reads_attention(losses: Sequence[Named]) -> bool:
    return any("attention" in loss.statistics for loss in losses)
