"""recover(): bring a compressed model back towards the dense one, by distillation on batches without labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .distillation import parse_losses
from .errors import InputError
from .pipeline import Pipeline
from .progress import Show, display
from .recover_blocks import by_blocks
from .recover_loop import Course, Inputs, Loop, endless
from .recover_pair import Student, Teacher
from .recover_state import RunFile, fingerprint
from .recovery import Recovery
from .training import Hook
from .training_attach import acting, attach


def recover(model: nn.Module, teacher: nn.Module, batches: Iterable[Inputs], *, hook: Hook | None = None, minutes: float = 10.0,
            steps: int | None = None, losses: str | Sequence[str] | None = None, quality: Callable[[nn.Module], float] | None = None,
            checks: int = 10, patience: int = 3, rate: float = 2e-4, warmup: float = 0.05, clip: float = 1.0, decay: float = 0.0,
            accumulate: int = 1, average: float = 0.0, dtype: torch.dtype | None = None, blockwise: bool = False,
            checkpoint: str | Path | None = None, dynamic: Any = None, progress: bool | Show = False) -> tuple[nn.Module, Recovery]:
    """Train a sparse model to do what its teacher does: (the trained module, what happened). finalize() goes on from there.

        module, hook = sc.attach(model, batches[0], sc.recipes.wanda("2:4"), calibration=batches[:8])
        module, recovery = sc.recover(module, model, batches, hook=hook, minutes=10)
        compiled = sc.finalize(module, batches[0], recovery=recovery)

    model       with its hook, what attach() gave: it is trained in place. Without a hook, any model in evaluation mode, whose masks
                (weight * mask in its graph) stay; a copy is trained and the model is not modified
    teacher     the dense model, in evaluation mode; not modified, and run without gradients
    batches     tuples or dicts like a call's arguments, no labels. A list or a data loader is walked over and over, an iterator once
    minutes     the budget of time, all included; with `steps`, an upper bound
    steps       the number of steps, where masks move by schedule and runs must be the same. recovery.early tells how many a schedule had before it
                when the training ended
    losses      files of passes/train/distillations, with options: ("squarehead", "logits(temperature=2.0)"). By default squarehead and outputs
                where both models have residual blocks, else outputs
    quality     model -> float, higher is better, measured `checks` times; after `patience` times without a new best it stops. The best is kept
    rate        of AdamW at its highest: it warms up over the first `warmup` share of the way and falls along a cosine to 0. The way is
                `steps`, or the time from the end of the first step on, but for a last measurement of the metric
    clip        largest norm of the gradient
    decay       weight decay of AdamW
    accumulate  batches a step
    average     share that the weights so far have in an average over the steps, 0.999: it is what is measured and handed back. 0 for none
    dtype       torch.bfloat16 or float16 to run both models under autocast
    blockwise   train one residual block after another, on what those before it give, and at last what follows them: gradients, the optimizer and
                what the backward pass needs are those of one block at a time. `steps`, and an equal share of `minutes`, are each block's; masks stay
    checkpoint  a file that holds the whole state, replaced at once every half minute. Where it is there the run goes on from it. Block by block
                there is one for each, <file>.<number>
    dynamic     as in compile(), for a model without a hook and for the teacher
    progress    True, or a function (what, done, total)

    A loss that is not a number ends it, with the last good weights. Raises InputError for a teacher of another shape, no parameter to train, no batch
    and the like; StorageError where the checkpoint cannot be written.
    """
    started = time.monotonic()
    course = Course(minutes, steps, rate, warmup, clip, decay, accumulate, checks, patience, average)
    named = [] if losses is None else parse_losses(losses)  # first of all: wrong names are told at once
    first, walk = _first(batches)
    if hook is None:
        model, hook = attach(model, first, Pipeline(()), dynamic=dynamic)
    model.eval()
    acting(model)
    student = Student(model, hook, Teacher(teacher, first, dynamic), dtype)
    chosen = student.losses(first, named)
    settings = f"{[(one.name, one.options) for one in chosen]} {steps} {rate} {warmup} {clip} {decay} {accumulate} {dtype}"
    key = fingerprint(model, f"{settings} {average}" if average else settings)
    file = None if checkpoint is None else Path(checkpoint)
    with display(progress) as show:
        if blockwise:
            return model, by_blocks(model, hook, student, chosen, batches, course, metric=quality, file=file, key=key, show=show, started=started)
        loop = Loop(model, hook, lambda batch: student.loss(batch, chosen), course, record=Recovery([one.name for one in chosen]), metric=quality,
                    file=None if file is None else RunFile(file, key), show=show, started=started)
        return model, loop.run(walk)


def _first(batches: Iterable[Inputs]) -> tuple[Inputs, Iterable[Inputs]]:
    """The first batch, and all of them with it."""
    walk = endless(batches)
    first = next(walk, None)
    if first is None:
        raise InputError("there is no batch to train on", where="batches")
    return first, chain((first,), walk)
